"""Where a model uses one module several times, and how these places get copies of their own."""

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from pyseq.surgery._calls import PerCall


@dataclass(frozen=True)
class Site:
    """One module before: its path, and the place of each of its former calls, with an entry a layer in ALBERT."""

    name: str
    places: tuple[str, ...]
    per_call: bool = False
    copies: int = 1


def paths_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def find(
    model: nn.Module, pattern: str | Sequence[str] | None, calls: Mapping[nn.Module, int] | None, done: set[str]
) -> dict[nn.Module, Site]:
    """The outermost modules with parameters that are used several times, of those that match; or ValueError.

    calls: of each module in one forward, if that is known. done: places that were un-shared already, for which there
    need be nothing left.
    """
    paths, sites = paths_of(model), {}
    for module, where in paths.items():
        if module is model or next(module.parameters(), None) is None or _counts_calls(module):
            continue
        if len(where) > 1:
            sites[module] = Site(where[0], (*where,))
        elif (n := (calls or {}).get(module, 0)) > 1 and where[0] not in done:
            sites[module] = Site(where[0], tuple(f"{where[0]}.{i}" for i in range(n)), per_call=True)
    if pattern is None:
        chosen = {m for m in sites if not all(any(_inside(p, d) for d in done) for p in paths[m])}
        again = bool(done)
    else:
        chosen = _matching(paths, [pattern] if isinstance(pattern, str) else pattern)
        again = any(p == d or _inside(p, d) or _inside(d, p) for m in chosen for p in paths[m] for d in done)
    sites = {module: site for module, site in sites.items() if module in chosen}
    if not sites and not again:
        what = "no module with parameters" if pattern is None else f"nothing that {pattern!r} matches"
        more = (
            "stands in several places; give example= to find modules that are called several times in a forward"
            if calls is None
            else "is called more than once in a forward of the example: this is not shared"
        )
        raise ValueError(f"{what} {more}")
    inner = {x for module in sites for x in module.modules() if x is not module}
    return {module: site for module, site in sites.items() if module not in inner}


def _matching(paths: Mapping[nn.Module, list[str]], patterns: Sequence[str]) -> set[nn.Module]:
    names = [path for where in paths.values() for path in where if path]
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"pattern {glob!r} matches no module; the nearest are {', '.join(near)}")
    found = {m for m, where in paths.items() if any(fnmatchcase(p, glob) for p in where if p for glob in patterns)}
    return found | {x for module in found if isinstance(module, PerCall) for x in module}


def _held(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._buffers.values(), *module._modules.values()]


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _counts_calls(module: nn.Module) -> bool:
    """Whether a PerCall in it belongs to a forward around it: copies of that would count wrongly."""
    inner = [*module.modules()]
    return any(isinstance(x, PerCall) for x in inner) and not any("_unshared" in vars(x) for x in inner)


class Split:
    """A plan: which module each place of these sites gets. Nothing changes before `commit`.

    labels: of each site a number for each place; places of one number share a copy. The first number keeps the
    original. Modules around a site that are shared themselves become as many as hold different copies.
    families: of each parameter the parameters it becomes, with the share of the former calls that each serves.
    shells: places of modules around sites that were one module.
    """

    def __init__(self, root: nn.Module, sites: Mapping[nn.Module, Site], labels: Mapping[nn.Module, Sequence[int]]):
        self.root, self.sites, self.labels = root, sites, labels
        self.turns: dict[nn.Module, Iterator[int]] = {module: iter(labels[module]) for module in sites}
        self.around = {m for m in root.modules() if m not in sites and any(x in sites for x in m.modules())}
        self.made: dict[Hashable, nn.Module] = {}
        self.edits: list[tuple[nn.Module, str, nn.Module]] = []
        self._visit(root)
        self.families = self._families()
        self.shells = [(*where,) for m, where in paths_of(root).items() if m in self.around and len(where) > 1]

    def commit(self) -> None:
        for module, name, child in self.edits:
            module._modules[name] = child
        for p in self.families:
            p.grad = None

    def _visit(self, module: nn.Module) -> nn.Module:
        if module in self.sites:
            if not self.sites[module].per_call:
                return self._copy(module, next(self.turns[module]))
            copies = [self._copy(module, label) for label in self.labels[module]]
            return PerCall(copies) if len({*copies}) > 1 else module
        if module not in self.around:
            return module
        children = {name: self._visit(child) for name, child in module._modules.items() if child is not None}
        key = (module, *children.values())
        if key in self.made:
            return self.made[key]
        self.made[key] = shell = self._new(module, [module], _held(module))
        if shell is module:
            self.edits += [(module, name, x) for name, x in children.items() if x is not module._modules[name]]
        else:
            shell._modules.update(children)
        return shell

    def _copy(self, module: nn.Module, label: int) -> nn.Module:
        key = (module, label)
        if key not in self.made:
            self.made[key] = self._new(module, [*module.modules()], [])
        return self.made[key]

    def _new(self, module: nn.Module, own: list[nn.Module], kept: list[Any]) -> nn.Module:
        """The module itself at first, then copies, which keep what is kept and what others than its own have, too."""
        if module not in self.made.values():
            return module
        for other in {*self.root.modules()}.difference(own):
            kept += [other, *vars(other).values(), *_held(other)]
        return deepcopy(module, {id(x): x for x in kept if x is not module})

    def _families(self) -> dict[Tensor, list[tuple[Tensor, float]]]:
        families: dict[Tensor, list[tuple[Tensor, float]]] = {}
        for module, labels in self.labels.items():
            share = {label: labels.count(label) / len(labels) for label in labels}
            copies = [(self.made[module, label].parameters(), part) for label, part in share.items()]
            for p, *others in zip(*(params for params, _ in copies), strict=True):
                if len({p, *others}) > 1:
                    families[p] = [(q, part) for q, (_, part) in zip((p, *others), copies, strict=True)]
        return families
