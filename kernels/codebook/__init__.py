"""Kernels of the codebook room: the nearest code to each row, without a matrix of rows by codes.

Launcher: `nearest(search, cosine, indices, distance)` fills both, (N, H): int64, and float64 for float64 rows, else
float32.
"""

from typing import NamedTuple

from torch import Tensor


class Search(NamedTuple):
    """The tensors of a search, in heads that know nothing of one another."""

    x: Tensor  # (N, H, D)
    codebook: Tensor  # (H, K, D)
    mask: Tensor | None = None  # (N,) bool
