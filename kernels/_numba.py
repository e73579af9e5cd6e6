"""How the Numba kernels of all rooms are compiled, and sums of rows that share a key."""

import os
from typing import Any

import numpy as np
from numba import njit

JIT: dict[str, Any] = {
    "nogil": True,
    "cache": os.environ.get("PYSEQ_NUMBA_CACHE", "1") == "1",
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},  # keeps -inf and NaN
}
EXACT = {**JIT, "fastmath": {"contract"}}  # sums as they are written
MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, kept in the low bits


@njit(**EXACT)  # reassociation would undo the rounding by MAGIC
def exp(x: Any) -> Any:
    """exp for x in [-700, 700], relative error below 1e-15, and 0 below. Branch-free, so that its loops vectorise."""
    shifted = x * 1.4426950408889634 + MAGIC
    n = shifted - MAGIC
    r = x - n * 0.6931471803691238 - n * 1.9082149292705877e-10
    p = 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 0.0001984126984126984
    p = p * r + 0.001388888888888889
    p = p * r + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    scale = np.int64((np.float64(shifted).view(np.int64) << 52) + 4607182418800017408).view(np.float64)
    return p * scale if x >= -700.0 else (0.0 if x < -700.0 else x)


@njit(**EXACT)
def sorted_by_key(keys: Any, count: int) -> Any:
    """Items in the order of their keys, stable, and where each key's begin (count + 1); of keys in [0, count)."""
    begin = np.zeros(count + 2, np.int64)  # begin[k + 1]: where the next item of key k goes
    for i in range(keys.shape[0]):
        if 0 <= keys[i] < count:
            begin[keys[i] + 2] += 1
    for k in range(count):
        begin[k + 2] += begin[k + 1]
    order = np.empty(begin[count + 1], np.int64)
    for i in range(keys.shape[0]):
        k = keys[i]
        if 0 <= k < count:
            order[begin[k + 1]] = i
            begin[k + 1] += 1
    return order, begin[: count + 1]


@njit(**EXACT)
def sum_segments(order: Any, begin: Any, rows: Any, chunk: int, sums: Any) -> None:
    """sums (keys, D) of rows (items, D): in float64 by chunks of a key's items, then the chunks in order."""
    dim = rows.shape[1]
    total, part = np.empty(dim), np.empty(dim)
    for k in range(sums.shape[0]):
        total[:] = 0.0
        for at in range(begin[k], begin[k + 1], chunk):
            part[:] = 0.0
            for i in range(at, min(at + chunk, begin[k + 1])):
                row = rows[order[i]]
                for d in range(dim):
                    part[d] += np.float64(row[d])
            for d in range(dim):
                total[d] += part[d]
        for d in range(dim):
            sums[k, d] = total[d]
