"""Triton launchers of the lazy_adam room: a program a row seen; nothing is read back by the host."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyseq.kernels import OK, UNFIT
from pyseq.kernels.lazy_adam import CHUNK, Tables

__all__ = ["update"]
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
MOST = 64 if INTERPRET else 512  # elements of a row at a time
TOGETHER = tl.constexpr(8)  # gradients of a row that are fetched before they are added up


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _load(p, mask, WIDE: tl.constexpr):
    """bfloat16 comes as int16."""
    x = tl.load(p, mask, other=0)
    if x.dtype == tl.int16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(WIDE)


@triton.jit
def _store(p, x, mask, elements, seed, step, NUMBER: tl.constexpr):
    """As in the reference: to bfloat16 up or down with the odds of where x lies between both."""
    if p.dtype.element_ty == tl.int16:
        key = seed.to(tl.uint32) ^ (step.to(tl.uint32) * 0x9E3779B9) ^ (NUMBER * 0x85EBCA6B & 0xFFFFFFFF)
        bits = _mixed(elements.to(tl.uint32) ^ key) ^ ((elements >> 32).to(tl.uint32) * 0xC2B2AE35)
        bits = _mixed(bits ^ (seed >> 32).to(tl.uint32))
        whole = x.to(tl.uint32, bitcast=True)
        size = whole & 0x7FFFFFFF
        moved = whole + (bits & 0xFFFF)
        stays = (size >= 0x7F800000) | ((moved & 0x7FFFFFFF) >= 0x7F800000)
        half = (tl.where(stays, whole, moved) >> 16) | tl.where(size > 0x7F800000, 64, 0).to(tl.uint32)
        tl.store(p, half.to(tl.uint16).to(tl.int16, bitcast=True), mask)
    else:
        tl.store(p, x, mask)


@triton.jit
def _chunk(p_values, p_order, first, end, o, inside, D):
    """(o,) float64: the sum of the gradients p_order[first], .., p_order[end - 1]."""
    total = tl.zeros([o.shape[0]], tl.float64)
    for i in range(first, end, TOGETHER):
        for j in tl.static_range(TOGETHER):
            position = tl.load(p_order + i + j, i + j < end, other=0)
            total += tl.load(p_values + position * D + o, inside & (i + j < end), other=0).to(tl.float64)
    return total


@triton.jit
def _gradient(
    p_values,
    p_order,
    p_chunks,
    first,
    end,
    o,
    inside,
    D,
    MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(o,): of a row whose gradients are p_order[first], .., p_order[end - 1]."""
    if p_order is None:
        g = tl.load(p_values + first * D + o, inside, other=0).to(WIDE)
    elif end - first == 1:
        g = tl.load(p_values + tl.load(p_order + first) * D + o, inside, other=0).to(WIDE)
    elif end - first <= CHUNK:
        g = _chunk(p_values, p_order, first, end, o, inside, D).to(WIDE)
    else:
        total = tl.zeros([o.shape[0]], tl.float64)
        if p_chunks is not None:
            for i in range(first, end, CHUNK):
                slot = i // CHUNK * 2 + (i == first).to(tl.int64)
                total += tl.load(p_chunks + slot * D + o, inside, other=0)
        g = total.to(WIDE)
    return g * -1.0 if MAXIMIZE else g  # -g is 0 - g in Triton


@triton.jit(do_not_specialize=["N"])
def chunk_sums_kernel(p_values, p_order, p_first, p_end, p_chunks, N, D, CHUNK: tl.constexpr, ELEMENTS: tl.constexpr):
    """p_chunks (slots, D) float64: chunks of rows with more than CHUNK gradients. The one that begins at i has slot
    i // CHUNK * 2, plus 1 if it is its row's first; there is never a second one."""
    slot = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = o < D
    begin = slot // 2 * CHUNK
    at = begin + slot % 2 * CHUNK  # a place in the row whose chunk may begin here
    if at < N:
        first, end = tl.load(p_first + at), tl.load(p_end + at)
        skipped = tl.where(slot % 2 == 0, begin - first + CHUNK - 1, 0) // CHUNK * CHUNK
        here = tl.where(slot % 2 == 0, first < begin, first >= begin) & (first + skipped < end)
        if here:
            last = tl.minimum(first + skipped + CHUNK, end)
            total = _chunk(p_values, p_order, first + skipped, last, o, inside, D)
            tl.store(p_chunks + slot * D + o, total, inside)


