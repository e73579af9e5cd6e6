"""Optimizers that follow a model whose parameters were copied, or whose copies were joined."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

FIRST = {"exp_avg", "momentum_buffer", "grad_avg", "exp_inf"}  # proportional to the gradient
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}  # to its square
STATES = ("copy", "scale", "reset")


def check(optimizer: Optimizer | None, model: nn.Module, state: str = "copy") -> None:
    """Raise TypeError or ValueError for what cannot follow, before anything changes."""
    if state not in STATES:
        raise ValueError(f"state must be 'copy', 'scale' or 'reset', got {state!r}")
    if optimizer is None:
        return
    got = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {got}")
    if isinstance(vars(optimizer).get("optimizer"), Optimizer):
        raise TypeError(f"{got} wraps another optimizer: give that one, {got}.optimizer, and wrap it again afterwards")
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS keeps one state for all parameters, which no copy can have: make a new one afterwards")
    params = {*model.parameters()}
    if params.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{got} drives none of the model's parameters: give the one that was made for this model")
    if state == "scale":
        names = {k for p in params & {*optimizer.state} for k, x in optimizer.state[p].items() if _like(x, p)}
        if unknown := sorted(names - FIRST - SECOND):
            raise ValueError(f"state='scale' knows no rule for {', '.join(unknown)} of {got}: take 'copy' or 'reset'")


def move(optimizer: Optimizer, moved: Mapping[Tensor, Tensor]) -> None:
    """Drive the new parameters instead of the old ones."""
    for group in optimizer.param_groups:
        group["params"] = [moved.get(p, p) for p in group["params"]]
    for old, new in moved.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


def spread(
    optimizer: Optimizer,
    families: Mapping[Tensor, Sequence[tuple[Tensor, float]]],
    state: str,
    names: Mapping[Tensor, str],
) -> None:
    """Families of copies in the place of their originals. Each copy comes with its share of the former calls.

    "scale" gives a copy the moments that it would have had if each call had made the same gradient: first moments
    times its share, second moments times the share squared.
    """
    for group in optimizer.param_groups:
        _regroup(group, [[q for q, _ in families.get(p, [(p, 1.0)])] for p in group["params"]], names)
    for p, family in families.items():
        entries = optimizer.state.pop(p, None)
        if entries and state != "reset":
            for q, share in family:
                scale = share if state == "scale" else 1.0
                optimizer.state[q] = {name: _part(name, x, scale) for name, x in entries.items()}


def gather(optimizer: Optimizer, families: Mapping[Tensor, Sequence[Tensor]], names: Mapping[Tensor, str]) -> None:
    """Of each family only the first stays, with the mean of the state, if every copy has one; else without."""
    dropped = {q for p, family in families.items() for q in family if q is not p}
    for group in optimizer.param_groups:
        _regroup(group, [[p] * (p not in dropped) for p in group["params"]], names)
    for family in families.values():
        states = [optimizer.state.get(q) for q in family]
        for q in family:
            optimizer.state.pop(q, None)
        if all(states):
            optimizer.state[family[0]] = {name: _joined([s[name] for s in states]) for name in states[0]}  # type: ignore


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """w0 + mean(w_i - w0), in float32 or wider: exact where all are equal. The first, if they are no floats."""
    w = tensors[0].detach()
    if not (w.is_floating_point() or w.is_complex()):
        return w.clone()
    first, total = (x := w.to(torch.promote_types(w.dtype, torch.float32))), torch.zeros_like(x)
    for other in tensors[1:]:
        total += other.detach().to(first.dtype) - first
    return (first + total / len(tensors)).to(w.dtype)


def _regroup(group: dict[str, Any], families: list[list[Tensor]], names: Mapping[Tensor, str]) -> None:
    if "param_names" in group:
        old = zip(group["param_names"], families, strict=True)
        group["param_names"] = [names.get(q, name) for name, family in old for q in family]
    group["params"] = [q for family in families for q in family]


def _like(x: Any, p: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape == p.shape


def _part(name: str, x: Any, share: float) -> Any:
    if not isinstance(x, Tensor):
        return deepcopy(x)
    return x * share ** (1 if name in FIRST else 2) if name in FIRST | SECOND and share != 1 else x.clone()


def _joined(entries: list[Any]) -> Any:
    return mean(entries) if isinstance(entries[0], Tensor) else entries[0]
