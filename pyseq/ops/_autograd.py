"""What the gradients of all rooms ask and refuse."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from pyseq.ops import _torch


def shared_weight(upstream: Tensor) -> Tensor | float | None:
    """What all gradients of a vector (or scalar) are to be multiplied by; None unless the host sees at once that it is
    one number, and where it may read it a finite one: times the zeros of an infeasible row another would be NaN."""
    scalar = upstream.dim() == 0
    if not upstream.is_cpu or type(upstream) is not Tensor or _torch.traced():
        return upstream if scalar else upstream[0] if len(upstream) and upstream.stride(0) == 0 else None
    try:
        numbers = [upstream.item()] if scalar else (upstream[:1] if upstream.stride(0) == 0 else upstream).tolist()
    except RuntimeError:  # symbolic zeros have nothing to read
        return None
    alike = len(numbers) > 0 and numbers.count(numbers[0]) == len(numbers)
    return numbers[0] if alike and math.isfinite(numbers[0]) else None


def refuse_transforms() -> None:
    if _torch.transforms_active():
        raise RuntimeError(
            "torch.func transforms (vmap, grad, jacrev, jvp) do not reach pyseq.ops; use torch.autograd instead"
        )


def refuse_upstream(upstream: Iterable[Tensor | None]) -> None:
    """Raise where a batch of gradients would be taken for one, or a tangent be dropped."""
    if torch.compiler.is_compiling():
        return
    for x in upstream:
        if x is not None and _torch.is_batched(x):
            raise RuntimeError(
                "batched gradients (is_grads_batched, vectorize=True) do not reach pyseq.ops; take them one at a time"
            )
    refuse_tangents(upstream)


def refuse_tangents(inputs: Iterable[Any]) -> None:
    """Raise where a forward-mode derivative would be dropped."""
    for x in inputs:
        if isinstance(x, Tensor):
            primal, tangent = unpack_dual(x)
            if tangent is not None:
                raise RuntimeError(
                    "forward-mode derivatives do not reach pyseq.ops; use backward() or torch.autograd.grad"
                )
            if primal is x:  # outside every dual level; inside one it is a view
                return
