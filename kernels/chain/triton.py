"""Linear chains in Triton: one sequence a program, one launch a direction, the loop over live steps inside.

States are kept as a_k(j) = exp(alpha_k(j)) times a power of two, so that scaling is exact and log Z needs one log.
Each sequence certifies its own float32 sums; where it cannot, the same program repeats it in the float64 exp domain
and, where that fails too, in the float64 log domain with a maximum a destination. See docs/chain.md.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from pyseq.kernels.chain._triton import (
    FAR,
    IS_NLL,
    IS_PARTITION,
    IS_SCORE,
    LEAST32,
    LEAST64,
    LIMIT,
    LN2,
    MASS32,
    MASS64,
    NEG_INF,
    TOP32,
    TOP64,
    counted,
    exponent,
    live_steps,
    load_row,
    load_vector,
    log_product,
    log_sum,
    long,
    product,
    resident,
    scaled,
    split,
    step_time,
    store_state,
    tagged,
    unscored,
    wild,
)  # fmt: skip
from pyseq.kernels.common import OK, SCORE

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
FAST, WIDE, LOG = 0, 1, 2  # paths: exp domain at the width of the sums, in float64, log domain


@triton.jit
def chain_edges_kernel(
    p_transitions, p_edges, p_turned, p_wide, p_shift, K: constexpr, KP: constexpr, BI: constexpr, BJ: constexpr
):  # fmt: skip
    """edges[i, j] = exp(transitions[i, j]) * 2^-shift[j], turned[j, i] the same; at least 2^-126 where not forbidden.

    shift[j] = FAR marks a column outside the exp domain.
    """
    o_j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    o_b = tl.arange(0, BI)
    b_shift = tl.full([BJ], FAR, tl.int32)
    b_ok = tl.full([BJ], 1, tl.int32)
    for i in range(0, K, BI):
        o_i = i + o_b
        mask = (o_i[:, None] < K) & (o_j[None, :] < K)
        b_g = tl.load(p_transitions + o_i[:, None] * K + o_j[None, :], mask=mask, other=NEG_INF).to(tl.float64)
        _, b_n = split(tl.minimum(tl.maximum(b_g, -LIMIT), LIMIT))
        b_shift = tl.maximum(b_shift, tl.max(tl.where(b_g > NEG_INF, b_n, FAR), 0))
        b_ok = tl.minimum(b_ok, tl.min((b_g <= LIMIT).to(tl.int32), 0))
    b_ok = b_ok * ((b_shift == FAR) | (b_shift > -10000)).to(tl.int32)
    b_shift = tl.where(b_shift == FAR, 0, b_shift)
    tl.store(p_shift + o_j, tl.where(b_ok == 1, b_shift, FAR))
    for i in range(0, KP, BI):
        o_i = i + o_b
        mask = (o_i[:, None] < K) & (o_j[None, :] < K)
        b_g = tl.load(p_transitions + o_i[:, None] * K + o_j[None, :], mask=mask, other=NEG_INF).to(tl.float64)
        b_p, b_n = split(tl.where(b_g == NEG_INF, NEG_INF, tl.minimum(tl.maximum(b_g, -LIMIT), LIMIT)))
        b_e = scaled(b_p, b_n - b_shift[None, :])
        at = o_i[:, None] * KP + o_j[None, :]
        if p_wide is not None:
            tl.store(p_wide + at, tl.where(b_g == NEG_INF, 0.0, b_e))
            b_e = tl.maximum(b_e, 2.0**-126)
        b_e = tl.where(b_g == NEG_INF, 0.0, b_e).to(p_edges.dtype.element_ty)
        tl.store(p_edges + at, b_e)
        tl.store(p_turned + o_j[None, :] * KP + o_i[:, None], b_e)


@triton.jit
def _advance(b_s, b_f, b_shift):
    """One step: sums over predecessors to scaled states, the exponent taken out, exponents, and the certificate."""
    TOP: constexpr = TOP32 if b_s.dtype == tl.float32 else TOP64
    LEAST: constexpr = LEAST32 if b_s.dtype == tl.float32 else LEAST64
    b_p, b_n = split(b_f)
    b_n += b_shift
    b_x = b_s * b_p
    b_exp = tl.where(b_x > 0, exponent(b_x) + b_n, FAR)
    top = tl.max(b_exp, 0)
    top = tl.where(top == FAR, 0, top)
    b_a = tl.where(b_x > 0, scaled(b_x, b_n - top + TOP), 0.0)
    b_fine = (b_f == NEG_INF) | ((b_f >= -LIMIT) & (b_a >= 1))
    b_ok = (b_f <= LIMIT) & ((b_s == 0) | ((b_s >= LEAST) & b_fine))  # s = 0 only where no predecessor is legal
    return b_a, top - TOP, b_exp, b_ok


@triton.jit
def _forward_exp(
    p_f, s_t, p_steps, p_start, p_end, p_edges, p_shift, p_row, p_tape, n, kappa,
    K: constexpr, KP: constexpr, BI: constexpr, KEEP: constexpr, TAPE: constexpr, dtype: constexpr,
):  # fmt: skip
    """log Z and whether it is certified; kappa: roundings of a step in units of 2^-24 (float32), or the least sum
    that is trusted (float64)."""
    TOP: constexpr = TOP32 if dtype == tl.float32 else TOP64
    LEAST: constexpr = LEAST32 if dtype == tl.float32 else LEAST64
    o = tl.arange(0, KP)
    edges = resident(p_edges, KP, BI, KEEP)
    b_shift = tl.load(p_shift + o)
    b_ok = (b_shift > FAR) | (n < 2)
    b_start = load_vector(p_start, o, K, dtype)
    b_p, b_n = split(b_start)
    b_f = load_row(p_f + step_time(p_steps, 0, n) * s_t, o, K, dtype)
    b_next = load_row(p_f + step_time(p_steps, 1, n) * s_t, o, K, dtype)
    t_next = step_time(p_steps, 2, n)
    b_a, drop, b_exp, b_fine = _advance(scaled(b_p, b_n * 0 + TOP), b_f, b_n)
    b_ok = b_ok & b_fine & (b_start <= LIMIT) & ((b_start >= -LIMIT) | (b_start == NEG_INF))
    total = drop.to(tl.int64) - TOP
    b_far = tl.where(b_exp > FAR, tl.abs(b_exp - TOP), 0).to(tl.float32)  # largest |exponent| of any state so far
    for k in range(0, n - 1):
        if TAPE:
            store_state(p_tape + long(k) * K, b_a, o, K)
        b_f = b_next
        b_next = load_row(p_f + t_next * s_t, o, K, dtype)
        t_next = step_time(p_steps, k + 3, n)
        b_s = product(b_a, edges, p_edges, p_row, K, KP, BI, KEEP)
        b_a, drop, b_exp, b_fine = _advance(b_s, b_f, b_shift)
        b_ok = b_ok & b_fine
        b_far = tl.maximum(b_far, tl.where(b_exp > FAR, tl.abs(b_exp.to(tl.float32) + total.to(tl.float32)), 0.0))
        total += drop
    if TAPE:
        store_state(p_tape + long(n - 1) * K, b_a, o, K)
    b_end = load_vector(p_end, o, K, dtype)
    b_p, b_n = split(b_end)
    b_ok = b_ok & (b_end <= LIMIT) & ((b_a == 0) | (b_end >= -LIMIT) | (b_end == NEG_INF))
    top = tl.max(tl.where((b_a > 0) & (b_p > 0), b_n, FAR), 0)
    top = tl.where(top == FAR, 0, top)
    FLOOR: constexpr = 2.0**-126 if dtype == tl.float32 else 2.0**-1022
    q = tl.sum(b_a * tl.where(b_p > 0, tl.maximum(scaled(b_p, b_n - top), FLOOR), 0.0), 0)
    dead = q == 0
    b_n = exponent(tl.where(dead, 1.0, q))
    log_z = tl.log(scaled(tl.where(dead, 1.0, q), -b_n).to(tl.float64)) + (total + top + b_n).to(tl.float64) * LN2
    ok = (tl.min(b_ok.to(tl.int32), 0) == 1) & (dead | (q >= LEAST))
    far = tl.maximum(tl.abs(log_z), (tl.max(b_far, 0) - 1).to(tl.float64) * LN2)
    # float32: n steps lose at most kappa units each, and 7 are allowed; float64: errors are absolute, sums may be tiny
    need = n.to(tl.float64) * kappa / 7 if dtype == tl.float32 else kappa
    ok = ok & (dead | (far >= need))
    return tl.where(dead, NEG_INF, log_z), ok


@triton.jit
def _forward_log(
    p_f, s_t, p_steps, p_start, p_end, p_transitions, p_row, n, K: constexpr, KP: constexpr, BL: constexpr
):
    """log Z in the log domain, float64."""
    o = tl.arange(0, KP)
    b_alpha = load_vector(p_start, o, K, tl.float64) + load_row(p_f + step_time(p_steps, 0, n) * s_t, o, K, tl.float64)
    for k in range(1, n):
        b_f = load_row(p_f + step_time(p_steps, k, n) * s_t, o, K, tl.float64)
        b_alpha = b_f + log_product(b_alpha, p_row, p_transitions, K, 1, K, KP, BL)
    return log_sum(b_alpha + load_vector(p_end, o, K, tl.float64))


@triton.jit
def _path_score(p_f, s_t, p_steps, p_transitions, p_start, p_end, p_tags, n, K: constexpr, CHUNK: constexpr):
    """Score of the tag path, float64; NaN where a tag is out of range or a score +inf."""
    b_sum = tl.zeros([CHUNK], tl.float64)
    for k in range(0, n, CHUNK):
        o_k = k + tl.arange(0, CHUNK)
        live = o_k < n
        b_t, b_y = tagged(p_steps, p_tags, o_k, live, K)
        b_sum += tl.where(tl.load(p_tags + b_t, mask=live, other=0) == b_y, 0.0, float("nan"))  # a tag out of range
        b_sum += tl.load(p_f + b_t * s_t + b_y, mask=live, other=0.0).to(tl.float64)
        _, b_from = tagged(p_steps, p_tags, o_k - 1, live & (o_k > 0), K)
        b_sum += tl.load(p_transitions + b_from * K + b_y, mask=live & (o_k > 0), other=0.0).to(tl.float64)
        if p_start is not None:
            b_sum += tl.load(p_start + b_y, mask=o_k == 0, other=0.0).to(tl.float64)
        if p_end is not None:
            b_sum += tl.load(p_end + b_y, mask=o_k == n - 1, other=0.0).to(tl.float64)
    score = tl.sum(b_sum, 0)
    return tl.where(score == float("inf"), float("nan"), score)


PER_CALL = ["T", "s_b", "s_t", "g_b", "g_t", "B", "kappa"]
INPUTS = ["p_emissions", "p_tags", "p_mask", "p_lengths", "p_weights", "p_value", "p_grad", "p_scores", "p_path"]


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def crf_fwd_kernel(
    p_emissions, s_b, s_t, p_transitions, p_start, p_end, p_tags, p_shift, p_row, p_steps, p_tape, p_count, p_paths, T,
    p_mask, p_lengths, p_edges, p_wide, p_value, kappa,
    K: constexpr, KP: constexpr, BI: constexpr, BL: constexpr, KEEP: constexpr, CHUNK: constexpr, KIND: constexpr,
    BW: constexpr, KEEP_WIDE: constexpr,
):  # fmt: skip
    """Value of a sequence; where p_tape is given, the tape of its states, and its live steps, negative if it is NaN."""
    b = tl.program_id(0).to(tl.int64)
    p_f = p_emissions + b * s_b
    TAPE: constexpr = p_tape is not None
    if p_steps is not None:
        p_steps += b * T
    if p_tape is not None:
        p_tape += b * T * K
    p_row += b * KP
    n = live_steps(p_mask, p_lengths, p_steps, b, T, CHUNK)
    log_z = n.to(tl.float64) * 0
    path = n * 0
    if KIND != IS_SCORE:  # noqa: SIM102 (one is known when compiling, the other is not)
        if n > 0:
            log_z, ok = _forward_exp(
                p_f, s_t, p_steps, p_start, p_end, p_edges, p_shift, p_row, p_tape, n, kappa,
                K, KP, BI, KEEP, TAPE, p_edges.dtype.element_ty,
            )  # fmt: skip
            if not ok:
                if p_wide is not None:
                    tl.debug_barrier()  # the tape is written again, maybe by other threads
                    path = n * 0 + 1
                    log_z, ok = _forward_exp(
                        p_f, s_t, p_steps, p_start, p_end, p_wide, p_shift, p_row, p_tape, n, 2.0**-20,
                        K, KP, BW, KEEP_WIDE, TAPE, tl.float64,
                    )  # fmt: skip
                if not ok:
                    path = n * 0 + 2
                    log_z = _forward_log(p_f, s_t, p_steps, p_start, p_end, p_transitions, p_row, n, K, KP, BL)
    if KIND == IS_PARTITION:
        value = log_z
        dead = log_z == NEG_INF
    else:
        value = _path_score(p_f, s_t, p_steps, p_transitions, p_start, p_end, p_tags + b * T, n, K, CHUNK)
        dead = value == NEG_INF
        if KIND == IS_NLL:
            value = tl.where(dead, 0.0, log_z) - tl.where(dead, 0.0, value)
            value = tl.where(dead, float("inf"), tl.where(value < 0, 0.0, value))
    if wild(p_lengths, b, T):
        value += float("nan")
    tl.store(p_value + b, value.to(p_value.dtype.element_ty))
    tl.store(p_paths + b, path)
    if p_count is not None:
        tl.store(p_count + b, tl.where(value == value, tl.where(dead, 0, n), -n))


@triton.jit
def _backward_exp(
    p_f, s_t, p_steps, p_end, p_tags, p_turned, p_shift, p_row, p_tape, p_right, p_grad, g_t, p_ends, w, n,
    K: constexpr, KP: constexpr, BI: constexpr, KEEP: constexpr, KIND: constexpr,
):  # fmt: skip
    """Marginals from the tape of states, and right_k so that xi_k(i, j) = a_{k-1}(i) edges(i, j) right_k(j)."""
    dtype: constexpr = p_turned.dtype.element_ty
    MASS: constexpr = MASS32 if dtype == tl.float32 else MASS64
    o = tl.arange(0, KP)
    edges = resident(p_turned, KP, BI, KEEP)
    b_shift = tl.load(p_shift + o)
    last = long(n - 1)
    b_a = tl.load(p_tape + last * K + o, mask=o < K, other=0.0)
    b_b, b_n = split(load_vector(p_end, o, K, dtype))
    top = tl.max(tl.where((b_a > 0) & (b_b > 0), b_n, FAR), 0)
    b_b = tl.where(b_a > 0, scaled(b_b, b_n - top), 0.0)
    z = tl.sum(b_a * b_b, 0)
    ok = z >= MASS
    b_b = b_b / tl.where(ok, z, 1.0)
    b_mu = b_a * b_b
    _put(p_ends + K, b_mu, p_tags, step_time(p_steps, n - 1, n), w, o, K, KIND)
    t = step_time(p_steps, n - 1, n)
    b_f = load_row(p_f + t * s_t, o, K, dtype)
    for i in range(0, n - 1):
        k = n - 1 - i
        _put(p_grad + t * g_t, b_mu, p_tags, t, w, o, K, KIND)
        b_a = tl.load(p_tape + long(k - 1) * K + o, mask=o < K, other=0.0)
        t = step_time(p_steps, k - 1, n)
        b_p, b_n = split(b_f)
        b_f = load_row(p_f + t * s_t, o, K, dtype)
        b_x = b_p * b_b
        b_n += b_shift
        top = tl.max(tl.where(b_x > 0, exponent(b_x) + b_n, FAR), 0)
        b_v = tl.where(b_x > 0, scaled(b_x, b_n - top), 0.0)
        b_b = tl.where(b_a > 0, product(b_v, edges, p_turned, p_row, K, KP, BI, KEEP), 0.0)
        z = tl.sum(b_a * b_b, 0)
        ok = ok & (z >= MASS)
        z = tl.where(z >= MASS, z, 1.0)
        tl.store(p_right + long(k) * K + o, b_v / z, mask=o < K)
        b_b = b_b / z
        b_mu = b_a * b_b
    _put(p_grad + t * g_t, b_mu, p_tags, t, w, o, K, KIND)
    _put(p_ends, b_mu, p_tags, t, w, o, K, KIND)
    return ok


@triton.jit
def _backward_log(
    p_f, s_t, p_steps, p_transitions, p_start, p_end, p_tags, p_row, p_tape, p_right, p_low, p_grad, g_t, p_ends, w, n,
    K: constexpr, KP: constexpr, BL: constexpr, KIND: constexpr,
):  # fmt: skip
    """Marginals in the log domain; tape and right become logs with log xi_k = tape_{k-1}(i) + g(i, j) + right_k(j)."""
    PAIR: constexpr = p_low is not None  # float64 numbers as two float32
    o = tl.arange(0, KP)
    t = step_time(p_steps, 0, n)
    b_alpha = load_vector(p_start, o, K, tl.float64) + load_row(p_f + t * s_t, o, K, tl.float64)
    for k in range(0, n):
        if k > 0:
            b_f = load_row(p_f + step_time(p_steps, k, n) * s_t, o, K, tl.float64)
            b_alpha = b_f + log_product(b_alpha, p_row, p_transitions, K, 1, K, KP, BL)
        top = tl.max(b_alpha, 0)
        b_alpha = tl.where(b_alpha == NEG_INF, NEG_INF, b_alpha - tl.where(top == NEG_INF, 0.0, top))
        b_high = b_alpha.to(p_tape.dtype.element_ty)
        at = long(k) * K + o
        tl.store(p_tape + at, b_high, mask=o < K)
        if PAIR:
            b_low = tl.where(b_alpha == NEG_INF, 0.0, b_alpha - b_high.to(tl.float64))
            tl.store(p_low + at, b_low.to(tl.float32), mask=o < K)
    tl.debug_barrier()
    b_beta = load_vector(p_end, o, K, tl.float64)
    b_x = b_alpha + b_beta
    z = log_sum(b_x)
    b_beta = b_beta - z
    b_mu = tl.exp(b_x - z)
    t = step_time(p_steps, n - 1, n)
    _put(p_ends + K, b_mu, p_tags, t, w, o, K, KIND)
    for i in range(0, n - 1):
        k = n - 1 - i
        _put(p_grad + t * g_t, b_mu, p_tags, t, w, o, K, KIND)
        b_c = b_beta + load_row(p_f + t * s_t, o, K, tl.float64)
        b_beta = log_product(b_c, p_row, p_transitions, 1, K, K, KP, BL)
        at = long(k - 1) * K + o
        b_alpha = tl.load(p_tape + at, mask=o < K, other=NEG_INF).to(tl.float64)
        if PAIR:
            b_alpha += tl.load(p_low + at, mask=o < K, other=0.0).to(tl.float64)
        b_beta = tl.where(b_alpha == NEG_INF, NEG_INF, b_beta)
        b_x = b_alpha + b_beta
        z = log_sum(b_x)
        b_beta = b_beta - z
        b_mu = tl.exp(b_x - z)
        base = tl.sum(tl.where(b_mu == 0, 0.0, b_mu * b_alpha), 0)  # logs of states that matter are then near 0
        tl.debug_barrier()
        tl.store(p_tape + at, (b_alpha - base).to(p_tape.dtype.element_ty), mask=o < K)
        b_right = b_c - z + base
        b_high = b_right.to(p_right.dtype.element_ty)
        tl.store(p_right + at + K, b_high, mask=o < K)
        if PAIR:
            b_low = tl.where(b_right == NEG_INF, 0.0, b_right - b_high.to(tl.float64))
            tl.store(p_low + at + K, b_low.to(tl.float32), mask=o < K)
        t = step_time(p_steps, k - 1, n)
    _put(p_grad + t * g_t, b_mu, p_tags, t, w, o, K, KIND)
    _put(p_ends, b_mu, p_tags, t, w, o, K, KIND)


@triton.jit
def _put(p, b_mu, p_tags, t, w, o, K: constexpr, KIND: constexpr):
    """Gradient in one step's scores: expected minus observed."""
    if KIND == IS_NLL:
        y = tl.minimum(tl.maximum(tl.load(p_tags + t), 0), K - 1)
        b_mu = tl.where(o == y, b_mu - 1, b_mu)
    tl.store(p + o, (w * b_mu).to(p.dtype.element_ty), mask=o < K)


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def crf_bwd_kernel(
    p_emissions, s_b, s_t, p_transitions, p_start, p_end, p_tags, p_shift, p_row, p_steps, p_tape, p_count, p_paths, T,
    p_weights, p_turned, p_right, p_low, p_grad, g_b, g_t, p_ends,
    K: constexpr, KP: constexpr, BI: constexpr, BL: constexpr, KEEP: constexpr, CHUNK: constexpr, KIND: constexpr,
):  # fmt: skip
    """Gradient in the emissions, starts and ends a sequence; p_grad comes zeroed."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, KP)
    p_ends += b * 2 * K
    dtype: constexpr = p_grad.dtype.element_ty
    n, w = counted(p_count, p_weights, b, dtype)
    if n == 0:
        tl.store(p_ends + o, tl.zeros([KP], dtype), mask=o < K)
        tl.store(p_ends + K + o, tl.zeros([KP], dtype), mask=o < K)
    else:
        p_f = p_emissions + b * s_b
        p_grad += b * g_b
        if p_steps is not None:
            p_steps += b * T
        if p_tags is not None:
            p_tags += b * T
        if KIND == IS_SCORE:
            for k in range(0, n, CHUNK):
                o_k = k + tl.arange(0, CHUNK)
                b_t, b_y = tagged(p_steps, p_tags, o_k, o_k < n, K)
                tl.store(p_grad + b_t * g_t + b_y, tl.zeros([CHUNK], dtype) + w, mask=o_k < n)
            o_k = tl.where(o == 0, 0, n - 1)
            _, b_y = tagged(p_steps, p_tags, o_k, o < 2, K)
            first = tl.sum(tl.where(o == 0, b_y, 0), 0)
            _, b_y = tagged(p_steps, p_tags, o * 0 + n - 1, o < 1, K)
            last = tl.sum(tl.where(o == 0, b_y, 0), 0)
            tl.store(p_ends + o, tl.where(o == first, w, 0.0), mask=o < K)
            tl.store(p_ends + K + o, tl.where(o == last, w, 0.0), mask=o < K)
        else:
            p_tape += b * T * K
            p_right += b * T * K
            p_row += b * KP
            ok = tl.load(p_paths + b) < 2
            if ok:
                ok = _backward_exp(
                    p_f, s_t, p_steps, p_end, p_tags, p_turned, p_shift, p_row, p_tape, p_right, p_grad, g_t, p_ends,
                    w, n, K, KP, BI, KEEP, KIND,
                )  # fmt: skip
            if not ok:
                if p_low is not None:
                    p_low += b * T * K
                tl.debug_barrier()
                _backward_log(
                    p_f, s_t, p_steps, p_transitions, p_start, p_end, p_tags, p_row, p_tape, p_right, p_low, p_grad,
                    g_t, p_ends, w, n, K, KP, BL, KIND,
                )  # fmt: skip
                tl.store(p_paths + b, 2)


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def crf_counts_kernel(
    p_transitions, p_tags, p_weights, p_edges, p_steps, p_tape, p_right, p_low, p_count, p_paths, p_parts, B, T,
    K: constexpr, KP: constexpr, BK: constexpr, CHUNK: constexpr, KIND: constexpr,
):  # fmt: skip
    """One slot's share of the gradient in the transitions: a tile, summed over (sequence, chunk of steps) in order."""
    slot, slots = tl.program_id(0), tl.num_programs(0)
    tiles: constexpr = (KP + BK - 1) // BK
    o_i = (tl.program_id(1) // tiles) * BK + tl.arange(0, BK)
    o_j = (tl.program_id(1) % tiles) * BK + tl.arange(0, BK)
    dtype: constexpr = p_parts.dtype.element_ty
    chunks = tl.cdiv(T, CHUNK)
    b_sum = tl.zeros([BK, BK], dtype)  # to be multiplied by the edges
    b_rest = tl.zeros([BK, BK], dtype)
    mask = (o_i[:, None] < K) & (o_j[None, :] < K)
    b_g = tl.load(p_transitions + o_i[:, None] * K + o_j[None, :], mask=mask, other=NEG_INF)
    for c in range(slot.to(tl.int64), B * chunks.to(tl.int64), slots):
        b = c // chunks
        k = ((c % chunks) * CHUNK).to(tl.int32) + 1
        n, w = counted(p_count, p_weights, b, dtype)
        if k < n:
            o_k = k + tl.arange(0, CHUNK)
            live = o_k < n
            if KIND != IS_SCORE:
                if tl.load(p_paths + b) < 2:
                    at = (b * T + o_k.to(tl.int64)) * K
                    b_a = tl.load(
                        p_tape + at[None, :] - K + o_i[:, None], mask=live[None, :] & (o_i[:, None] < K), other=0.0
                    )
                    b_r = tl.load(
                        p_right + at[:, None] + o_j[None, :], mask=live[:, None] & (o_j[None, :] < K), other=0.0
                    )
                    b_sum = tl.dot(b_a * w, b_r, b_sum, input_precision="ieee", out_dtype=dtype)
                else:
                    for kk in range(k, tl.minimum(k + CHUNK, n)):
                        at = (b * T + kk) * K
                        b_a = tl.load(p_tape + at - K + o_i, mask=o_i < K, other=NEG_INF).to(tl.float64)
                        b_r = tl.load(p_right + at + o_j, mask=o_j < K, other=NEG_INF).to(tl.float64)
                        if p_low is not None:
                            b_r += tl.load(p_low + at + o_j, mask=o_j < K, other=0.0).to(tl.float64)
                        b_xi = tl.exp(b_a[:, None] + b_g.to(tl.float64) + b_r[None, :])
                        b_rest += w * b_xi.to(dtype)
            if KIND != IS_PARTITION:
                _, b_to = tagged(p_steps if p_steps is None else p_steps + b * T, p_tags + b * T, o_k, live, K)
                _, b_from = tagged(p_steps if p_steps is None else p_steps + b * T, p_tags + b * T, o_k - 1, live, K)
                b_from = ((b_from[None, :] == o_i[:, None]) & live[None, :]).to(tl.float16)
                b_to = (b_to[:, None] == o_j[None, :]).to(tl.float16)
                b_seen = tl.dot(b_from, b_to).to(dtype)  # counts below 2^11 are exact
                if KIND == IS_NLL:
                    b_rest -= w * b_seen
                else:
                    b_rest += w * b_seen
    if KIND != IS_SCORE:
        b_e = tl.load(p_edges + o_i[:, None] * KP + o_j[None, :], mask=mask, other=0.0)
        b_rest += b_sum * b_e
    tl.store(p_parts + (slot.to(tl.int64) * K + o_i[:, None]) * K + o_j[None, :], b_rest, mask=mask)


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=INPUTS)
def viterbi_fwd_kernel(
    p_emissions, s_b, s_t, p_transitions, p_start, p_end, p_mask, p_lengths,
    p_row, p_steps, p_back, p_scores, p_path, T,
    K: constexpr, KP: constexpr, BI: constexpr, CHUNK: constexpr,
):  # fmt: skip
    """Best path of a sequence; p_path comes filled with -1."""
    b = tl.program_id(0).to(tl.int64)
    o, o_b = tl.arange(0, KP), tl.arange(0, BI)
    p_f = p_emissions + b * s_b
    p_row += b * KP
    p_back += b * T * K
    p_path += b * T
    if p_steps is not None:
        p_steps += b * T
    n = live_steps(p_mask, p_lengths, p_steps, b, T, CHUNK)
    score = n.to(tl.float64) * 0
    if n > 0:
        b_f = load_row(p_f + step_time(p_steps, 0, n) * s_t, o, K, tl.float64)
        b_next = load_row(p_f + step_time(p_steps, 1, n) * s_t, o, K, tl.float64)
        t_next = step_time(p_steps, 2, n)
        b_best = load_vector(p_start, o, K, tl.float64) + b_f  # [KP]
        b_nan = unscored(b_best)
        KEEP: constexpr = BI == KP
        if KEEP:
            mask = (o[:, None] < K) & (o[None, :] < K)
            b_g = tl.load(p_transitions + o[:, None] * K + o[None, :], mask=mask, other=NEG_INF).to(tl.float64)
        for k in range(1, n):
            b_f = b_next
            b_next = load_row(p_f + t_next * s_t, o, K, tl.float64)
            t_next = step_time(p_steps, k + 2, n)
            if KEEP:
                b_y = b_best[:, None] + b_g  # [KP, KP]
                b_nan = b_nan | tl.max(unscored(b_y), 0)
                b_best, b_from = tl.max(b_y, 0, return_indices=True, return_indices_tie_break_left=True)
            else:
                tl.debug_barrier()
                tl.store(p_row + o, b_best)
                tl.debug_barrier()
                b_best = tl.full([KP], NEG_INF, tl.float64)
                b_from = tl.zeros([KP], tl.int32)
                for i in range(0, K, BI):
                    o_i = i + o_b
                    mask = (o_i[:, None] < K) & (o[None, :] < K)
                    b_g = tl.load(p_transitions + o_i[:, None] * K + o[None, :], mask=mask, other=NEG_INF)
                    b_y = tl.load(p_row + o_i)[:, None] + b_g.to(tl.float64)  # [BI, KP]
                    b_nan = b_nan | tl.max(unscored(b_y), 0)
                    b_top, b_at = tl.max(b_y, 0, return_indices=True, return_indices_tie_break_left=True)
                    b_from = tl.where(b_top > b_best, b_at + i, b_from)  # strictly: the lowest tag wins
                    b_best = tl.where(b_top > b_best, b_top, b_best)
            tl.store(p_back + long(k) * K + o, b_from.to(p_back.dtype.element_ty), mask=o < K)
            b_best += b_f
            b_nan = b_nan | unscored(b_f)
        b_best += load_vector(p_end, o, K, tl.float64)
        b_nan = b_nan | unscored(b_best)
        score, tag = tl.max(b_best, 0, return_indices=True, return_indices_tie_break_left=True)
        if tl.max(b_nan, 0) > 0:
            score = float("nan") + score * 0
        if (score > NEG_INF) & (wild(p_lengths, b, T) == 0):
            tl.debug_barrier()
            tl.store(p_path + step_time(p_steps, n - 1, n), tag.to(tl.int64))
            for i in range(0, n - 1):
                k = n - 1 - i
                tag = tl.load(p_back + long(k) * K + tag).to(tl.int32)
                tl.store(p_path + step_time(p_steps, k - 1, n), tag.to(tl.int64))
    if wild(p_lengths, b, T):
        score += float("nan")
    tl.store(p_scores + b, score.to(p_scores.dtype.element_ty))