@triton.jit(do_not_specialize=["V"])
def lazy_adam_kernel(
    p_param, p_exp_avg, p_exp_avg_sq, p_max, p_last, p_touches, p_rows, p_order, p_first, p_end, p_chunks, p_values,
    p_step, p_seed, p_hyper, V, D, DECAY: tl.constexpr, ROW_BIAS: tl.constexpr, MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr, WIDE: tl.constexpr, ONE: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """The row of a place in the order of rows, if it is the row's first. p_rows (n,): rows in order, p_order (n,): the
    positions of their gradients, p_first and p_end (n,): the places of the same row; None: gradients are dense.
    ONE: ELEMENTS are all of a row."""
    first = tl.program_id(0).to(tl.int64)
    row, end = first, first + 1
    if p_rows is not None:
        row = tl.load(p_rows + first)
        if (row < 0) | (row >= V) | (tl.load(p_first + first) != first):
            return
        end = tl.load(p_end + first)
    o = tl.arange(0, ELEMENTS)
    inside = o < D
    g = _gradient(p_values, p_order, p_chunks, first, end, o, inside, D, MAXIMIZE, CHUNK, WIDE)
    odd = (tl.abs(g) < float("inf")) == 0
    seen = g != 0
    if not ONE:
        for d in range(ELEMENTS, D, ELEMENTS):
            more = _gradient(p_values, p_order, p_chunks, first, end, d + o, d + o < D, D, MAXIMIZE, CHUNK, WIDE)
            odd |= (tl.abs(more) < float("inf")) == 0
            seen |= more != 0
    skip = tl.max(odd.to(tl.int32), 0) > 0
    if p_rows is None:
        skip |= tl.max(seen.to(tl.int32), 0) == 0
    if skip:
        return
    step = tl.load(p_step).to(tl.int32)
    seed = tl.load(p_seed) if p_seed is not None else tl.zeros((), tl.int64)
    since = step - tl.load(p_last + row) if DECAY else tl.full((), 1, tl.int32)
    age = tl.load(p_touches + row) + 1 if ROW_BIAS else step
    four = tl.arange(0, 4)  # powers of beta1 and beta2 for since, then for age: all at once
    exponent = tl.where(four < 2, since, age).to(tl.float64)
    power = tl.exp(exponent * tl.log(tl.load(p_hyper + 1 + four % 2)))
    power = tl.where(four < 2, power, 1 - power).to(WIDE)
    fade1 = tl.sum(tl.where(four == 0, power, 0), 0)
    fade2 = tl.sum(tl.where(four == 1, power, 0), 0)
    c1 = tl.sum(tl.where(four == 2, power, 0), 0)
    c2 = tl.sum(tl.where(four == 3, power, 0), 0)
    lr, eps = tl.load(p_hyper), tl.load(p_hyper + 3).to(WIDE)
    take1, take2 = (1 - tl.load(p_hyper + 1)).to(WIDE), (1 - tl.load(p_hyper + 2)).to(WIDE)
    keep = (1 - lr * tl.load(p_hyper + 4)).to(WIDE)
    rate = lr.to(WIDE) * _quotient(1.0, c1)
    root = _root(c2)
    for d in range(0, D, ELEMENTS):
        inside = d + o < D
        if not ONE:
            g = _gradient(p_values, p_order, p_chunks, first, end, d + o, inside, D, MAXIMIZE, CHUNK, WIDE)
        at = row * D + d + o
        m = fade1 * _load(p_exp_avg + at, inside, WIDE) + take1 * g
        v = fade2 * _load(p_exp_avg_sq + at, inside, WIDE) + take2 * g * g
        w = keep * _load(p_param + at, inside, WIDE)
        _store(p_exp_avg + at, m, inside, at, seed, step, 1)
        _store(p_exp_avg_sq + at, v, inside, at, seed, step, 2)
        if p_max is not None:
            v = tl.maximum(v, _load(p_max + at, inside, WIDE), propagate_nan=tl.PropagateNan.ALL)
            _store(p_max + at, v, inside, at, seed, step, 3)
        w -= _quotient(rate * m, _quotient(_root(v), root) + eps)
        _store(p_param + at, w, inside, at, seed, step, 0)
    if p_last is not None:
        tl.store(p_last + row, step)
    if p_touches is not None:
        tl.store(p_touches + row, tl.load(p_touches + row) + 1)


@triton.jit
def _root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x, y):
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def update(tables: Tables, decay: bool, row_bias: bool, maximize: bool, dense: bool) -> int:
    lists = tables[:-1]
    if not all(x.is_contiguous() for each in lists for x in each):
        return UNFIT
    for k, param in enumerate(tables.params):
        _, exp_avg, exp_avg_sq, most, last, touches, _, values, step, seed = (x[k] if x else None for x in lists)
        (count, dim), wide = values.shape, tl.float64 if param.dtype == torch.float64 else tl.float32
        if not count:
            continue
        elements = min(triton.next_power_of_2(max(dim, 1)), MOST)
        rows = order = first = end = chunks = None
        if not dense:
            rows, order = tables.indices[k].sort(stable=True)
            first, end = torch.searchsorted(rows, rows), torch.searchsorted(rows, rows, right=True)
            if count > CHUNK:
                chunks = torch.empty(2 * triton.cdiv(count, CHUNK), dim, dtype=torch.float64, device=param.device)
                grid = len(chunks), triton.cdiv(dim, elements)
                chunk_sums_kernel[grid](values, order, first, end, chunks, count, dim, CHUNK, elements)
        lazy_adam_kernel[(count,)](
            _bits(param), _bits(exp_avg), _bits(exp_avg_sq), None if most is None else _bits(most), last, touches, rows,
            order, first, end, chunks, values, step, seed, tables.hyper, param.size(0), dim, decay, row_bias, maximize,
            CHUNK, wide, dim <= elements, elements, num_warps=max(elements // 128, 1)
        )  # fmt: skip
    return OK
