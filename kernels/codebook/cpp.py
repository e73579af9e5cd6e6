"""C++ launchers of the codebook room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import torch
from torch import Tensor

from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.kernels.codebook import Chosen, Pull, Search

__all__ = ["gradient", "nearest", "statistics"]


def nearest(
    search: Search, cosine: bool, indices: Tensor, distance: Tensor, quantized: Tensor | None, total: Tensor | None
) -> int:
    outputs = indices, distance, quantized, total
    status: int = _C.codebook.nearest(*search, cosine, *outputs, torch.get_num_threads(), _cpu.LEVEL)
    return status


def statistics(chosen: Chosen, counts: Tensor, sums: Tensor | None) -> int:
    status: int = _C.codebook.statistics(*chosen, counts, sums, torch.get_num_threads())
    return status


def gradient(pull: Pull, rotation: bool, gradient: Tensor) -> int:
    status: int = _C.codebook.gradient(*pull, rotation, gradient, torch.get_num_threads(), _cpu.LEVEL)
    return status
