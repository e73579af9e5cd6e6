"""Where an edit takes place: module paths and patterns."""

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn


class Match(NamedTuple):
    """A place of a model: its name, the module that holds it, under which name, and what is there."""

    name: str
    parent: nn.Module
    key: str
    old: nn.Module


def resolve(model: nn.Module, where: str) -> list[Match]:
    """Places of a path, or of a glob over paths, under all their names, in the order of named_modules.

    A place has several names where the module that holds it has.
    Raises ValueError for the root, and where nothing matches.
    """
    if not isinstance(where, str):
        raise TypeError(f"where must be a module path or a pattern, a str, got {type(where).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if where == "":
        raise ValueError("the model itself cannot be edited, only what is in it: name a module inside")
    names = [where] if where in modules else [name for name in modules if name and fnmatchcase(name, where)]
    if not names:
        near = get_close_matches(where, modules, n=4, cutoff=0.4) or [*modules][1:5]
        raise ValueError(f"no module of the model matches {where!r}; the nearest: {', '.join(near) or 'it has none'}")

    def place(name: str) -> Match:
        parent, _, key = name.rpartition(".")
        return Match(name, modules[parent], key, modules[name])

    edited = {(id(parent), key) for _, parent, key, _ in map(place, names)}
    return [match for match in map(place, modules) if match.name and (id(match.parent), match.key) in edited]


def refuse_nested(matches: list[Match]) -> None:
    """Raise ValueError where one of the places is inside of another."""
    names = {match.name for match in matches}
    for name in names:
        inner = [other for other in names if other.startswith(f"{name}.")]
        if inner:
            raise ValueError(f"{name} and {min(inner)}, which is inside of it, both match: use a narrower pattern")
