"""Triton kernels of the entropy of linear chains, in float64 logs; see docs/chain.md.

p_into (K + 1, K) holds the scores by destination, those of the end last: the end is the one tag of a step behind the
last. Tapes by step and destination, (B, T + 1, K + 1): log sums over predecessors, entropies of the paths to each tag,
the likeliest predecessor, -1 where there is none; then the adjoints of alpha and of the entropies, and what the parts
of all but the likeliest predecessor add up to.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from pyseq.kernels.chain._paths_triton import largest
from pyseq.kernels.chain._triton import (
    INPUTS,
    NEG_INF,
    PER_CALL,
    counted,
    live_steps,
    load_row,
    load_vector,
    long,
    step_time,
    unscored,
    wild,
)

LEAST: constexpr = constexpr(-745.0)  # log of what is 0


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, to its last digits where x is small."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def entropy_fwd_kernel(
    p_emissions, s_b, s_t, p_into, p_start, p_mask, p_lengths, p_steps, p_alpha, p_sums, p_mixed, p_likeliest, p_count,
    p_value, T, K: constexpr, KP: constexpr, BJ: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """Entropy of a sequence, its tapes, and its live steps, negative where it is NaN, 0 where no path is feasible."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, KP)
    p_f = p_emissions + b * s_b
    p_alpha += b * T * K
    at = b * (T + 1) * (K + 1)
    p_sums += at
    p_mixed += at
    p_likeliest += at
    if p_steps is not None:
        p_steps += b * T
    n = live_steps(p_mask, p_lengths, p_steps, b, T, CHUNK)
    value = n.to(tl.float64) * 0
    found = n * 0
    if n > 0:
        b_f = load_row(p_f + step_time(p_steps, 0, n) * s_t, o, K, tl.float64)
        b_alpha = load_vector(p_start, o, K, tl.float64) + b_f  # [KP]
        b_h = tl.zeros([KP], tl.float64)
        tl.store(p_mixed + o, b_h, mask=o < K)
        b_nan = unscored(b_alpha)
        b_lost = tl.zeros([BJ], tl.int32)
        for k in range(1, n + 1):
            b_f = load_row(p_f + step_time(p_steps, k, n) * s_t, o, K, tl.float64)
            b_alpha -= largest(b_alpha)
            tl.store(p_alpha + long(k - 1) * K + o, b_alpha, mask=o < K)
            at = long(k) * (K + 1)
            begin = tl.where(k == n, K, 0)
            end = begin + tl.where(k == n, 1, K)
            for j in range(begin, end, BJ):
                o_j = j + tl.arange(0, BJ)
                mask = (o_j[:, None] < end) & (o[None, :] < K)
                b_g = tl.load(p_into + o_j[:, None] * K + o[None, :], mask=mask, other=NEG_INF)
                b_x = b_alpha[None, :] + b_g  # [BJ, KP]
                b_lost = b_lost | tl.max(unscored(b_x), 1)
                b_top, b_at = tl.max(b_x, 1, return_indices=True, return_indices_tie_break_left=True)
                b_x -= tl.where(b_top == NEG_INF, 0.0, b_top)[:, None]
                b_e = tl.exp(b_x)
                b_rest = tl.sum(tl.where(o[None, :] == b_at[:, None], 0.0, b_e), 1)
                b_mixed = tl.sum(b_e * (b_h[None, :] - tl.maximum(b_x, LEAST)), 1)
                b_more = _log1p(b_rest)
                b_at = tl.where(b_top == NEG_INF, -1, b_at)
                tl.store(p_sums + at + o_j, b_top + b_more, mask=o_j < end)
                tl.store(p_mixed + at + o_j, b_mixed / (1.0 + b_rest) + b_more, mask=o_j < end)
                tl.store(p_likeliest + at + o_j, b_at.to(tl.int16), mask=o_j < end)
            tl.debug_barrier()
            if k < n:
                b_alpha = b_f + tl.load(p_sums + at + o, mask=o < K, other=NEG_INF)
                b_h = tl.load(p_mixed + at + o, mask=o < K, other=0.0)
                b_nan = b_nan | unscored(b_alpha)
        at = long(n) * (K + 1) + K
        feasible = tl.load(p_sums + at) > NEG_INF
        lost = (tl.max(b_nan, 0) > 0) | (tl.max(b_lost, 0) > 0)
        value = tl.where(lost, float("nan"), tl.where(feasible, tl.load(p_mixed + at), 0.0))
        found = tl.where(lost, -n, tl.where(feasible, n, 0))
    if wild(p_lengths, b, T):
        value += float("nan")
        found = -tl.abs(n)
    tl.store(p_value + b, value.to(p_value.dtype.element_ty))
    tl.store(p_count + b, found)


