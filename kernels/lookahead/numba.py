"""Numba launcher of the lookahead room: serial, one pass a tensor."""

from numba import njit

from pyseq.kernels import OK, UNFIT
from pyseq.kernels._numba import EXACT
from pyseq.kernels.lookahead import Pairs

__all__ = ["update"]


@njit(**EXACT)
def _update(fast, slow, alpha, rest, near_slow):
    """near_slow: the interpolation starts at slow, else at fast, so that it is exact at either end."""
    for i in range(fast.shape[0]):
        x, y = fast[i], slow[i]
        y = y + alpha * (x - y) if near_slow else x - (x - y) * rest
        slow[i] = y
        fast[i] = y


def update(pairs: Pairs, alpha: float) -> int:
    if not all(x.is_contiguous() for each in pairs for x in each):
        return UNFIT
    for fast, slow in zip(*pairs, strict=True):
        x, y = (z.detach().view(-1).numpy() for z in (fast, slow))
        _update(x, y, x.dtype.type(alpha), x.dtype.type(1 - alpha), alpha < 0.5)
    return OK
