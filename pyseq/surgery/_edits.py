"""Modules of a model replaced, inserted and removed, each with a way back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pyseq._capture import arguments
from pyseq.surgery._calls import PerCall, count_calls
from pyseq.surgery._places import Match, refuse_nested, resolve
from pyseq.surgery._ties import memory
from pyseq.surgery._trial import Call, trial
from pyseq.surgery._undo import Edit, Place, count, short

New = nn.Module | Callable[[nn.Module], nn.Module]
INPUTS = ("in_features", "in_channels", "num_features", "num_channels", "normalized_shape", "input_size")
OUTPUTS = ("out_features", "out_channels", "embedding_dim", *INPUTS[2:5], "hidden_size")


class PassThrough(nn.Module):
    """Stands where a module was removed; returns its first argument.

    >>> PassThrough()(1, 2)
    1
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument as it is."""
        return args[0] if args else next(iter(kwargs.values()))


class Then:
    """The forward hook by which a module goes through the child of this name after its own forward."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The child's output for the module's."""
        return module._modules[self.name](output)  # type: ignore[misc]


def replace(
    model: nn.Module,
    where: str,
    new: New,
    *,
    example: Any = None,
    keep_shape: bool = True,
    break_ties: bool = False,
) -> Edit:
    """Put a module in place of another, in the model itself.

    where: a module path ("layer3.1"), or a glob over paths ("*.relu"; a star also matches dots): every match. A module
    that has several names is replaced under those that match; in a parent that has several names, under all of them.
    "block#1" is one call of a module that is called several times, counted from 0 in a forward pass of the example: the
    module becomes a `PerCall` with children "0", "1", ..., all the old one but this; see `unshare` for what that asks.
    new: a module, put at all matches and shared by them; or a function from the old module to the new one, called once
    for each old module. It takes the old one's training flag, what is new in it; its hooks are its own.
    example: a tuple of arguments, a dict of keywords, or one tensor: the model is run on it before and after, without
    gradients, and must still run. keep_shape: whether the place must give the shapes it gave, unless its value is part
    of the model's output. Without an example only sizes that both modules state are compared (features, channels, of
    Linear, convolutions, embeddings, norms and recurrent layers): an example checks fully. Buffers, random state and
    modes come out of the run as they were; hooks do run.
    break_ties: whether a parameter of the old module may be left that another module uses too.

    Returns the Edit. Raises ValueError for an unknown place, overlapping ones, other sizes, dtype or device, a model
    that no longer runs, and a tie that would break; TypeError for what is no module. The model is then as it was.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> edit = replace(model, "0", lambda old: torch.nn.Sequential(old, torch.nn.LayerNorm(3)))
    >>> model(torch.ones(1, 2)).shape
    torch.Size([1, 3])
    """
    if isinstance(where, str) and "#" in where:
        at = partial(replace, model, new=new, example=example, keep_shape=keep_shape, break_ties=break_ties)
        return _one_call(model, where, example, at)
    matches = resolve(model, where)
    refuse_nested(matches)
    made: dict[int, nn.Module] = {}
    for match in matches:
        if id(match.old) not in made:
            made[id(match.old)] = _made(new, match)
    pairs = [(match, made[id(match.old)]) for match in matches]
    for match, module in pairs:
        _check_fit(model, match, module)
        if example is None and keep_shape:
            for word, names in (("in", INPUTS), ("out", OUTPUTS)):
                sizes = _size(match.old, names), _size(module, names)
                if None not in sizes and sizes[0] != sizes[1]:
                    raise ValueError(
                        f"{match.name}: the new {_kind(module)} has {word}put size {sizes[1]}, the old one {sizes[0]}:"
                        " give a module of that size, an example to check the whole model on, or keep_shape=False"
                    )
    return _replaced(model, "replace", pairs, example, keep_shape, break_ties)


def remove(
    model: nn.Module, where: str, *, example: Any = None, keep_shape: bool = True, break_ties: bool = False
) -> Edit:
    """Take a module out: a pass-through that returns its first argument stands in its place, so names stay.

    Arguments, result and errors are those of `replace`. Without an example a module that states different sizes for
    input and output is refused.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> print(remove(model, "1"))
    remove 1: ReLU -> PassThrough; parameters 9 -> 9
    """
    if isinstance(where, str) and "#" in where:
        at = partial(remove, model, example=example, keep_shape=keep_shape, break_ties=break_ties)
        return _one_call(model, where, example, at)
    matches = resolve(model, where)
    refuse_nested(matches)
    for name, _, _, old in matches:
        sizes = _size(old, INPUTS), _size(old, OUTPUTS)
        if example is None and keep_shape and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{name}: {_kind(old)} makes size {sizes[1]} of {sizes[0]}, so it cannot just go: give an example to"
                " check the whole model on, or keep_shape=False"
            )
    pairs = [(match, PassThrough()) for match in matches]
    return _replaced(model, "remove", pairs, example, keep_shape, break_ties)


