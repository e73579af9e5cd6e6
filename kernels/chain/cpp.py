"""C++ launchers of the chain room: SIMD by run-time dispatch, OpenMP with torch's thread count."""

import torch
from torch import Tensor

from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.kernels.chain import Chain, Gradients, LabelledPath, LocalSteps, Sampling, Unadjusted

__all__ = ["adjust", "crf", "entropy", "local_steps", "n_best", "neighbours", "sample", "viterbi"]


def crf(
    chain: Chain,
    kind: int,
    reduction: str,
    check: bool,
    value: Tensor,
    grads: Gradients | None,
    paths: Tensor | None = None,
) -> int:
    """paths: 0 the scaled domain in the dtype of the sums, 1 in float64, 2 the log domain; plus 4 where the sequence
    had a vector lane to itself."""
    outputs = value, *(grads or (None,) * 4), paths
    status: int = _C.chain.crf(*chain, kind, reduction, check, *outputs, torch.get_num_threads(), _cpu.LEVEL)
    return status


def viterbi(chain: Chain, check: bool, scores: Tensor, path: Tensor) -> int:
    status: int = _C.chain.viterbi(*chain, check, scores, path, torch.get_num_threads(), _cpu.LEVEL)
    return status


def adjust(model: Unadjusted, forward: bool, backward: bool, factor: float, out: Tensor) -> int:
    status: int = _C.chain.adjust(*model, forward, backward, factor, out, torch.get_num_threads(), _cpu.LEVEL)
    return status


def neighbours(path: LabelledPath, num_tags: int, label: Tensor, before: Tensor, after: Tensor) -> int:
    status: int = _C.chain.neighbours(*path, num_tags, label, before, after)
    return status


def n_best(chain: Chain, check: bool, scores: Tensor, paths: Tensor) -> int:
    status: int = _C.chain.n_best(*chain, check, scores, paths, torch.get_num_threads(), _cpu.LEVEL)
    return status


def sample(chain: Sampling, check: bool, paths: Tensor) -> int:
    status: int = _C.chain.sample(*chain, check, paths, torch.get_num_threads(), _cpu.LEVEL)
    return status


def entropy(chain: Chain, check: bool, value: Tensor, grads: Gradients | None) -> int:
    outputs = value, *(grads or (None,) * 4)
    status: int = _C.chain.entropy(*chain, check, *outputs, torch.get_num_threads(), _cpu.LEVEL)
    return status


def local_steps(
    steps: LocalSteps,
    factor: float,
    smoothing: float,
    accumulate: bool,
    loss: Tensor,
    grad: Tensor | None,
    grad_bias: Tensor | None,
) -> int:
    options = factor, smoothing, accumulate, loss, grad, grad_bias
    status: int = _C.chain.local_steps(*steps, *options, torch.get_num_threads(), _cpu.LEVEL)
    return status
