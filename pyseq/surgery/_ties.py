"""Which tensors and modules of a model are shared, and sharing one module's with another."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyseq.surgery._undo import Edit, count, short


class SharedTensor(NamedTuple):
    """Parameters or buffers that use the same memory.

    names: all, in the model's order. kind: "one tensor" under several names, several tensors on the "same memory", or
    "overlapping views", by ranges of addresses. shape: of the first. bytes_saved: against one tensor a name. by_module:
    whether it is shared only because the modules that hold it are.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    bytes_saved: int
    by_module: bool


class SharedModule(NamedTuple):
    """A module under several names; modules inside of it are not listed again. parameters: numbers in it."""

    names: tuple[str, ...]
    kind: str
    parameters: int


@dataclass(frozen=True)
class SharingReport:
    """What `sharing_report` found; `str()` is a table. Reports of models with the same sharing are equal.

    borrowed: (attribute, module) for each attribute that holds a module of the model without registering it, as the
    embedding of `nn.TiedLinear`. parameters: numbers in parameters, each once. by_name: the same, under each name.
    bytes: memory of all parameters and buffers. bytes_saved: what more they would need without sharing.

    >>> sharing_report(torch.nn.Linear(2, 3)).bytes_saved
    0
    """

    tensors: tuple[SharedTensor, ...]
    modules: tuple[SharedModule, ...]
    borrowed: tuple[tuple[str, str], ...]
    parameters: int
    by_name: int
    bytes: int
    bytes_saved: int

    def __str__(self) -> str:
        lines = [("module", x.kind, f"{x.parameters:,} parameters", short(x.names)) for x in self.modules]
        for x in self.tensors:
            if not x.by_module:
                lines.append((x.kind, str(x.shape), f"{x.bytes_saved:,} bytes saved", short(x.names)))
        lines += [("borrowed", "", "", f"{target} by {name}") for name, target in self.borrowed]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.append(f"parameters {self.parameters:,}, by name {self.by_name:,}")
        return "\n".join([*text, f"bytes {self.bytes:,}, saved {self.bytes_saved:,}"])


def sharing_report(model: nn.Module) -> SharingReport:
    """Which parameters, buffers and modules of a model are shared, under which names, and the bytes that saves.

    Tensors on the meta device, and of other layouts and classes (DTensor), are compared by identity alone.

    >>> layer = torch.nn.Linear(2, 2)
    >>> print(sharing_report(torch.nn.Sequential(layer, torch.nn.ReLU(), layer)))
    module  Linear  6 parameters  0, 2
    parameters 6, by name 12
    bytes 24, saved 24
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    holders: dict[int, set[tuple[int, str]]] = {}
    for name, tensor in named_tensors(model):
        owner, _, key = name.rpartition(".")
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
        holders.setdefault(id(tensor), set()).add((id(model.get_submodule(owner)), key))
    shared, used = [], 0
    for group in _overlapping([*tensors.values()]):
        span = max(map(_end, group)) - min(t.data_ptr() for t in group) if _end(group[0]) else group[0].nbytes
        needed = min(span, sum(t.nbytes for t in group))
        used += needed
        every = [name for t in group for name in names[id(t)]]
        if len(every) > 1:
            same = len({memory(t) for t in group}) == 1
            kind = "one tensor" if len(group) == 1 else "same memory" if same else "overlapping views"
            saved = sum(t.nbytes * len(names[id(t)]) for t in group) - needed
            by_module = len(group) == 1 and len(holders[id(group[0])]) == 1
            shared.append(SharedTensor(tuple(every), kind, (*group[0].shape,), saved, by_module))
    by_name = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    return SharingReport(
        tuple(shared),
        (*_shared_modules(model),),
        (*_borrowed(model),),
        count(model),
        by_name,
        used,
        sum(x.bytes_saved for x in shared),
    )


def share(a: nn.Module, b: nn.Module) -> Edit:
    """Let b use all of a's parameters and buffers, those of the same names inside.

    a, b: modules of the same structure; b's own tensors are let go of, also where others are tied to them.
    Returns the Edit, whose `undo()` gives b its own tensors back. Raises ValueError where names, shapes, dtypes or
    devices differ, listing all that do, and then changes nothing.
    Source: layer reuse of https://kexue.fm/archives/6985.

    >>> a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> print(share(a, b))
    share weight, bias; parameters 18 -> 9
    >>> a.weight is b.weight
    True
    """
    for x in (a, b):
        if not isinstance(x, nn.Module):
            raise TypeError(f"a and b must be modules, got {type(x).__name__}")
    if a is b:
        raise ValueError("a and b are one module, which shares everything already: give two")
    theirs, mine = dict(named_tensors(a)), dict(named_tensors(b))
    wrong = [
        f"{name} is in {'a' if name in theirs else 'b'} alone"
        for name in {**theirs, **mine}
        if name not in theirs or name not in mine
    ]
    places: dict[tuple[int, str], str] = {}
    for name, got in mine.items():
        if (wanted := theirs.get(name)) is None:
            continue
        for word in ("shape", "dtype", "device"):
            if getattr(got, word) != getattr(wanted, word):
                wrong.append(f"{name} has {word} {_said(wanted, word)} in a, {_said(got, word)} in b")
        owner, _, key = name.rpartition(".")
        twin = places.setdefault((id(b.get_submodule(owner)), key), name)
        if theirs.get(twin) is not wanted:
            wrong.append(f"{name} and {twin} are one in b, two in a")
    if wrong:
        raise ValueError(f"b cannot use a's tensors, for they differ: {'; '.join(sorted(wrong))}")
    edit, before = Edit(f"share {short((*mine,))}", (*mine,)), count(a, b)
    for name in mine:
        owner, _, key = name.rpartition(".")
        edit._put(b.get_submodule(owner), key, theirs[name])
    edit.parameters = before, count(a, b)
    return edit


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def memory(t: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers in the same memory, while they live."""
    return (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if _end(t) else id(t)


def _end(t: Tensor) -> int:
    """The address behind the last element; 0 where there is none to compare."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or not t.data_ptr():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.element_size()


def _overlapping(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Groups whose ranges of addresses overlap, in the order of their first tensors."""
    order = {id(t): i for i, t in enumerate(tensors)}
    groups = [[t] for t in tensors if not _end(t)]
    last, end = torch.device("meta"), 0
    for t in sorted((t for t in tensors if _end(t)), key=lambda t: (str(t.device), t.data_ptr())):
        if t.device == last and t.data_ptr() < end:
            groups[-1].append(t)
        else:
            groups.append([t])
            end = 0
        last, end = t.device, max(end, _end(t))
    groups = [sorted(group, key=lambda t: order[id(t)]) for group in groups]
    return sorted(groups, key=lambda group: order[id(group[0])])


def _shared_modules(model: nn.Module) -> Iterator[SharedModule]:
    names: dict[int, list[str]] = {}
    places: dict[int, set[tuple[int, str]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parent, _, key = name.rpartition(".")
        names.setdefault(id(module), []).append(name)
        places.setdefault(id(module), set()).add((id(modules[parent]), key))
    for group in names.values():
        module = modules[group[0]]
        if len(places[id(module)]) > 1:
            yield SharedModule(tuple(group), type(module).__name__, count(module))


def _borrowed(model: nn.Module) -> Iterator[tuple[str, str]]:
    names = {id(module): name for name, module in model.named_modules()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, nn.Module) and id(value) in names:
                yield f"{path}.{key}".lstrip("."), names[id(value)]


def _said(t: Tensor, word: str) -> str:
    return str((*t.shape,)) if word == "shape" else str(getattr(t, word))