class Config(NamedTuple):
    """Block sizes in closed form from the number of tags and the width of a sum."""

    KP: int  # tags, padded
    BI: int  # rows of edges a step takes at once
    BW: int  # the same in float64
    BL: int  # the same in the log domain
    KEEP: bool  # edges stay in registers
    KEEP_WIDE: bool
    num_warps: int
    tile: int  # of the transition gradient
    tile_warps: int
    kappa: float  # float32: rounding errors of one step, in units of 2^-24; float64: the least sum it takes


def config(num_tags: int, size: int) -> Config:
    """size: bytes of a sum, 4 or 8."""
    padded = max(triton.next_power_of_2(num_tags), 2)
    num_warps = 1 if padded <= 32 else 4 if padded == 64 else 8 if padded <= 256 else 16
    threads = 32 * num_warps
    keep = padded <= (128 if size == 4 else 64)
    rows = padded if keep else 128 * threads // (padded * size)
    wide = padded if padded <= 64 else max(16 * threads // padded, 1)
    logs = min(padded, max(4 * threads // padded, 1))
    own = max(padded * rows // (4 * threads), 1)  # terms that one thread adds in sequence
    depth = own - 1 + (rows // own).bit_length() - 1 + (0 if keep else 2)
    tile = min(max(padded, 16), 64 if size == 4 else 32)
    kappa = depth + 5.0 if size == 4 else 1.0
    return Config(padded, rows, wide, logs, keep, padded <= 64, num_warps, tile, 8 if tile == 64 else 4, kappa)


CHUNK = 32  # steps of one sequence that a product of the transition gradient takes
SCAN = 128  # steps that compaction and scoring take at once
PARTS = 256  # programs that share the transition gradient
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def _scratch(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@contextlib.contextmanager
def _launching(like: Tensor) -> Iterator[None]:
    """On the tensors' own device; the interpreter's NumPy warns where -inf meets -inf, which kernels select away."""
    with torch.cuda.device_of(like) if like.is_cuda else contextlib.nullcontext(), warnings.catch_warnings():
        if INTERPRET:
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


def crf(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    tags: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor | None,
    kind: int,
    check: bool,
    value: Tensor,
    grads: list[Tensor] | None,
    paths: Tensor | None = None,
) -> int:
    """Fill value (B,) and grads; paths: int32 (B,), FAST, WIDE or LOG, how far each sequence had to go."""
    batch, time, num_tags = emissions.shape
    if batch == 0 or time == 0:
        for out in (value, *(grads or ()), *(() if paths is None else (paths,))):
            out.zero_()
        return OK
    dtype = transitions.dtype
    c = config(num_tags, dtype.itemsize)
    edges, edges64, turned, tape, right, low, count = (None,) * 7
    if kind != SCORE:
        edges, turned = (_scratch(emissions, c.KP, c.KP, dtype=dtype) for _ in range(2))
        edges64 = _scratch(emissions, c.KP, c.KP, dtype=torch.float64) if dtype == torch.float32 else None
    if grads is not None:
        count = _scratch(emissions, batch, dtype=torch.int32)
        if kind != SCORE:
            tape, right = (_scratch(emissions, batch, time, num_tags, dtype=dtype) for _ in range(2))
            low = _scratch(emissions, batch, time, num_tags, dtype=dtype) if dtype == torch.float32 else None
    shift = _scratch(emissions, c.KP, dtype=torch.int32)
    row = _scratch(emissions, batch, c.KP, dtype=torch.float64)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    paths = _scratch(emissions, batch, dtype=torch.int32) if paths is None else paths
    chain = (emissions, emissions.stride(0), emissions.stride(1), transitions, start, end, tags)
    common = (*chain, shift, row, steps, tape, count, paths, time)
    sizes = {"K": num_tags, "KP": c.KP, "KIND": kind}
    blocks = {"BI": c.BI, "BL": c.BL, "KEEP": c.KEEP, "CHUNK": SCAN, "num_warps": c.num_warps}
    with _launching(emissions):
        if kind != SCORE:
            block = {"BI": min(c.KP, 16), "BJ": min(c.KP, 64)}
            grid = (triton.cdiv(c.KP, 64),)
            chain_edges_kernel[grid](
                transitions, edges, turned, edges64, shift, K=num_tags, KP=c.KP, **block, **OPTIONS
            )
        out = (mask, lengths, edges, edges64, value, c.kappa)
        wide = {"BW": c.BW, "KEEP_WIDE": c.KEEP_WIDE}
        crf_fwd_kernel[(batch,)](*common, *out, **sizes, **blocks, **wide, **OPTIONS)
        if grads is None:
            return OK
        ends = _scratch(emissions, batch, 2, num_tags, dtype=dtype)
        grad = grads[0].zero_()
        out = (weights, turned, right, low, grad, grad.stride(0), grad.stride(1), ends)
        crf_bwd_kernel[(batch,)](*common, *out, **sizes, **blocks, **OPTIONS)
        tiles = triton.cdiv(c.KP, c.tile) ** 2
        slots = max(min(batch * triton.cdiv(time, CHUNK), PARTS // tiles), 1)
        parts = _scratch(emissions, slots, num_tags, num_tags, dtype=dtype)
        out = (transitions, tags, weights, edges, steps, tape, right, low, count, paths, parts, batch, time)
        block = {"BK": c.tile, "CHUNK": CHUNK, "num_warps": c.tile_warps}
        crf_counts_kernel[(slots, tiles)](*out, **sizes, **block, **OPTIONS)
    for share, total in zip((parts, ends[:, 0], ends[:, 1]), grads[1:], strict=True):
        torch.sum(share, 0, out=total)
    return OK


def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    tags: None,
    mask: Tensor | None,
    lengths: Tensor | None,
    check: bool,
    scores: Tensor,
    path: Tensor,
) -> int:
    """Fill scores (B,) and path (B, T)."""
    batch, time, num_tags = emissions.shape
    path.fill_(-1)
    if batch == 0 or time == 0:
        scores.zero_()
        return OK
    c = config(num_tags, 8)
    row = _scratch(emissions, batch, c.KP, dtype=torch.float64)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    back = _scratch(emissions, batch, time, num_tags, dtype=torch.uint8 if num_tags <= 256 else torch.int16)
    chain = (emissions, emissions.stride(0), emissions.stride(1), transitions, start, end, mask, lengths)
    blocks = {"K": num_tags, "KP": c.KP, "BI": c.BW, "CHUNK": SCAN, "num_warps": c.num_warps}
    with _launching(emissions):
        viterbi_fwd_kernel[(batch,)](*chain, row, steps, back, scores, path, time, **blocks, **OPTIONS)
    return OK
