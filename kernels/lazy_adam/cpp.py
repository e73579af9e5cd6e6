"""C++ launcher of the lazy_adam room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import torch

from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.kernels.lazy_adam import Tables

__all__ = ["update"]


def update(tables: Tables, decay: bool, row_bias: bool, maximize: bool, dense: bool) -> int:
    threads = torch.get_num_threads()
    status: int = _C.lazy_adam.update(*tables, decay, row_bias, maximize, dense, threads, _cpu.LEVEL)
    return status
