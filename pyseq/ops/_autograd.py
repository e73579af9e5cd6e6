"""What the autograd functions of all rooms ask and refuse."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyseq.ops._backend import compiled

# whether this backward may run again: then the saved gradient must not get into other hands
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def shared_weight(upstream: Tensor) -> Tensor | float | None:
    """What all gradients are to be multiplied by; None unless the host sees at once that it is one finite number."""
    eager = upstream.is_cpu and not torch.compiler.is_compiling()
    if eager and forward_ad._current_level < 0:
        weight: float | None = _shared_number(upstream)
        if weight is not None:
            return weight
    refuse_upstream(upstream)  # nothing of the kind reads as a number
    return None if eager else upstream if upstream.dim() == 0 else upstream[0] if upstream.stride(0) == 0 else None


def _shared_number_by_torch(x: Tensor) -> float | None:
    """Finite, for times the zeros of an infeasible sequence another would be NaN."""
    refuse_upstream(x)
    numbers = (x[:1] if x.dim() and x.stride(0) == 0 else x.reshape(-1)).tolist()
    alike = len(numbers) > 0 and numbers.count(numbers[0]) == len(numbers)
    return numbers[0] if alike and math.isfinite(numbers[0]) else None


_shared_number = compiled("shared_number", _shared_number_by_torch)


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its search for torch.func's wrappers, which `refuse_transforms` has seen to: a sixth of
    what a call costs."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch.compiler.is_compiling() else direct(*args)

    return apply


def refuse_transforms(scores: Iterable[Tensor | None]) -> None:
    """Raise, where nothing is traced, when a derivative that an autograd.Function does not carry would be dropped."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func transforms (vmap, grad, jacrev, jvp) do not reach pyseq.ops; use torch.autograd instead"
        )
    _refuse_tangents(scores)


def _refuse_tangents(x: Iterable[Tensor | None]) -> None:
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in x
    ):
        raise RuntimeError("forward-mode derivatives do not reach pyseq.ops; use backward() or torch.autograd.grad")


def refuse_upstream(upstream: Tensor) -> None:
    """Raise where a batch of gradients would be taken for one, or a tangent be dropped."""
    if torch.compiler.is_compiling():
        return
    if _is_batched(upstream) or _is_legacy_batched(upstream):
        raise RuntimeError(
            "batched gradients (is_grads_batched, vectorize=True) do not reach pyseq.ops; take them one at a time"
        )
    _refuse_tangents((upstream,))
