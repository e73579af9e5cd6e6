"""C++ launchers of the chain room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import os

import torch
from torch import Tensor

from pyseq import _C

_CRF = {torch.float32: _C.crf_float, torch.float64: _C.crf_double}
_VITERBI = {torch.float32: _C.viterbi_float, torch.float64: _C.viterbi_double}
_REDUCTION = {"none": 0, "sum": 1, "mean": 2}


def _wanted_level() -> int:
    text = os.environ.get("PYSEQ_CPU_LEVEL", "0")
    if text not in ("0", "2", "3", "4"):
        raise ValueError(f"PYSEQ_CPU_LEVEL must be 2, 3 or 4, or 0 for the best, got {text!r}")
    return int(text)


LEVEL = _wanted_level()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def crf(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    tags: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor | None,
    kind: int,
    reduction: str,
    check: bool,
    value: Tensor,
    grads: list[Tensor] | None,
    paths: Tensor | None = None,
    level: int = 0,
) -> int:
    """Value and, where `grads` are given, its gradients.

    `paths` (B,) int32 takes what served each sequence: 0 the scaled domain in the dtype of the sums, 1 the scaled
    domain in float64, 2 the log domain; plus 4 where the sequence had a vector lane to itself.
    """
    g_em, *g_rest = grads or (None,) * 4
    stride_batch, stride_time, _ = emissions.stride()
    grad_stride_batch, grad_stride_time, _ = (0, 0, 0) if g_em is None else g_em.stride()
    status: int = _CRF[transitions.dtype](
        emissions.data_ptr(),
        stride_batch,
        stride_time,
        *emissions.shape,
        transitions.data_ptr(),
        _address(start),
        _address(end),
        _address(tags),
        _address(mask),
        _address(lengths),
        _address(weights),
        kind,
        _REDUCTION[reduction],
        check,
        value.data_ptr(),
        _address(g_em),
        grad_stride_batch,
        grad_stride_time,
        *map(_address, g_rest),
        _address(paths),
        torch.get_num_threads(),
        level or LEVEL,
    )
    return status


def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    tags: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    check: bool,
    scores: Tensor,
    path: Tensor,
    level: int = 0,
) -> int:
    """Best scores and paths; `tags` is not read."""
    status: int = _VITERBI[transitions.dtype](
        emissions.data_ptr(),
        emissions.stride(0),
        emissions.stride(1),
        *emissions.shape,
        transitions.data_ptr(),
        _address(start),
        _address(end),
        _address(mask),
        _address(lengths),
        check,
        scores.data_ptr(),
        path.data_ptr(),
        torch.get_num_threads(),
        level or LEVEL,
    )
    return status
