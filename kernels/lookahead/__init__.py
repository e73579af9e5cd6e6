"""Kernels of the lookahead room: slow weights move towards fast ones, which are set to them.

Launcher: `update(pairs, alpha)` writes every tensor of both lists; contiguous ones, else nothing is touched.
"""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """Two lists of as many tensors, equal in shape pair by pair."""

    fast: list[Tensor]
    slow: list[Tensor]  # of the dtype of fast, or float32 beside half precision
