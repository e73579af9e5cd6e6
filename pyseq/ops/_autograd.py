"""What the autograd functions of all rooms ask and refuse."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# whether this backward may run again: then the saved gradient must not get into other hands
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def on_host(x: Tensor) -> bool:
    """Whether Python may look at values."""
    return x.is_cpu and not torch.compiler.is_compiling()


def shared_weight(upstream: Tensor) -> Tensor | float | None:
    """What all gradients are to be multiplied by; None unless the host sees at once that it is one finite number."""
    scalar = upstream.dim() == 0
    if not on_host(upstream):
        return upstream if scalar else upstream[0] if upstream.stride(0) == 0 else None
    if scalar:
        first = upstream.item()
    else:
        alike = upstream.stride(0) == 0 and upstream.numel() > 64
        first, *others = (upstream[:1] if alike else upstream).tolist()  # to compare tensors costs tens of microseconds
        if others.count(first) < len(others):  # .mean() has equal ones
            return None
    weight: float = first
    return weight if math.isfinite(weight) else None  # times the zeros of an infeasible sequence it would be NaN


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its search for torch.func's wrappers, which `refuse_transforms` has seen to: a sixth of
    what a call costs."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch.compiler.is_compiling() else direct(*args)

    return apply


def refuse_transforms(scores: Iterable[Tensor | None]) -> None:
    """Raise where a derivative that an autograd.Function does not carry would be dropped in silence."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func transforms (vmap, grad, jacrev, jvp) do not reach pyseq.ops; use torch.autograd instead"
        )
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in scores
    ):
        raise RuntimeError("forward-mode derivatives do not reach pyseq.ops; use backward() or torch.autograd.grad")


def refuse_batched(upstream: Tensor) -> None:
    """Raise where a batch of gradients would be taken for one."""
    if torch.compiler.is_compiling():
        return
    if _is_batched(upstream) or _is_legacy_batched(upstream):
        raise RuntimeError(
            "batched gradients (is_grads_batched, vectorize=True) do not reach pyseq.ops; take them one at a time"
        )
