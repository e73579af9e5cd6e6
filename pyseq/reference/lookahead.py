"""Lookahead's slow-weight update in plain torch: the oracle of every kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def lookahead_update_(fast: Iterable[Tensor], slow: Iterable[Tensor], alpha: float) -> None:
    """slow := slow + alpha (fast - slow) in the dtype of slow, then fast := slow; exact at alpha 0 and 1.

    fast, slow: tensors of equal shapes, pair by pair. Source: Zhang, Lucas, Hinton and Ba 2019, algorithm 1.
    """
    for x, y in zip(fast, slow, strict=True):
        y.lerp_(x.to(y.dtype), alpha)
        x.copy_(y)
