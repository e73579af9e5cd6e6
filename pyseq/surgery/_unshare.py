"""One module used several times becomes independent copies, and back."""

import copy
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyseq.surgery import _follow
from pyseq.surgery._albert import group_a_layer, group_of
from pyseq.surgery._calls import attach, count_calls, detach
from pyseq.surgery._record import RECORD, absolute, aligned, note, numbers_of, recorded, sites_of, size_of, slots_of
from pyseq.surgery._split import Site, Split, find


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
    _refuse(model, pattern)
    _follow.check(optimizer, model, state)
    wanted = _wanted(layers, groups)
    work = model if inplace else copy.deepcopy(model)
    moved: dict[Tensor, Tensor] = dict(zip(model.parameters(), work.parameters(), strict=True))
    calls = None if example is None else {work.get_submodule(name): n for name, n in count_calls(work, example)}
    before = size_of(work)
    with group_a_layer(work):
        done = {place for prefix, site in sites_of(work) for place in absolute(prefix, site)}
        sites = find(work, pattern, calls, done)
        split = Split(work, sites, {module: _labels(work, site, wanted, groups) for module, site in sites.items()})
        if split.edits:
            split.commit()
            changed = [site for module, site in sites.items() if len({*split.labels[module]}) > 1]
            attach(work, [site.name for site in changed if site.per_call])
            note(work, changed, split.shells, before)
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
        for prefix, site in recorded(work):
            slots = slots_of(work, prefix, site)
            for tensors in aligned(site, slots):
                if len({*tensors}) > 1:
                    means.append((tensors[0], _follow.mean(tensors)))
                    families[tensors[0]] = [*tensors]
            places = [f"{prefix}{site.name}"] if site.per_call else absolute(prefix, site)
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


def _refuse(model: Any, pattern: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    each = [pattern] if isinstance(pattern, str) else pattern
    if each is not None and not (isinstance(each, Sequence) and all(isinstance(x, str) for x in each)):
        raise TypeError(f"pattern must be a glob over module paths, or a list of them, got {pattern!r}")
    if each is not None and not each:
        raise ValueError("pattern is an empty list: name what to un-share, or leave it out")


def _wanted(layers: Iterable[int] | None, groups: int | None) -> set[int] | None:
    if layers is None:
        if groups is not None and (not isinstance(groups, int) or groups < 1):
            raise ValueError(f"groups must be at least 1, got {groups!r}")
        return None
    if groups is not None:
        raise ValueError("layers and groups exclude one another: give layers= for some calls, or groups= for all")
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be numbers of calls, such as range(2), got {layers!r}")
    wanted = {index(i) for i in layers}
    if not wanted or min(wanted) < 0:
        raise ValueError(f"layers must be numbers of calls from 0, such as range(2), got {sorted(wanted)}")
    return wanted


def _labels(model: nn.Module, site: Site, layers: set[int] | None, groups: int | None) -> list[int]:
    """Of each place; places with the same one share a copy."""
    if layers is None and groups is None:
        return [*range(len(site.places))]
    numbers, n = numbers_of(model, site)
    if layers is not None:
        if max(layers) >= n:
            raise ValueError(f"layers must be below {n}, the number of calls of {site.name}, got {max(layers)}")
        return [i if i in layers else -1 for i in numbers]
    assert groups is not None
    if groups > n:
        raise ValueError(f"groups must be at most {n}, the number of calls of {site.name}, got {groups}")
    return [group_of(i, n, groups) for i in numbers]


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters()}
