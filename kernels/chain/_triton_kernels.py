"""Triton kernels of the chain room: edges, the value and its tape, best paths, then marginals and pair counts."""

import triton
import triton.language as tl
from triton.language import constexpr

from pyseq.kernels.chain._triton import (
    FAR,
    INPUTS,
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
    PER_CALL,
    TOP32,
    TOP64,
    clamped,
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
    shares,
    split,
    step_time,
    store_state,
    tagged,
    unscored,
    wild,
    with_largest,
)


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
        _, b_n = split(clamped(b_g))
        b_shift = tl.maximum(b_shift, tl.max(tl.where(b_g > NEG_INF, b_n, FAR), 0))
        b_ok = tl.minimum(b_ok, tl.min((b_g <= LIMIT).to(tl.int32), 0))
    b_ok = b_ok * ((b_shift == FAR) | (b_shift > -10000)).to(tl.int32)
    b_shift = tl.where(b_shift == FAR, 0, b_shift)
    tl.store(p_shift + o_j, tl.where(b_ok == 1, b_shift, FAR))
    for i in range(0, KP, BI):
        o_i = i + o_b
        mask = (o_i[:, None] < K) & (o_j[None, :] < K)
        b_g = tl.load(p_transitions + o_i[:, None] * K + o_j[None, :], mask=mask, other=NEG_INF).to(tl.float64)
        b_p, b_n = split(tl.where(b_g == NEG_INF, NEG_INF, clamped(b_g)))
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
