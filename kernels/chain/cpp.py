"""C++ launchers of the chain room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import os
from typing import Any

import torch
from torch import Tensor

from pyseq import _C


def _wanted_level() -> int:
    text = os.environ.get("PYSEQ_CPU_LEVEL") or "0"
    if text not in ("0", "2", "3", "4"):
        raise ValueError(f"PYSEQ_CPU_LEVEL must be 2, 3 or 4, or 0 for the best, got {text!r}")
    return int(text)


LEVEL = _wanted_level()


def crf(*args: Any, paths: Tensor | None = None, level: int = 0) -> int:
    """Value and, where `grads` are given, its gradients; UNFIT for a tensor that the kernel cannot take as it lies.

    args: emissions, transitions, start, end, tags, mask, lengths, weights, kind, reduction, check, value, grads.
    `paths` (B,) int32 takes what served each sequence: 0 the scaled domain in the dtype of the sums, 1 the scaled
    domain in float64, 2 the log domain; plus 4 where the sequence had a vector lane to itself.
    """
    status: int = _C.crf(*args, paths, torch.get_num_threads(), level or LEVEL)
    return status


def viterbi(*args: Any, level: int = 0) -> int:
    """Best scores and paths, or UNFIT.

    args: emissions, transitions, start, end, tags (not read), mask, lengths, check, scores, path.
    """
    status: int = _C.viterbi(*args, torch.get_num_threads(), level or LEVEL)
    return status
