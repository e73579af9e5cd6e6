"""Triton kernels that draw tag paths: scores filtered forward once, then all samples drawn backward from them."""

import triton
import triton.language as tl
from triton.language import constexpr

from pyseq.kernels.chain._triton import (
    INPUTS,
    NEG_INF,
    PER_CALL,
    live_steps,
    load_row,
    load_vector,
    log_product,
    long,
    step_time,
    unscored,
    wild,
)


@triton.jit
def largest(b_x):
    """The largest of some logs, 0 where all are -inf: what they may be counted from."""
    top = tl.max(b_x, 0)
    return tl.where(top == NEG_INF, 0.0, top)


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def path_filter_kernel(
    p_emissions, s_b, s_t, p_transitions, p_start, p_end, p_mask, p_lengths, p_row, p_steps, p_alpha, p_count, T,
    K: constexpr, KP: constexpr, BL: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """Log sums alpha of the paths to each tag of a sequence's live steps, counted from the largest of a step, and how
    many steps there are to draw: none where no path is feasible or a score is none."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, KP)
    p_f = p_emissions + b * s_b
    p_row += b * KP
    p_alpha += b * T * K
    if p_steps is not None:
        p_steps += b * T
    n = live_steps(p_mask, p_lengths, p_steps, b, T, CHUNK)
    found = n * 0
    if n > 0:
        b_f = load_row(p_f + step_time(p_steps, 0, n) * s_t, o, K, tl.float64)
        b_alpha = load_vector(p_start, o, K, tl.float64) + b_f  # [KP]
        b_nan = unscored(b_alpha)
        b_f = load_row(p_f + step_time(p_steps, 1, n) * s_t, o, K, tl.float64)
        for k in range(1, n):
            b_next = load_row(p_f + step_time(p_steps, k + 1, n) * s_t, o, K, tl.float64)
            b_alpha -= largest(b_alpha)
            tl.store(p_alpha + long(k - 1) * K + o, b_alpha, mask=o < K)
            b_alpha = b_f + log_product(b_alpha, p_row, p_transitions, K, 1, K, KP, BL)
            b_nan = b_nan | unscored(b_alpha)
            b_f = b_next
        tl.store(p_alpha + long(n - 1) * K + o, b_alpha - largest(b_alpha), mask=o < K)
        b_alpha += load_vector(p_end, o, K, tl.float64)
        b_nan = b_nan | unscored(b_alpha)
        feasible = (tl.max(b_alpha, 0) > NEG_INF) & (tl.max(b_nan, 0) == 0) & (wild(p_lengths, b, T) == 0)
        found = tl.where(feasible, n, 0)
    tl.store(p_count + b, found)


@triton.jit
def _below(state, index):
    """The state of a random number's item below another one's, as csrc/chain/sample.hpp has it."""
    z = state + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _weights_before(p_alpha, p_into, b_tag, o_i, K: constexpr):
    """Logs of the weights of some predecessors, by sample."""
    b_alpha = tl.load(p_alpha + o_i, mask=o_i < K, other=NEG_INF)
    b_g = tl.load(p_into + b_tag[:, None] * K + o_i[None, :], mask=(o_i < K)[None, :], other=NEG_INF)
    return b_alpha[None, :] + b_g  # [BS, BK]


@triton.jit(do_not_specialize=["T", "N"], do_not_specialize_on_alignment=["p_seed", "p_paths"])
def path_draw_kernel(
    p_seed, p_into, p_alpha, p_count, p_steps, p_paths, T, N, K: constexpr, BS: constexpr, BK: constexpr
):
    """Some samples of a sequence. p_into (K + 1, K): scores by destination, the end last; p_paths comes filled with
    -1."""
    b = tl.program_id(0).to(tl.int64)
    o_s = tl.program_id(1) * BS + tl.arange(0, BS)
    o = tl.arange(0, BK)
    p_alpha += b * T * K
    p_paths += b * N * T
    if p_steps is not None:
        p_steps += b * T
    n = tl.load(p_count + b)
    state = _below(tl.load(p_seed).to(tl.uint64, bitcast=True), b)
    b_state = _below(state, o_s)
    b_tag = tl.full([BS], K, tl.int32)
    for r in range(0, n):
        k = n - 1 - r
        p_here = p_alpha + long(k) * K
        b_top = tl.full([BS], NEG_INF, tl.float64)
        b_sum = tl.zeros([BS], tl.float64)
        for i in range(0, K, BK):
            b_x = _weights_before(p_here, p_into, b_tag, i + o, K)
            b_new = tl.maximum(b_top, tl.max(b_x, 1))
            b_ref = tl.where(b_new == NEG_INF, 0.0, b_new)
            b_sum = b_sum * tl.exp(b_top - b_ref) + tl.sum(tl.exp(b_x - b_ref[:, None]), 1)
            b_top = b_new
        b_ref = tl.where(b_top == NEG_INF, 0.0, b_top)
        b_share = (_below(b_state, long(k)) >> 12).to(tl.float64) * 2.0**-52 * b_sum
        b_before = tl.zeros([BS], tl.float64)
        b_found = tl.full([BS], K, tl.int32)  # the first whose sum of weights is above the share
        b_last = tl.zeros([BS], tl.int32)  # where rounding has left none
        for i in range(0, K, BK):
            b_w = tl.exp(_weights_before(p_here, p_into, b_tag, i + o, K) - b_ref[:, None])
            b_sums = b_before[:, None] + tl.cumsum(b_w, 1)
            b_at = (i + o)[None, :] + tl.zeros([BS, BK], tl.int32)
            b_found = tl.minimum(b_found, tl.min(tl.where((b_w > 0) & (b_sums > b_share[:, None]), b_at, K), 1))
            b_last = tl.maximum(b_last, tl.max(tl.where(b_w > 0, b_at, 0), 1))
            b_before += tl.sum(b_w, 1)
        b_tag = tl.where(b_found < K, b_found, b_last)
        tl.store(p_paths + o_s.to(tl.int64) * T + step_time(p_steps, k, n), b_tag.to(tl.int64), mask=o_s < N)
