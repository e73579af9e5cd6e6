"""Triton launchers of the codebook room: a tile of rows stays with a program, tiles of codes stream past it."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels.codebook import CHUNK, PARALLEL, Chosen, Pull, Search

__all__ = ["gradient", "nearest", "statistics"]
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Config(NamedTuple):
    """Tile sizes from the number of elements of a row, never from the number of rows."""

    ROWS: int
    CODES: int
    ELEMENTS: int  # of a row at a time
    DOT: bool  # by matrix instructions, in ieee float32
    num_warps: int


def config(dim: int, dtype: torch.dtype) -> Config:
    """Matrix products want sixteen elements; float64 and short rows are added up one element at a time."""
    if dim < 16 or dtype == torch.float64:
        return Config(16 if INTERPRET else 64, 16 if INTERPRET else 64, 1, False, 4)
    return Config(16 if INTERPRET else 64, 16 if INTERPRET else 64, 16 if INTERPRET or dim < 32 else 32, True, 8)


@triton.jit
def _scores(
    p_x, p_center, p_codes, o_d, m_rows, o_codes, K, D, WIDE: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr, acc
):
    """acc - (x - center) . code for a tile; p_x: the first element of each row."""
    for d in range(0, D, E):
        if DOT:
            o = d + o_d
            m_d = o < D
            x = tl.load(p_x[:, None] + o[None, :], m_rows[:, None] & m_d[None, :], other=0).to(WIDE)
            x -= tl.load(p_center + o, m_d, other=0)[None, :]
            c = tl.load(p_codes + o_codes[None, :] * D + o[:, None], m_d[:, None] & (o_codes < K)[None, :], other=0)
            acc -= tl.dot(x, c, input_precision="ieee")
        else:
            x = tl.load(p_x + d, m_rows, other=0).to(WIDE) - tl.load(p_center + d)
            c = tl.load(p_codes + o_codes * D + d, o_codes < K, other=0)
            acc -= x[:, None] * c[None, :]
    return acc


@triton.jit(do_not_specialize=["N"])
def nearest_code_kernel(
    p_x, p_mask, p_center, p_codes, p_bias, p_book, p_indices, p_distance, p_quantized, N, H, K, D,
    MOST: tl.constexpr, COSINE: tl.constexpr, BY_COSINE: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    ELEMENTS: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """p_center (H, D), p_codes (H, K, D) less the center, p_bias (H, K), p_book (H, K, D) as given."""
    WIDE: tl.constexpr = p_codes.dtype.element_ty
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    p_rows = p_x + (rows * H + h) * D
    p_center += h * D
    p_codes += h * K * D
    p_bias += h * K
    p_book += h * K * D
    o_d = tl.arange(0, ELEMENTS)
    sound = tl.zeros([ROWS], WIDE)
    for d in range(0, D):
        sound += tl.load(p_rows + d, inside, other=0).to(WIDE) * 0
    good = inside & (sound == 0)
    if p_mask is not None:
        good &= tl.load(p_mask + rows, inside, other=0) != 0
    best = tl.full([ROWS], float("inf"), WIDE)
    found = tl.full([ROWS], -1, tl.int64)
    for k in range(0, K, CODES):
        o_codes = k + tl.arange(0, CODES)
        bias = tl.load(p_bias + o_codes, o_codes < K, other=float("inf"))
        acc = tl.zeros([ROWS, CODES], WIDE) + bias[None, :]
        acc = _scores(p_rows, p_center, p_codes, o_d, good, o_codes.to(tl.int64), K, D, WIDE, ELEMENTS, DOT, acc)
        acc = tl.where(acc == acc, acc, float("inf"))
        least, at = tl.min(acc, 1), tl.argmin(acc, 1, tie_break_left=True)
        found = tl.where(least < best, k + at, found)
        best = tl.minimum(best, least)
    large = good & ~(tl.abs(best) < MOST)
    if tl.max(large.to(tl.int32), 0) > 0:  # scores beyond the format: one code after the other, in float64
        best64 = tl.full([ROWS], float("inf"), tl.float64)
        slow = tl.full([ROWS], -1, tl.int64)
        for k in range(0, K):
            total = tl.zeros([ROWS], tl.float64)
            length = tl.zeros([ROWS], tl.float64)
            for d in range(0, D):
                x, c = tl.load(p_rows + d, large, other=0).to(tl.float64), tl.load(p_book + k * D + d).to(tl.float64)
                total += -x * c if COSINE else (x - c) * (x - c)
                length += c * c
            total = total / tl.sqrt(tl.maximum(length, 1e-300)) if COSINE else total
            unusable = tl.zeros([ROWS], tl.float64) + tl.load(p_bias + k).to(tl.float64)
            wins = total < tl.where(unusable < float("inf"), best64, float("-inf"))
            slow = tl.where(wins, k, slow)
            best64 = tl.where(wins, total, best64)
        found = tl.where(large, slow, found)
    good &= found >= 0
    value = tl.zeros([ROWS], tl.float64)
    own = tl.zeros([ROWS], tl.float64)
    other = tl.zeros([ROWS], tl.float64)
    for d in range(0, D):
        x = tl.load(p_rows + d, good, other=0).to(tl.float64)
        c = tl.load(p_book + found * D + d, good, other=0)
        if p_quantized is not None:
            tl.store(p_quantized + (rows * H + h) * D + d, c.to(WIDE), inside)
        c = c.to(tl.float64)
        value += x * c if BY_COSINE else (x - c) * (x - c)
        own += x * x
        other += c * c
    if BY_COSINE:
        lengths = tl.sqrt(own) * tl.sqrt(other)
        value = tl.where(lengths > 0, value / tl.where(lengths > 0, lengths, 1.0), 0.0)
    tl.store(p_indices + rows * H + h, tl.where(good, found, -1), inside)
    tl.store(p_distance + rows * H + h, tl.where(good, value, float("nan")).to(WIDE), inside)


def nearest(
    search: Search, cosine: bool, indices: Tensor, distance: Tensor, quantized: Tensor | None, total: Tensor | None
) -> int:
    x, book, mask = search
    n, heads, dim = x.shape
    count, wide = book.size(1), distance.dtype
    most = torch.finfo(wide).max
    usable = book.isfinite().all(2)
    codes = torch.where(usable.unsqueeze(2), book, 0).to(wide)
    center = codes.new_zeros(heads, dim)
    bias = torch.where(usable, 0.0, torch.inf).to(wide)
    if cosine:
        length = codes.double().square().sum(2, keepdim=True).sqrt()
        codes = (codes.double() / torch.where(length > 0, length, 1.0)).to(wide)
    else:
        center = (codes.double().sum(1) / usable.sum(1).clamp(min=1).unsqueeze(1)).to(wide)
        codes = codes - center.unsqueeze(1)
        half = codes.double().square().sum(2) / 2
        bias = torch.where(usable, half.clamp(max=most), torch.inf).to(wide)  # only what never wins is infinite
    sizes = config(dim, wide)
    grid = (triton.cdiv(n, sizes.ROWS), heads)
    if n:
        nearest_code_kernel[grid](
            x, mask, center, codes, bias, book, indices, distance, quantized, n, heads, count, dim,
            most, cosine, cosine and total is None, *sizes[:4], num_warps=sizes.num_warps
        )  # fmt: skip
    if total is not None:
        total.copy_(torch.where(indices < 0, 0.0, distance.double()).sum())
    return OK


@triton.jit(do_not_specialize=["CHUNKS"])
def chunk_sums_kernel(p_x, p_order, p_first, p_last, p_sums, CHUNKS, D, ELEMENTS: tl.constexpr):
    """p_sums (CHUNKS, D) float64: the sum of the rows p_order[first], .., p_order[last - 1] of each chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = o_d < D
    total = tl.zeros([ELEMENTS], tl.float64)
    for i in range(tl.load(p_first + chunk), tl.load(p_last + chunk)):
        row = tl.load(p_order + i)
        total += tl.load(p_x + row * D + o_d, inside, other=0).to(tl.float64)
    tl.store(p_sums + chunk * D + o_d, total, inside)