@triton.jit
def _parts(b_alpha, b_h, b_g, p_sums, p_mixed, p_likeliest, o_j, mask, o):
    """q(i | j), by destination, and q (c - H) with c = H(i) - log q, 0 for the likeliest i, which has what the others
    lack to 0; and which that is."""
    b_sums = tl.load(p_sums + o_j, mask=mask, other=0.0)
    b_x = b_alpha[None, :] + b_g - tl.where(b_sums == NEG_INF, 0.0, b_sums)[:, None]
    b_q = tl.exp(b_x)
    b_is = o[None, :] == tl.load(p_likeliest + o_j, mask=mask, other=-1).to(tl.int32)[:, None]
    b_c = b_h[None, :] - tl.maximum(b_x, LEAST) - tl.load(p_mixed + o_j, mask=mask, other=0.0)[:, None]
    return b_q, tl.where(b_is, 0.0, b_q * b_c), b_is


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def entropy_bwd_kernel(
    p_into, p_weights, p_steps, p_alpha, p_sums, p_mixed, p_likeliest, p_count, p_of_alpha, p_of_entropy, p_others,
    p_grad, g_b, g_t, p_ends, T, K: constexpr, KP: constexpr, BJ: constexpr,
):  # fmt: skip
    """Gradient in the emissions, starts and ends of a sequence, and the tapes of adjoints; p_grad comes zeroed."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, KP)
    p_grad += b * g_b
    p_ends += b * 2 * K
    p_alpha += b * T * K
    at = b * (T + 1) * (K + 1)
    p_sums += at
    p_mixed += at
    p_likeliest += at
    p_of_alpha += at
    p_of_entropy += at
    p_others += at
    if p_steps is not None:
        p_steps += b * T
    n, w = counted(p_count, p_weights, b, tl.float64)
    b_alpha_bar = tl.zeros([KP], tl.float64)
    tl.store(p_ends + K + o, b_alpha_bar, mask=o < K)
    if n > 0:
        at = long(n) * (K + 1)
        tl.store(p_of_alpha + at + K, tl.zeros([], tl.float64))
        tl.store(p_of_entropy + at + K, w.to(tl.float64))
        tl.debug_barrier()
        for r in range(0, n):
            k = n - r
            at = long(k) * (K + 1)
            begin = tl.where(k == n, K, 0)
            end = begin + tl.where(k == n, 1, K)
            b_alpha = tl.load(p_alpha + long(k - 1) * K + o, mask=o < K, other=NEG_INF)
            b_h = tl.load(p_mixed + at - (K + 1) + o, mask=o < K, other=0.0)
            b_alpha_bar = tl.zeros([KP], tl.float64)
            b_entropy_bar = tl.zeros([KP], tl.float64)
            for j in range(begin, end, BJ):
                o_j = j + tl.arange(0, BJ)
                mask = (o_j[:, None] < end) & (o[None, :] < K)
                b_g = tl.load(p_into + o_j[:, None] * K + o[None, :], mask=mask, other=NEG_INF)
                b_q, b_part, b_is = _parts(
                    b_alpha, b_h, b_g, p_sums + at, p_mixed + at, p_likeliest + at, o_j, o_j < end, o
                )
                b_others = tl.sum(b_part, 1)
                tl.store(p_others + at + o_j, b_others, mask=o_j < end)
                b_part = tl.where(b_is, -b_others[:, None], b_part)
                b_of_alpha = tl.load(p_of_alpha + at + o_j, mask=o_j < end, other=0.0)
                b_of_entropy = tl.load(p_of_entropy + at + o_j, mask=o_j < end, other=0.0)
                b_alpha_bar += tl.sum(b_q * b_of_alpha[:, None] + b_of_entropy[:, None] * b_part, 0)
                b_entropy_bar += tl.sum(b_q * b_of_entropy[:, None], 0)
            if k == n:
                tl.store(p_ends + K + o, b_alpha_bar, mask=o < K)
            p_to = p_grad + step_time(p_steps, k - 1, n) * g_t
            tl.store(p_to + o, b_alpha_bar.to(p_grad.dtype.element_ty), mask=o < K)
            tl.store(p_of_alpha + at - (K + 1) + o, b_alpha_bar, mask=o < K)
            tl.store(p_of_entropy + at - (K + 1) + o, b_entropy_bar, mask=o < K)
            tl.debug_barrier()
    tl.store(p_ends + o, b_alpha_bar, mask=o < K)


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def entropy_counts_kernel(
    p_into, p_alpha, p_sums, p_mixed, p_likeliest, p_count, p_of_alpha, p_of_entropy, p_others, p_shares, B, T,
    K: constexpr, BK: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """One slot's share of the gradient in the transitions: a tile, summed over (sequence, chunk of steps) in order."""
    slot, slots = tl.program_id(0), tl.num_programs(0)
    tiles: constexpr = (K + BK - 1) // BK
    o = (tl.program_id(1) // tiles) * BK + tl.arange(0, BK)
    o_j = (tl.program_id(1) % tiles) * BK + tl.arange(0, BK)
    chunks = tl.cdiv(T, CHUNK)
    mask = (o_j[:, None] < K) & (o[None, :] < K)
    b_g = tl.load(p_into + o_j[:, None] * K + o[None, :], mask=mask, other=NEG_INF)
    b_sum = tl.zeros([BK, BK], tl.float64)
    for c in range(slot.to(tl.int64), B * chunks.to(tl.int64), slots):
        b = c // chunks
        first = ((c % chunks) * CHUNK).to(tl.int32) + 1
        n = tl.abs(tl.load(p_count + b))
        for k in range(first, tl.minimum(first + CHUNK, n)):
            at = (b * (T + 1) + k) * (K + 1)
            b_alpha = tl.load(p_alpha + (b * T + k - 1) * K + o, mask=o < K, other=NEG_INF)
            b_h = tl.load(p_mixed + at - (K + 1) + o, mask=o < K, other=0.0)
            b_q, b_part, b_is = _parts(b_alpha, b_h, b_g, p_sums + at, p_mixed + at, p_likeliest + at, o_j, o_j < K, o)
            b_others = tl.load(p_others + at + o_j, mask=o_j < K, other=0.0)
            b_part = tl.where(b_is, -b_others[:, None], b_part)
            b_of_alpha = tl.load(p_of_alpha + at + o_j, mask=o_j < K, other=0.0)
            b_of_entropy = tl.load(p_of_entropy + at + o_j, mask=o_j < K, other=0.0)
            b_sum += b_q * b_of_alpha[:, None] + b_of_entropy[:, None] * b_part
    tl.store(p_shares + (slot.to(tl.int64) * K + o[None, :]) * K + o_j[:, None], b_sum, mask=mask)
