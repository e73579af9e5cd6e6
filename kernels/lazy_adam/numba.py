"""Numba launcher of the lazy_adam room: serial; rows are sorted, then each is updated in one pass."""

import functools
import math

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pyseq.kernels import OK, UNFIT
from pyseq.kernels._numba import EXACT, sum_segments
from pyseq.kernels.lazy_adam import BAD_ROW, CHUNK, Tables

__all__ = ["update"]
_DIGIT = 11  # bits of a row's number that are sorted at once
_AHEAD = 16  # rows ahead that are fetched


@intrinsic
def _fetch(_, array, i, d):
    """Ask for the cache line of array[i, d]."""

    def code(context, builder, signature, args):
        kind, given = signature.args[0], context.make_array(signature.args[0])(context, builder, args[0])
        at = cgutils.get_item_pointer(context, builder, kind, given, args[1:])
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        prefetch = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        known = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")
        builder.call(known, [builder.bitcast(at, byte), word(0), word(2), word(1)])

    return types.void(array, types.intp, types.intp), code


@njit(**EXACT)
def _sorted(indices, rows):
    """Whether all indices are rows; rows seen in order, positions of their gradients, where each row's begin."""
    count, low = indices.shape[0], 1  # low: bits of a key that hold the position
    while count >> low:
        low += 1
    keys, other = np.empty(count, np.int64), np.empty(count, np.int64)
    sound, most = True, 0
    for i in range(count):
        sound &= 0 <= indices[i] < rows
        most = max(most, indices[i])
        keys[i] = indices[i] << low | i
    ids, begin = np.empty(count, np.int64), np.empty(count + 1, np.int64)
    if not sound:
        return sound, ids, keys, begin
    starts, shift, mask = np.empty((1 << _DIGIT) + 1, np.int64), low, (1 << _DIGIT) - 1
    while most >> (shift - low):
        starts[:] = 0
        for i in range(count):
            starts[(keys[i] >> shift & mask) + 1] += 1
        starts[:] = np.cumsum(starts)
        for i in range(count):
            digit = keys[i] >> shift & mask
            other[starts[digit]] = keys[i]
            starts[digit] += 1
        keys, other = other, keys
        shift += _DIGIT
    seen = 0
    for i in range(count):
        row = keys[i] >> low
        keys[i] &= (1 << low) - 1
        if seen == 0 or row != ids[seen - 1]:
            ids[seen], begin[seen] = row, i
            seen += 1
    begin[seen] = count
    return sound, ids[:seen], keys, begin[: seen + 1]


@njit(**EXACT)
def _any(values):
    """The same of dense gradients: rows with an element that is not zero."""
    ids, seen = np.empty(values.shape[0], np.int64), 0
    for i in range(values.shape[0]):
        row, any_ = values[i], False
        for d in range(row.shape[0]):
            any_ |= row[d] != 0
        ids[seen] = i
        seen += any_
    return True, ids[:seen], ids[:seen], np.arange(seen + 1)


@njit(**EXACT)
def _power(powers, beta, n):
    return powers[n] if n < powers.shape[0] else math.pow(beta, n)


@njit(**EXACT)
def _update(
    param, exp_avg, exp_avg_sq, max_exp_avg_sq, last, touches, ids, order, begin, values, step, hyper, powers1, powers2,
    decay, row_bias, maximize
):  # fmt: skip
    """max_exp_avg_sq, last and touches may be empty."""
    T, dim = param.dtype.type, param.shape[1]
    lr, beta1, beta2, eps, weight_decay = hyper
    sign, inf = T(-1 if maximize else 1), T(np.inf)
    take1, take2, keep, small = sign * T(1 - beta1), T(1 - beta2), T(1 - lr * weight_decay), T(eps)
    fade1, fade2, rate, root, since_before, age_before = T(0), T(0), T(0), T(0), -1, -1
    sums, line = np.empty((1, dim), param.dtype), 64 // param.itemsize
    for s in range(ids.shape[0]):
        if s + _AHEAD < ids.shape[0]:
            i, at = ids[s + _AHEAD], order[begin[s + _AHEAD]]
            for d in range(0, min(dim, 8 * line), line):
                _fetch(param, i, d)
                _fetch(exp_avg, i, d)
                _fetch(exp_avg_sq, i, d)
                _fetch(values, at, d)
        i = ids[s]
        if begin[s + 1] - begin[s] == 1:
            g = values[order[begin[s]]]
        else:
            sum_segments(order, begin[s : s + 2], values, CHUNK, sums)
            g = sums[0]
        good = True
        for d in range(dim):
            good &= abs(g[d]) < inf
        if not good:
            continue
        since, age = step - last[i] if decay else 1, touches[i] + 1 if row_bias else step
        if since != since_before:
            fade1, fade2, since_before = T(_power(powers1, beta1, since)), T(_power(powers2, beta2, since)), since
        if age != age_before:
            rate, age_before = T(lr / (1 - _power(powers1, beta1, age))), age
            root = T(1 / math.sqrt(1 - _power(powers2, beta2, age)))
        w, m, v = param[i], exp_avg[i], exp_avg_sq[i]
        if max_exp_avg_sq.shape[0] > 0:
            most = max_exp_avg_sq[i]
            for d in range(dim):
                m[d] = fade1 * m[d] + take1 * g[d]
                v[d] = fade2 * v[d] + take2 * (g[d] * g[d])
                most[d] = most[d] if most[d] > v[d] else v[d]
                w[d] = w[d] * keep - rate * m[d] / (math.sqrt(most[d]) * root + small)
        else:
            for d in range(dim):
                m[d] = fade1 * m[d] + take1 * g[d]
                v[d] = fade2 * v[d] + take2 * (g[d] * g[d])
                w[d] = w[d] * keep - rate * m[d] / (math.sqrt(v[d]) * root + small)
        if last.shape[0] > 0:
            last[i] = step
        if touches.shape[0] > 0:
            touches[i] += 1


@functools.lru_cache(16)
def _powers(beta: float) -> np.ndarray:
    return beta ** np.arange(4096.0)


def update(tables: Tables, decay: bool, row_bias: bool, maximize: bool, dense: bool) -> int:
    lists, hyper = [[x.detach() for x in each] for each in tables[:-1]], tuple(tables.hyper.tolist())
    if not all(x.is_contiguous() for each in lists for x in each):
        return UNFIT
    params, exp_avg, exp_avg_sq, most, last, touches, indices, values, steps, _ = lists
    seen = []
    for k, param in enumerate(params):
        found = _any(values[k].numpy()) if dense else _sorted(indices[k].numpy(), param.size(0))
        if not found[0]:
            return BAD_ROW
        seen.append(found[1:])
    none = [torch.empty(0, dtype=torch.int32)] * len(params)
    most, last, touches = most or [x[:0] for x in params], last or none, touches or none
    options = hyper, _powers(hyper[1]), _powers(hyper[2]), decay, row_bias, maximize
    for k, table in enumerate(zip(params, exp_avg, exp_avg_sq, most, last, touches, strict=True)):
        _update(*(x.numpy() for x in table), *seen[k], values[k].numpy(), int(steps[k].item()), *options)
    return OK
