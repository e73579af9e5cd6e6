"""Kernels of the codebook room: the nearest code to each row, statistics of codes, gradients of rows.

A row is one head's part of a vector, and heads know nothing of one another. Launchers fill their outputs:
`nearest(search, cosine, indices, distance, quantized, total)`: (N, H) int64 and float; if not None the code of each
row (N, H, D), zeros where there is none, and the sum of distances (1,) float64, which then are squared distances also
where rows are compared by their cosine;
`statistics(chosen, counts, sums)`: of each code how many rows chose it (H, K) int64, and unless None their sum
(H, K, D); `gradient(pull, rotation, gradient)`: (N, H, D). Floats are float64 beside float64 rows, else float32.
"""

from typing import NamedTuple

from torch import Tensor

BAD_INDEX = 1  # an index below -1 or no code's: counted nowhere
CHUNK = 512  # rows of a code that are added up together, in float64; then chunks, in order
PARALLEL = 1e-6  # squared length of the sum of two unit vectors: below it they are opposite, and nothing is rotated


class Search(NamedTuple):
    """The tensors of a search."""

    x: Tensor  # (N, H, D)
    codebook: Tensor  # (H, K, D)
    mask: Tensor | None = None  # (N,) bool


class Chosen(NamedTuple):
    """Rows and the code that each has chosen."""

    x: Tensor  # (N, H, D)
    indices: Tensor  # (N, H) int64, -1: none


class Pull(NamedTuple):
    """What pulls at rows: the upstream gradient of their codes, and `scale` times their distance from them."""

    x: Tensor  # (N, H, D)
    codebook: Tensor  # (H, K, D)
    indices: Tensor  # (N, H) int64
    scale: Tensor  # (1,)
    upstream: Tensor | None = None  # (N, H, D)
