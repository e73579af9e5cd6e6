"""Numba launchers of the codebook room: serial; a search takes four rows at a time against panels of codes."""

import math

import numpy as np
from numba import njit
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels._numba import EXACT, sorted_by_key, sum_segments
from pyseq.kernels.codebook import BAD_INDEX, CHUNK, PARALLEL, Chosen, Pull, Search

__all__ = ["gradient", "nearest", "statistics"]
_LANES = 64  # codes of a panel
_ROWS = 4
_INF = np.inf


@njit(**EXACT)
def _finite(x):
    total = x.dtype.type(0)
    for d in range(x.shape[0]):
        total += x[d] * x.dtype.type(0)
    return total == 0


@njit(**EXACT)
def _dot(x, y):
    total = 0.0
    for d in range(x.shape[0]):
        total += np.float64(x[d]) * np.float64(y[d])
    return total


@njit(**EXACT)
def _between(x, code, cosine):
    """Cosine, or squared distance, in float64."""
    if cosine:
        lengths = math.sqrt(_dot(x, x)) * math.sqrt(_dot(code, code))
        return _dot(x, code) / lengths if lengths > 0.0 else 0.0
    total = 0.0
    for d in range(x.shape[0]):
        total += (np.float64(x[d]) - np.float64(code[d])) ** 2
    return total


@njit(**EXACT)
def _pack(codes, cosine, usable, center, panels, bias):
    """Codes less the center in panels, and half their squared length; infinity for those that never win."""
    count, dim = codes.shape
    wide, any_ = np.zeros(dim), 0
    for k in range(count):
        usable[k] = _finite(codes[k])
        any_ += usable[k]
        for d in range(dim):
            wide[d] += np.float64(codes[k, d]) if usable[k] and not cosine else 0.0
    for d in range(dim):
        center[d] = wide[d] / max(any_, 1)
    panels[:] = 0
    bias[:] = _INF
    for k in range(count):
        if usable[k]:
            p, lane = k // _LANES, k % _LANES
            length = math.sqrt(_dot(codes[k], codes[k])) if cosine else 1.0
            scale = codes.dtype.type(1.0 / length if length > 0.0 else 1.0)
            half = 0.0
            for d in range(dim):
                moved = (codes[k, d] - center[d]) * scale
                panels[p, d, lane] = moved
                half += np.float64(moved) * np.float64(moved) / 2
            bias[p, lane] = 0.0 if cosine else half
    return any_ > 0


@njit(**EXACT)
def _slowly(x, codes, usable, cosine):
    """In float64, for a finite row whose scores are too large."""
    least, found = _INF, -1
    for k in range(codes.shape[0]):
        if usable[k]:
            value = _between(x, codes[k], cosine)
            value = -value if cosine else value
            if value < least or found < 0:
                least, found = value, k
    return found