@triton.jit
def code_sums_kernel(p_chunks, p_begin, p_sums, D, ELEMENTS: tl.constexpr):
    """p_sums (codes, D): each code's chunks, p_begin[k] to p_begin[k + 1], in order."""
    k = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = o_d < D
    total = tl.zeros([ELEMENTS], tl.float64)
    for i in range(tl.load(p_begin + k), tl.load(p_begin + k + 1)):
        total += tl.load(p_chunks + i * D + o_d, inside, other=0)
    tl.store(p_sums + k * D + o_d, total.to(p_sums.dtype.element_ty), inside)


def statistics(chosen: Chosen, counts: Tensor, sums: Tensor | None) -> int:
    x, indices = chosen
    heads, count = counts.shape
    rows, codes = indices.numel(), heads * count
    real = (indices >= 0) & (indices < count)
    keys = torch.where(real, indices + count * torch.arange(heads, device=x.device), codes).view(-1)
    flat = keys.new_zeros(codes + 1).scatter_add_(0, keys, torch.ones_like(keys))[:-1]
    counts.view(-1).copy_(flat)
    dim = x.size(2)
    if sums is None or not dim:
        return OK
    order = keys.argsort(stable=True)
    last = flat.cumsum(0)
    per_code = (flat + (CHUNK - 1)) // CHUNK
    begin = torch.nn.functional.pad(per_code.cumsum(0), (1, 0))
    chunks = codes + rows // CHUNK  # at most as many; those beyond are empty
    each = torch.arange(chunks, device=x.device)
    code = torch.searchsorted(begin[1:], each, right=True).clamp(max=codes - 1)
    first = (last - flat)[code] + (each - begin[code]) * CHUNK
    end = torch.minimum(first + CHUNK, last[code])
    partial = torch.empty(chunks, dim, dtype=torch.float64, device=x.device)
    elements = min(triton.next_power_of_2(dim), 128)
    across = triton.cdiv(dim, elements)
    chunk_sums_kernel[(chunks, across)](x, order, first, end, partial, chunks, dim, elements)
    code_sums_kernel[(codes, across)](partial, begin, sums, dim, elements)
    return OK


