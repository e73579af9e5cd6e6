"""Lookahead's slow-weight update, over lists of tensors in one pass."""

from collections.abc import Iterable

from torch import Tensor

from pyseq.kernels.lookahead import Pairs
from pyseq.ops import _lookahead
from pyseq.ops._backend import Backend
from pyseq.ops._lookahead import BACKENDS


@BACKENDS.op
def lookahead_update_(
    fast: Iterable[Tensor], slow: Iterable[Tensor], alpha: float, *, backend: Backend = "auto"
) -> None:
    """Move each slow tensor to slow + alpha (fast - slow), then set its fast tensor to it, both in place.

    fast: tensors of any shapes and strides, float32, float64, bfloat16 or float16, on one device. slow: as many, equal
    in shape, of the dtype of fast, or float32 beside half precision; no two may share memory, which is not checked.
    alpha: a number in [0, 1]; 0 sets fast to slow and 1 slow to fast, bit for bit where fast - slow is finite.
    Computed in the dtype of slow, in float32 where that is half precision, and rounded once to each. Outside of
    autograd, also for tensors that require grad; graphs that saved them raise in backward.
    Raises ValueError for lists of other lengths, shapes or devices, an alpha out of range and a backend that cannot
    serve; TypeError for another dtype or something that is no dense tensor. Nothing is written then.
    Time and traffic: both lists read and written once; memory O(1). Tensors with gaps, or that lie unlike in memory,
    are served by plain torch. Source: Zhang, Lucas, Hinton and Ba 2019, algorithm 1.

    >>> fast, slow = [torch.tensor([8.0, 2.0])], [torch.tensor([0.0, 2.0])]
    >>> ops.lookahead_update_(fast, slow, 0.5)
    >>> fast, slow
    ([tensor([4., 2.])], [tensor([4., 2.])])
    """
    try:
        weight = float(alpha)
    except (TypeError, ValueError):
        raise TypeError(f"alpha must be a number, got {alpha!r}") from None
    if not 0 <= weight <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    _lookahead.update(Pairs(list(fast), list(slow)), weight, backend)