@njit(**EXACT)
def _head(x, codes, mask, cosine, by_cosine, indices, distance, quantized):
    """x: (N, D), codes: (K, D)."""
    rows, dim = x.shape
    count = codes.shape[0]
    dtype = codes.dtype
    usable, center = np.zeros(count, np.bool_), np.zeros(dim, dtype)
    panels = np.empty(((count + _LANES - 1) // _LANES, dim, _LANES), dtype)
    bias = np.empty((panels.shape[0], _LANES), dtype)
    any_ = _pack(codes, cosine, usable, center, panels, bias)
    moved, scores = np.zeros((_ROWS, dim), dtype), np.empty((_ROWS, _LANES), dtype)
    best, found, good = np.empty(_ROWS, dtype), np.empty(_ROWS, np.int64), np.empty(_ROWS, np.bool_)
    for begin in range(0, rows, _ROWS):
        here = min(_ROWS, rows - begin)
        for r in range(_ROWS):
            n = min(begin + r, rows - 1)
            good[r] = any_ and (mask.shape[0] == 0 or mask[n]) and _finite(x[n])
            best[r], found[r] = _INF, -1
            for d in range(dim):
                moved[r, d] = x[n, d] - center[d] if good[r] else dtype.type(0)
        s0, s1, s2, s3 = scores[0], scores[1], scores[2], scores[3]
        for p in range(panels.shape[0]):
            for j in range(_LANES):
                s0[j] = s1[j] = s2[j] = s3[j] = bias[p, j]
            for d in range(dim):
                panel = panels[p, d]
                x0, x1, x2, x3 = moved[0, d], moved[1, d], moved[2, d], moved[3, d]
                for j in range(_LANES):
                    c = panel[j]
                    s0[j] -= x0 * c
                    s1[j] -= x1 * c
                    s2[j] -= x2 * c
                    s3[j] -= x3 * c
            for r in range(here):
                row, least = scores[r], best[r]
                for j in range(_LANES):
                    least = min(least, row[j])
                if least < best[r]:  # the first lane that has it is the lowest code
                    j = 0
                    while row[j] != least:
                        j += 1
                    best[r], found[r] = least, p * _LANES + j
        for r in range(here):
            n = begin + r
            if not good[r]:
                indices[n], distance[n] = -1, np.nan
                if quantized.shape[0] > 0:
                    quantized[n] = 0
                continue
            k = found[r] if found[r] >= 0 and abs(best[r]) < _INF else _slowly(x[n], codes, usable, cosine)
            indices[n], distance[n] = k, _between(x[n], codes[k], by_cosine)
            if quantized.shape[0] > 0:
                quantized[n] = codes[k]


@njit(**EXACT)
def _total(indices, distance):
    total = 0.0
    for i in range(indices.shape[0]):
        total += np.float64(distance[i]) if indices[i] >= 0 else 0.0
    return total


_ALL = np.empty(0, np.bool_)


def nearest(
    search: Search, cosine: bool, indices: Tensor, distance: Tensor, quantized: Tensor | None, total: Tensor | None
) -> int:
    x, codes = search.x.numpy(), search.codebook.numpy()
    mask = _ALL if search.mask is None else search.mask.numpy()
    out = x[:0] if quantized is None else quantized.numpy()
    for h in range(codes.shape[0]):
        found = indices.numpy()[:, h], distance.numpy()[:, h], out[:, h]
        _head(x[:, h], codes[h], mask, cosine, cosine and total is None, *found)
    if total is not None:
        total.fill_(_total(indices.numpy().reshape(-1), distance.numpy().reshape(-1)))
    return OK


@njit(**EXACT)
def _keys(indices, count, keys):
    sound = True
    for n in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            k = indices[n, h]
            sound &= -1 <= k < count
            keys[n * indices.shape[1] + h] = h * count + k if 0 <= k < count else -1
    return sound


def statistics(chosen: Chosen, counts: Tensor, sums: Tensor | None) -> int:
    heads, count = counts.shape
    keys = np.empty(chosen.indices.numel(), np.int64)
    sound = _keys(chosen.indices.numpy(), count, keys)
    order, begin = sorted_by_key(keys, heads * count)
    counts.numpy()[:] = np.diff(begin).reshape(heads, count)
    if sums is not None:
        dim = chosen.x.size(2)
        rows = chosen.x.numpy().reshape(len(keys), dim)
        sum_segments(order, begin, rows, CHUNK, sums.numpy().reshape(heads * count, dim))
    return OK if sound else BAD_INDEX


@njit(**EXACT)
def _gradient(x, codes, indices, scale, upstream, rotation, out):
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            k = indices[n, h]
            if not 0 <= k < codes.shape[1]:
                out[n, h] = 0
                continue
            row, code, to = x[n, h], codes[h, k], out[n, h]
            for d in range(row.shape[0]):
                to[d] = scale * (row[d] - code[d])
            if upstream.shape[0] == 0:
                continue
            up, all_, of_row, of_code = upstream[n, h], 1.0, 0.0, 0.0
            if rotation:
                xx, cc = _dot(row, row), _dot(code, code)
                lengths = math.sqrt(xx) * math.sqrt(cc)
                apart = 2 + 2 * _dot(row, code) / lengths if lengths > 0.0 else 0.0
                if apart > PARALLEL:  # see the C++
                    e, q = 1 / math.sqrt(xx), 1 / math.sqrt(cc)
                    ratio, eg, qg = e / q, e * _dot(row, up), q * _dot(code, up)
                    both = 2 * (eg + qg) / apart
                    all_, of_row, of_code = ratio, ratio * e * (2 * qg - both), -ratio * q * both
            if all_ == 1.0 and of_row == 0.0 and of_code == 0.0:
                for d in range(row.shape[0]):
                    to[d] += up[d]
            else:
                a, b, c = x.dtype.type(all_), x.dtype.type(of_row), x.dtype.type(of_code)
                for d in range(row.shape[0]):
                    to[d] += a * up[d] + b * row[d] + c * code[d]


def gradient(pull: Pull, rotation: bool, gradient: Tensor) -> int:
    x, codes, indices = pull.x.numpy(), pull.codebook.numpy(), pull.indices.numpy()
    upstream = x[:0] if pull.upstream is None else pull.upstream.numpy()
    _gradient(x, codes, indices, pull.scale.numpy()[0], upstream, rotation, gradient.numpy())
    return OK