@triton.jit
def _dots(p_x, p_c, p_g, rows, o_d, D, E: tl.constexpr):
    """x.x, c.c, x.c, x.g, c.g of rows."""
    xx = tl.zeros([rows.shape[0]], tl.float64)
    cc, xc, xg, cg = xx, xx, xx, xx
    for d in range(0, D, E):
        inside = rows[:, None] & (d + o_d < D)[None, :]
        x = tl.load(p_x[:, None] + (d + o_d)[None, :], inside, other=0).to(tl.float64)
        c = tl.load(p_c[:, None] + (d + o_d)[None, :], inside, other=0).to(tl.float64)
        g = tl.load(p_g[:, None] + (d + o_d)[None, :], inside, other=0).to(tl.float64)
        xx += tl.sum(x * x, 1)
        cc += tl.sum(c * c, 1)
        xc += tl.sum(x * c, 1)
        xg += tl.sum(x * g, 1)
        cg += tl.sum(c * g, 1)
    return xx, cc, xc, xg, cg


@triton.jit(do_not_specialize=["N"])
def pull_kernel(
    p_x, p_codes, p_indices, p_scale, p_upstream, p_gradient, N, H, K, D,
    ROTATION: tl.constexpr, PARALLEL: tl.constexpr, ROWS: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """Rows (N, D) of H heads in turn; see the C++ for the rotation."""
    WIDE: tl.constexpr = p_gradient.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, ELEMENTS)
    inside = rows < N
    k = tl.load(p_indices + rows, inside, other=-1)
    good = (k >= 0) & (k < K)
    p_row = p_x + rows * D
    p_code = p_codes + (rows % H * K + k) * D
    scale = tl.load(p_scale)
    all_ = tl.zeros([ROWS], tl.float64) + 1
    of_x = tl.zeros([ROWS], tl.float64)
    of_c = tl.zeros([ROWS], tl.float64)
    if ROTATION:
        xx, cc, xc, xg, cg = _dots(p_row, p_code, p_upstream + rows * D, good, o_d, D, ELEMENTS)
        lengths = tl.sqrt(xx) * tl.sqrt(cc)
        apart = tl.where(lengths > 0, 2 + 2 * xc / tl.where(lengths > 0, lengths, 1.0), 0.0)
        turns = apart > PARALLEL
        e = 1 / tl.sqrt(tl.where(turns, xx, 1.0))
        q = 1 / tl.sqrt(tl.where(turns, cc, 1.0))
        both = 2 * (e * xg + q * cg) / tl.where(turns, apart, 1.0)
        all_ = tl.where(turns, e / q, 1.0)
        of_x = tl.where(turns, e / q * e * (2 * q * cg - both), 0.0)
        of_c = tl.where(turns, -e * both, 0.0)
    for d in range(0, D, ELEMENTS):
        there = inside[:, None] & (d + o_d < D)[None, :]
        some = good[:, None] & (d + o_d < D)[None, :]
        o = (d + o_d)[None, :]
        x = tl.load(p_row[:, None] + o, some, other=0).to(WIDE)
        c = tl.load(p_code[:, None] + o, some, other=0).to(WIDE)
        out = scale * (x - c)
        if p_upstream is not None:
            g = tl.load(p_upstream + rows[:, None] * D + o, some, other=0).to(WIDE)
            if ROTATION:
                out += all_.to(WIDE)[:, None] * g + of_x.to(WIDE)[:, None] * x + of_c.to(WIDE)[:, None] * c
            else:
                out += g
        tl.store(p_gradient + rows[:, None] * D + o, tl.where(some, out, 0.0), there)


def gradient(pull: Pull, rotation: bool, gradient: Tensor) -> int:
    x, codes, indices, scale, upstream = pull
    n, heads, dim = x.shape
    if x.numel():
        elements = min(triton.next_power_of_2(dim), 32)
        rows = 16 if INTERPRET or rotation else 32  # its sums of float64 take registers
        pull_kernel[(triton.cdiv(n * heads, rows),)](
            x, codes, indices, scale, upstream, gradient, n * heads, heads, codes.size(1), dim,
            rotation and upstream is not None, PARALLEL, rows, elements
        )  # fmt: skip
    return OK
