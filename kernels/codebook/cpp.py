"""C++ launcher of the codebook room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import torch
from torch import Tensor

from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.kernels.codebook import Search

__all__ = ["nearest"]


def nearest(search: Search, cosine: bool, indices: Tensor, distance: Tensor) -> int:
    status: int = _C.codebook.nearest(*search, cosine, indices, distance, torch.get_num_threads(), _cpu.LEVEL)
    return status
