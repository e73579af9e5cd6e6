"""Triton kernels of the chain room that go back over the tape: marginals and expected pair counts."""

import triton
import triton.language as tl
from triton.language import constexpr

from pyseq.kernels.chain._triton import (
    FAR,
    INPUTS,
    IS_NLL,
    IS_PARTITION,
    IS_SCORE,
    MASS32,
    MASS64,
    NEG_INF,
    PER_CALL,
    counted,
    exponent,
    load_row,
    load_vector,
    log_product,
    long,
    product,
    resident,
    scaled,
    shares,
    split,
    step_time,
    tagged,
    with_largest,
)


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
    b_on = load_vector(p_end, o, K, tl.float64)  # first, whether a path goes on from each tag to the end: 0 or -inf
    for i in range(0, n):
        k = n - 1 - i
        if i > 0:
            b_on = log_product(b_on, p_row, p_transitions, 1, K, K, KP, BL)
        b_f = load_row(p_f + step_time(p_steps, k, n) * s_t, o, K, tl.float64)
        b_on = tl.where((b_on > NEG_INF) & (b_f > NEG_INF), tl.zeros([KP], tl.float64), NEG_INF)
        tl.store(p_right + long(k) * K + o, b_on.to(p_right.dtype.element_ty), mask=o < K)
    tl.debug_barrier()
    b_alpha = with_largest(b_on, load_vector(p_start, o, K, tl.float64))
    for k in range(0, n):
        if k > 0:
            b_alpha = log_product(b_alpha, p_row, p_transitions, K, 1, K, KP, BL)
        b_on = load_row(p_right + long(k) * K, o, K, tl.float64)
        b_f = load_row(p_f + step_time(p_steps, k, n) * s_t, o, K, tl.float64)
        b_alpha = with_largest(tl.where(b_on == NEG_INF, NEG_INF, b_alpha), b_f)
        top = tl.max(b_alpha, 0)
        b_alpha = tl.where(b_alpha == NEG_INF, NEG_INF, b_alpha - tl.where(top == NEG_INF, 0.0, top))
        b_high = b_alpha.to(p_tape.dtype.element_ty)
        at = long(k) * K + o
        tl.store(p_tape + at, b_high, mask=o < K)
        if PAIR:
            b_low = tl.where(b_alpha == NEG_INF, 0.0, b_alpha - b_high.to(tl.float64))
            tl.store(p_low + at, b_low.to(tl.float32), mask=o < K)
    tl.debug_barrier()
    b_beta = tl.where(b_alpha == NEG_INF, NEG_INF, tl.zeros([KP], tl.float64))
    b_beta = with_largest(b_beta, load_vector(p_end, o, K, tl.float64))
    b_mu, z = shares(b_alpha + b_beta)
    b_beta = b_beta - z
    t = step_time(p_steps, n - 1, n)
    _put(p_ends + K, b_mu, p_tags, t, w, o, K, KIND)
    for i in range(0, n - 1):
        k = n - 1 - i
        _put(p_grad + t * g_t, b_mu, p_tags, t, w, o, K, KIND)
        b_c = with_largest(b_beta, load_row(p_f + t * s_t, o, K, tl.float64))
        b_beta = log_product(b_c, p_row, p_transitions, 1, K, K, KP, BL)
        at = long(k - 1) * K + o
        b_alpha = tl.load(p_tape + at, mask=o < K, other=NEG_INF).to(tl.float64)
        if PAIR:
            b_alpha += tl.load(p_low + at, mask=o < K, other=0.0).to(tl.float64)
        b_beta = tl.where(b_alpha == NEG_INF, NEG_INF, b_beta)
        b_mu, z = shares(b_alpha + b_beta)
        b_beta = b_beta - z
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
                        b_xi = b_a[:, None] + b_g.to(tl.float64) + b_r[None, :]
                        b_xi = tl.minimum(b_xi, 0.0)  # more where scores beyond 2^50 have swallowed digits
                        b_rest += w * tl.exp(b_xi).to(dtype)
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
