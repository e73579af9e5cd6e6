"""Triton launcher of the codebook room: a tile of rows stays with a program, tiles of codes stream past it."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels.codebook import Search

__all__ = ["nearest"]
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
    p_x, p_mask, p_center, p_codes, p_bias, p_book, p_indices, p_distance, N, H, K, D,
    MOST: tl.constexpr, COSINE: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, ELEMENTS: tl.constexpr,
    DOT: tl.constexpr
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
        c = tl.load(p_book + found * D + d, good, other=0).to(tl.float64)
        value += x * c if COSINE else (x - c) * (x - c)
        own += x * x
        other += c * c
    if COSINE:
        lengths = tl.sqrt(own) * tl.sqrt(other)
        value = tl.where(lengths > 0, value / tl.where(lengths > 0, lengths, 1.0), 0.0)
    tl.store(p_indices + rows * H + h, tl.where(good, found, -1), inside)
    tl.store(p_distance + rows * H + h, tl.where(good, value, float("nan")).to(WIDE), inside)


def nearest(search: Search, cosine: bool, indices: Tensor, distance: Tensor) -> int:
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
            x, mask, center, codes, bias, book, indices, distance, n, heads, count, dim,
            most, cosine, *sizes[:4], num_warps=sizes.num_warps
        )  # fmt: skip
    return OK