def insert_after(model: nn.Module, where: str, module: New, *, example: Any = None, keep_shape: bool = True) -> Edit:
    """Let the value of a module go through another one, in all its calls.

    The new module becomes the last child of an nn.Sequential, else a child "after" (or "after_1", ...) of the old one,
    which a forward hook applies after the hooks that are there: all other names stay. It is called with the old
    module's output as its one argument.
    where: as for `replace`; behind one call ("block#1") old and new one form an nn.Sequential, of one argument.
    module: a module, or a function from the old module to the one to insert. Other arguments, result and errors are
    those of `replace`; ValueError also for a module that has other names which do not match, as all would change, and
    for lists and dicts of modules, which are never called.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> edit = insert_after(model, "0", torch.nn.LayerNorm(3))
    >>> [*dict(model.named_modules())]
    ['', '0', '0.after', '1']
    """
    if isinstance(where, str) and "#" in where:

        def behind(old: nn.Module) -> nn.Module:
            return nn.Sequential(old, module if isinstance(module, nn.Module) else module(old))

        return _one_call(
            model, where, example, partial(replace, model, new=behind, example=example, keep_shape=keep_shape)
        )
    matches = resolve(model, where)
    names = {match.name for match in matches}
    unique = {id(match.old): match for match in reversed(matches)}
    made: list[tuple[Match, nn.Module]] = []
    for match in reversed(unique.values()):
        others = {n for n, m in model.named_modules(remove_duplicate=False) if m is match.old} - names
        if others:
            raise ValueError(
                f"{match.name} is also {', '.join(sorted(others))}, where the insertion would be too: use a pattern"
                " that matches all its names, or replace this one by an nn.Sequential"
            )
        if isinstance(match.old, (nn.ModuleList, nn.ModuleDict)) or (
            isinstance(match.old, nn.Sequential) and type(match.old).forward is not nn.Sequential.forward
        ):
            raise ValueError(f"{match.name} is a {_kind(match.old)}, into which nothing is inserted: name one inside")
        added = _made(module, match)
        _check_fit(model, match, added, place=match.old)
        sizes = _size(match.old, OUTPUTS), _size(added, INPUTS), _size(added, OUTPUTS)
        known = {size for size in sizes if size is not None}
        if example is None and keep_shape and len(known) > 1:
            raise ValueError(
                f"{match.name}: {_kind(match.old)} gives size {sizes[0]}, the inserted {_kind(added)} makes {sizes[2]}"
                f" of {sizes[1]}: give one that keeps the size, an example to check the whole model on, or"
                " keep_shape=False"
            )
        made.append((match, added))
    kinds = ", ".join(dict.fromkeys(_kind(added) for _, added in made))
    places = tuple(match.name for match in matches)
    edit = Edit(f"insert_after {short(places)}: {kinds}", places)

    def apply() -> None:
        for match, added in made:
            old = match.old
            _take_mode(edit, model, old, added)
            if isinstance(old, nn.Sequential) and all(key.isdigit() for key in old._modules):
                edit._put(old, str(len(old)), added)
                continue
            name = next(n for i in range(10**6) if not hasattr(old, n := f"after_{i}" if i else "after"))
            edit._put(old, name, added)
            if not isinstance(old, nn.Sequential):
                edit._hook(old, Then(name))

    olds = [match.old for match, _ in made]
    _carry_out(model, edit, apply, (olds, olds), example, keep_shape, True)
    return edit


def _one_call(model: nn.Module, where: str, example: Any, edit: Callable[[str], Edit]) -> Edit:
    """An edit of one call: the module becomes one for each call first."""
    path, _, call = where.partition("#")
    ((name, parent, key, old), *others) = resolve(model, path)
    if others or [m for _, m in model.named_modules(remove_duplicate=False)].count(old) > 1:
        raise ValueError(f"{where!r}: {name} has several names, which tell its calls apart; edit one of these")
    first = Edit("", ())
    if example is None and not isinstance(old, PerCall):
        raise ValueError(f"{where!r}: give example=, arguments of the model by which calls of {path} are counted")
    calls = len(old) if isinstance(old, PerCall) else dict(count_calls(model, example)).get(path, 0)
    if calls < 2 or not call.isdecimal() or int(call) >= calls:
        raise ValueError(f"{where!r}: {path} is called {calls} times in a forward pass, and calls count from 0")
    try:
        if not isinstance(old, PerCall):
            apart = PerCall([old] * calls)
            first._put(parent, key, apart)
            first._places += [Place(apart, str(i), old, old) for i in range(calls) if i != int(call)]  # undone before
            first._count(model, [path])
        done = edit(f"{path}.{call}")
    except BaseException:
        first._restore()
        raise
    return done._follows(first)


def _replaced(
    model: nn.Module,
    verb: str,
    pairs: list[tuple[Match, Any]],
    example: Any,
    keep_shape: bool,
    break_ties: bool,
) -> Edit:
    kinds = dict.fromkeys(f"{_kind(match.old)} -> {_kind(new)}" for match, new in pairs)
    names = tuple(match.name for match, _ in pairs)
    edit = Edit(f"{verb} {short(names)}: {', '.join(kinds)}", names)

    def apply() -> None:
        for parent, key, old, new in {(id(m.parent), m.key): (m.parent, m.key, m.old, n) for m, n in pairs}.values():
            _take_mode(edit, model, old, new)
            edit._put(parent, key, new)

    watched = [match.old for match, _ in pairs], [new for _, new in pairs]
    _carry_out(model, edit, apply, watched, example, keep_shape, break_ties)
    return edit


