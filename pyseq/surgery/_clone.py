"""Copies of a model that keep what is shared inside."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Model = TypeVar("Model", bound=nn.Module)


def clone(model: Model, copy_weights: bool = True) -> Model:
    """A copy of a model that shares no memory with it, with all sharing inside as it is.

    Modules under several names, tied parameters, and parameters, buffers and tensor attributes that are views of one
    memory stay so; requires_grad, training flags, dtype, device and hooks are kept; gradients are not.
    copy_weights: whether the copy has the model's numbers. If not, each module draws its own afresh, inner modules
    first, by `reset_parameters` or `_reset_parameters`, and by the `_init_weights` of the Hugging Face model around it;
    running statistics begin anew. Of the owners of a tied parameter the first has the last word.

    Raises ValueError, with the modules' names, where parameters are not drawn by any of these.
    Source: https://kexue.fm/archives/6985, where a clone is structure alone and copying weights a second step.

    >>> model = torch.nn.Linear(2, 3)
    >>> [torch.equal(clone(model, copy_weights).weight, model.weight) for copy_weights in (True, False)]
    [True, False]
    """
    copied = copy.deepcopy(model, _views(model))
    if not copy_weights:
        _draw(copied)
    return copied


def _views(model: nn.Module) -> dict[int, Any]:
    """deepcopy's memo with copies of the tensors that share memory: it copies a parameter apart from its views."""
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in _tensors(model):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_leaf
        if plain and (address := tensor.untyped_storage().data_ptr()):
            groups.setdefault(address, {})[id(tensor)] = tensor
    memo: dict[int, Any] = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        storage = next(iter(group.values())).untyped_storage().clone()
        for key, tensor in group.items():
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
            if isinstance(tensor, nn.Parameter):
                memo[key] = nn.Parameter(view, tensor.requires_grad)
            else:
                memo[key] = view.requires_grad_(tensor.requires_grad)
    return memo


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from chain(model.parameters(), model.buffers())
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Draw all parameters; NaN shows which were not."""
    drawn = [p for p in model.parameters() if not is_lazy(p) and (p.is_floating_point() or p.is_complex())]
    for p in drawn:
        p.fill_(torch.nan)
    modules = dict(model.named_modules())
    for name, module in reversed(modules.items()):
        for method in ("reset_parameters", "_reset_parameters", "reset_running_stats"):
            if callable(reset := getattr(module, method, None)):
                reset()
                break
        parts = name.split(".") if name else []
        for i in range(len(parts), -1, -1):
            if callable(initialize := getattr(modules.get(".".join(parts[:i])), "_init_weights", None)):
                initialize(module)
                break
    missed = {id(p) for p in drawn if not p.is_meta and p.isnan().any()}
    owners = [
        f"{name or 'the model'} ({type(module).__name__}: {', '.join(left)})"
        for name, module in modules.items()
        if (left := [key for key, p in module.named_parameters(recurse=False) if id(p) in missed])
    ]
    if owners:
        raise ValueError(
            f"no fresh weights for {'; '.join(owners)}: give each a reset_parameters() that draws all its own"
            " parameters, or use copy_weights=True"
        )
