"""C++ launcher of the lookahead room: one pass over all tensors, cut evenly between torch's threads."""

import torch

from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.kernels.lookahead import Pairs

__all__ = ["update"]


def update(pairs: Pairs, alpha: float) -> int:
    status: int = _C.lookahead.update(*pairs, alpha, torch.get_num_threads(), _cpu.LEVEL)
    return status