def _carry_out(
    model: nn.Module,
    edit: Edit,
    apply: Callable[[], None],
    watched: tuple[list[nn.Module], list[nn.Module]],
    example: Any,
    keep_shape: bool,
    break_ties: bool,
) -> None:
    """Apply an edit, with the checks before and after; whatever fails, the model is as it was."""
    before: list[Call] = []
    after: list[Call] = []
    if example is not None:
        arguments(model, example)
        try:
            trial(model, example, watched[0], before)
        except Exception as error:
            raise ValueError(f"the model does not run on the example, before any edit: {error}") from error
    numbers, owners, modules = count(model), _owners(model), dict(model.named_modules())
    try:
        apply()
        if not break_ties:
            _refuse_broken(model, owners, modules)
        if example is not None:
            try:
                trial(model, example, watched[1], after)
            except Exception as error:
                raise ValueError(
                    f"the model no longer runs with this edit ({edit.what}): the place gave {_shapes(before)} before"
                    f" and {_shapes(after)} after. {type(error).__name__}: {error}"
                ) from error
            if keep_shape and not _same_shapes(before, after):
                raise ValueError(
                    f"this edit ({edit.what}) changes the shape at its place from {_shapes(before)} to"
                    f" {_shapes(after)}: give a module that keeps it, or keep_shape=False"
                )
            edit.shapes = tuple(c.shape for c in before), tuple(c.shape for c in after)
        edit.parameters = numbers, count(model)
    except BaseException:
        edit._restore()
        raise


def _same_shapes(before: list[Call], after: list[Call]) -> bool:
    """Call by call; where their number changed, no shape may be new."""
    if len(before) == len(after):
        return all(old.is_output or old.shape == new.shape for old, new in zip(before, after, strict=True))
    return all(c.is_output for c in before) or {c.shape for c in after} <= {c.shape for c in before}


def _shapes(calls: list[Call]) -> str:
    return ", ".join(dict.fromkeys(str(c.shape) for c in calls)) or "nothing"


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _size(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these sizes that the module states."""
    for name in names:
        size = getattr(module, name, None)
        size = size[-1] if isinstance(size, tuple) and size else size
        if isinstance(size, int) and size > 0:  # 0: a lazy module
            return size
    return None


def _made(new: New, match: Match) -> nn.Module:
    module = new if isinstance(new, (nn.Module, type)) or not callable(new) else new(match.old)
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{match.name}: wanted a module, or a function from the old module to one, got {got}")
    return module


def _check_fit(model: nn.Module, match: Match, new: nn.Module, place: nn.Module | None = None) -> None:
    """Dtype and device of the old module, or where it has no parameters of the model; and no cycle."""
    if any(module is (place or match.parent) for module in new.modules()):
        raise ValueError(f"{match.name}: the new module contains the place where it is to go: give one that does not")
    for kind in ("dtype", "device"):
        known = _kinds(match.old, kind) or _kinds(model, kind)
        wrong = _kinds(new, kind) - known
        if known and wrong:
            got, wanted = (" and ".join(sorted(map(str, which))) for which in (wrong, known))
            raise ValueError(
                f"{match.name} is of {kind} {wanted}, the new module of {got}: move it by `.to(...)` first"
            )


def _kinds(module: nn.Module, kind: str) -> set[torch.dtype | torch.device]:
    return {getattr(p, kind) for p in module.parameters() if p.is_floating_point()}


def _take_mode(edit: Edit, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """The old module's training flag, for what is not in the model already."""
    there = {id(module) for module in model.modules()}
    for module in new.modules():
        if id(module) not in there:
            edit._mode(module, old.training)


def _owners(model: nn.Module) -> dict[Any, dict[int, str]]:
    """For each parameter's memory the modules that hold it."""
    found: dict[Any, dict[int, str]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            found.setdefault(memory(p), {})[id(module)] = f"{path}.{name}".lstrip(".")
    return found


def _refuse_broken(model: nn.Module, owners: dict[Any, dict[int, str]], modules: dict[str, nn.Module]) -> None:
    """Where a parameter, or a whole module, that left its place is still used elsewhere."""
    mend = "tie the new module too (`share`, or assign the parameter) before, or break the tie by break_ties=True"
    now = _owners(model)
    for key, before in owners.items():
        after = now.get(key, {})
        gone = before.keys() - after.keys()
        if gone and after and len(after) < len(before):
            name = next(iter(after.values()))
            raise ValueError(f"{before[min(gone)]} is tied to {name}: {mend}")
    there = {id(module) for module in model.modules()}
    names = {id(module): name for name, module in modules.items() if id(module) not in there}
    for path, holder in modules.items():
        for key, value in vars(holder).items():
            if id(holder) in there and isinstance(value, nn.Module) and id(value) in names:
                raise ValueError(f"{names[id(value)]} is borrowed by {path}.{key}: {mend}")
