"""One module used several times becomes independent copies, and back."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyseq.surgery import _follow
from pyseq.surgery._albert import LIST, encoders, group_a_layer, group_of
from pyseq.surgery._calls import attach, count_calls, detach
from pyseq.surgery._split import Site, Split, find

RECORD = "_unshared"


@dataclass(frozen=True)
class Record:
    """What `unshare` did, as the model's attribute `_unshared`; `str()` says it in a line a module.

    shells: places whose module was one before, and is several now that hold different copies.
    """

    sites: tuple[Site, ...]
    shells: tuple[tuple[str, ...], ...]
    before: int
    after: int

    def __str__(self) -> str:
        lines = [f"{site.name}: {len(site.places)} calls, {site.copies} copies" for site in self.sites]
        return "\n".join([*lines[:-1], f"{lines[-1]}; parameters {self.before:,} -> {self.after:,}"])


@dataclass(frozen=True)
class Drift:
    """How far the copies of one parameter are from their mean: the largest and the root mean square distance over
    former calls, as parts of the mean's norm."""

    module: str
    parameter: str
    copies: int
    max: float
    rms: float


@dataclass(frozen=True)
class DriftReport:
    """What `drift_report` found, a Drift for each parameter; `str()` is the table."""

    rows: tuple[Drift, ...]

    def __str__(self) -> str:
        lines = [("module", "parameter", "copies", "max", "rms")]
        lines += [(r.module, r.parameter, str(r.copies), f"{r.max:.3g}", f"{r.rms:.3g}") for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def unshare(
    model: nn.Module,
    pattern: str | Sequence[str] | None = None,
    *,
    example: Any = None,
    layers: Iterable[int] | None = None,
    groups: int | None = None,
    optimizer: Optimizer | None = None,
    state: Literal["copy", "scale", "reset"] = "copy",
    inplace: bool = False,
) -> nn.Module:
    """The model with independent copies of what it uses several times; its outputs are the same bits at first.

    pattern: a glob, or several, over module paths, such as "*.attention": what to un-share. None: the outermost
    modules with parameters that are used several times.
    example: arguments of one forward (a tuple, a dict of keywords, a tensor), by which modules are found that are
    called several times, as in a loop. Without it those are found that stand in several places, and layers of Hugging
    Face's ALBERT, which keeps its own layout (`config.num_hidden_groups`), so that it saves and loads as ever.
    layers: numbers of the calls, from 0, that get a copy of their own; the other calls go on sharing.
    groups: so many groups of successive calls, each with one copy.
    optimizer: changed in place. Copies join their original's group, with its state: "copy" a clone; "scale" first
    moments times the copy's share of the former calls, second moments times its square (1 / n and 1 / n^2 for n equal
    copies); "reset" none. It drives the returned model.
    inplace: False returns a changed copy of the model, True changes the model itself, and an ALBERT's config object.

    A copy has its own parameters and buffers, hooks and modes; ties inside it stay inside, and what the module shares
    with the rest of the model, such as a tied weight, stays shared. Gradients of copied parameters are dropped.
    Un-sharing again changes nothing. Modules that were called repeatedly become a `PerCall`, with copies "0" to "n-1";
    they raise RuntimeError in forwards with another number of calls, and where parts of the model are called alone,
    also by activation checkpointing of parts. `str(model._unshared)` is a report.

    Time and memory: of copying what is un-shared (the whole model with inplace=False).
    Raises ValueError for a pattern that matches nothing, or nothing that is shared, a model without anything shared,
    and layers, groups or state out of range; TypeError for an optimizer that wraps another. The model and the
    optimizer are then as they were. Source: kexue.fm/archives/7187.

    >>> block = nn.Linear(4, 4)
    >>> model = unshare(nn.Sequential(block, nn.ReLU(), block, nn.ReLU(), block))
    >>> print(model._unshared)
    0: 3 calls, 3 copies; parameters 20 -> 60
    """
    _follow.check(optimizer, model, state)
    wanted = _wanted(layers, groups)
    work = model if inplace else copy.deepcopy(model)
    moved: dict[Tensor, Tensor] = dict(zip(model.parameters(), work.parameters(), strict=True))
    calls = None if example is None else {work.get_submodule(name): n for name, n in count_calls(work, example)}
    before = _size(work)
    with group_a_layer(work):
        done = {place for prefix, site in _sites(work) for place in _absolute(prefix, site)}
        sites = find(work, pattern, calls, done)
        split = Split(work, sites, {module: _labels(work, site, wanted, groups) for module, site in sites.items()})
        if split.edits:
            split.commit()
            changed = [site for module, site in sites.items() if len({*split.labels[module]}) > 1]
            attach(work, [site.name for site in changed if site.per_call])
            _note(work, changed, split.shells, before)
    if optimizer is not None:
        _follow.move(optimizer, moved)
        _follow.spread(optimizer, split.families, state, _names(work))
    return work


def reshare(model: nn.Module, *, optimizer: Optimizer | None = None, inplace: bool = False) -> nn.Module:
    """The model with its former layout, in which copies are one module again: their mean over the former calls.

    The mean is w0 + mean(w_i - w0), so that equal copies keep their bits; buffers, too, where they are floats, else
    the first copy's. Works on what `unshare` returned, also inside a bigger model, and on any ALBERT with several
    groups, which become one. optimizer: changed in place; the copies leave it, and their states become the mean.
    inplace: as for `unshare`.

    Raises ValueError where nothing was un-shared, or copies differ in more than values; TypeError for an optimizer
    that wraps another. The model and the optimizer are then as they were.

    >>> block = nn.Linear(4, 4)
    >>> model = reshare(unshare(nn.Sequential(block, nn.ReLU(), block)))
    >>> model[0] is model[2]
    True
    """
    _follow.check(optimizer, model)
    work = model if inplace else copy.deepcopy(model)
    moved: dict[Tensor, Tensor] = dict(zip(model.parameters(), work.parameters(), strict=True))
    families: dict[Tensor, list[Tensor]] = {}
    with group_a_layer(work):
        means, edits = [], []
        for prefix, site in _some_sites(work):
            slots = _slots(work, prefix, site)
            for tensors in _aligned(site, slots):
                if len({*tensors}) > 1:
                    means.append((tensors[0], _follow.mean(tensors)))
                    families[tensors[0]] = [*tensors]
            places = [f"{prefix}{site.name}"] if site.per_call else _absolute(prefix, site)
            edits += [(place, slots[0]) for place in places]
        holders = [(f"{path}." if path else "", x) for path, x in work.named_modules() if RECORD in vars(x)]
        for prefix, holder in holders:
            for shells in sorted(vars(holder)[RECORD].shells, key=lambda s: -s[0].count(".")):
                edits += [(f"{prefix}{place}", work.get_submodule(f"{prefix}{shells[0]}")) for place in shells]
        for place, module in edits:
            _set(work, place, module)
        with torch.no_grad():
            for tensor, value in means:
                tensor.copy_(value)
                tensor.grad = None
        for _, holder in holders:
            detach(holder)
            del vars(holder)[RECORD]
    if optimizer is not None:
        _follow.move(optimizer, moved)
        _follow.gather(optimizer, families, _names(work))
    return work


def drift_report(model: nn.Module) -> DriftReport:
    """How far former copies are from their mean, for each un-shared module and parameter.

    Of what `unshare` returned, also after training and inside a bigger model, or of an ALBERT with several groups.
    Distances are norms, relative to the norm of the mean over the former calls. Raises ValueError where nothing was
    un-shared.

    >>> block = nn.Linear(2, 2)
    >>> model = unshare(nn.Sequential(block, nn.ReLU(), block))
    >>> print(drift_report(model))
    module  parameter  copies  max  rms
    0       weight     2       0    0
    0       bias       2       0    0
    """
    rows = []
    with group_a_layer(model, shorten=False), torch.no_grad():
        for prefix, site in _some_sites(model):
            slots = _slots(model, prefix, site)
            names = [name for name, _ in slots[0].named_parameters()]
            for name, tensors in zip(names, _aligned(site, slots, buffers=False), strict=True):
                if (copies := len({*tensors})) > 1:
                    center = _follow.mean(tensors)
                    far = torch.stack([(x - center).norm() for x in tensors]) / center.norm()
                    far = torch.where(center.norm() + far.sum() == 0, 0, far.nan_to_num(0, torch.inf))
                    rows.append(
                        Drift(prefix + site.name, name, copies, far.max().item(), far.square().mean().sqrt().item())
                    )
    return DriftReport((*rows,))


def _wanted(layers: Iterable[int] | None, groups: int | None) -> set[int] | None:
    if layers is None:
        if groups is not None and index(groups) < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        return None
    if groups is not None:
        raise ValueError("layers and groups exclude one another: give layers= for some calls, or groups= for all")
    wanted = {index(i) for i in layers}
    if not wanted or min(wanted) < 0:
        raise ValueError(f"layers must be numbers of calls from 0, such as range(2), got {sorted(wanted)}")
    return wanted


def _labels(model: nn.Module, site: Site, layers: set[int] | None, groups: int | None) -> list[int]:
    """Of each place; places with the same one share a copy."""
    if layers is None and groups is None:
        return [*range(len(site.places))]
    numbers, n = _numbers(model, site)
    if layers is not None:
        if max(layers) >= n:
            raise ValueError(f"layers must be below {n}, the number of calls of {site.name}, got {max(layers)}")
        return [i if i in layers else -1 for i in numbers]
    assert groups is not None
    if groups > n:
        raise ValueError(f"groups must be at most {n}, the number of calls of {site.name}, got {groups}")
    return [group_of(i, n, groups) for i in numbers]


def _numbers(model: nn.Module, site: Site) -> tuple[list[int], int]:
    """Of which calls these are the places, and of how many: layers of an ALBERT, or what they were before."""
    for path, encoder in encoders(model):
        start = re.escape(f"{path}.{LIST}." if path else f"{LIST}.")
        found = [re.match(rf"{start}(\d+)", place) for place in site.places]
        if all(found):
            return [int(x[1]) for x in found if x], encoder.config.num_hidden_layers
    for prefix, old in _sites(model):
        places = _absolute(prefix, old)
        if {*site.places} <= {*places}:
            return [places.index(place) for place in site.places], len(places)
    return [*range(len(site.places))], len(site.places)


def _note(model: nn.Module, sites: list[Site], shells: list[tuple[str, ...]], before: int) -> None:
    """The record, with what an older one says."""
    old: Record | None = vars(model).get(RECORD)
    known = old.sites if old else ()
    covered = [{*site.places} for site in known]
    every = [*known, *(site for site in sites if not any({*site.places} <= places for places in covered))]
    every = [replace(site, copies=len({model.get_submodule(p) for p in site.places})) for site in every]
    around = dict.fromkeys((*(old.shells if old else ()), *shells))
    model._unshared = Record((*every,), (*around,), old.before if old else before, _size(model))  # type: ignore


def _sites(model: nn.Module) -> list[tuple[str, Site]]:
    """Recorded in the model and in models inside it, whose path is the first item, with a dot; where there are none,
    an ALBERT's several groups."""
    holders = [(f"{path}." if path else "", vars(module).get(RECORD)) for path, module in model.named_modules()]
    found = [(prefix, site) for prefix, record in holders if record for site in record.sites]
    for path, encoder in encoders(model) if not found else []:
        start, count = f"{path}.{LIST}" if path else LIST, len({*encoder.albert_layer_groups})
        if count > 1:
            places = tuple(f"{start}.{i}" for i in range(encoder.config.num_hidden_layers))
            found.append(("", Site(places[0], places, copies=count)))
    return found


def _some_sites(model: nn.Module) -> list[tuple[str, Site]]:
    if not (found := _sites(model)):
        raise ValueError("nothing in this model was un-shared: give what surgery.unshare returned")
    return found


def _absolute(prefix: str, site: Site) -> list[str]:
    return [prefix + place for place in site.places]


def _slots(model: nn.Module, prefix: str, site: Site) -> list[nn.Module]:
    try:
        return [model.get_submodule(place) for place in _absolute(prefix, site)]
    except AttributeError as missing:
        raise ValueError(f"the copies of {prefix}{site.name} are not where they were put: {missing}") from None


def _aligned(site: Site, slots: list[nn.Module], buffers: bool = True) -> list[tuple[Tensor, ...]]:
    """Each parameter, and buffer, of the copies side by side; ValueError where they do not match."""
    kinds = [dict((*x.named_parameters(), *(x.named_buffers() if buffers else ()))) for x in slots]
    for other in kinds[1:]:
        if {k: x.shape for k, x in other.items()} != {k: x.shape for k, x in kinds[0].items()}:
            raise ValueError(f"the copies of {site.name} have parameters of other names or shapes: nothing to average")
    return [tuple(kind[name] for kind in kinds) for name in kinds[0]]


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters()}


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
