"""Numbers, loads and products that the Triton kernels of the chain room are made of."""

import triton
import triton.language as tl
from triton.language import constexpr

from pyseq.kernels.chain import NLL, PARTITION, SCORE

NEG_INF: constexpr = constexpr(float("-inf"))
LIMIT: constexpr = constexpr(8192.0)  # scores beyond it leave the exp domain
FAR: constexpr = constexpr(-(1 << 30))  # exponent of a zero
TOP32: constexpr = constexpr(100)  # exponent of the largest state; products of a state >= 1 and an edge stay normal
TOP64: constexpr = constexpr(900)
LEAST32: constexpr = constexpr(2.0**11)  # least sum over reachable predecessors: bounds what floored edges add to it
LEAST64: constexpr = constexpr(1.0)
MASS32: constexpr = constexpr(2.0**-70)  # least posterior mass a backward step may see
MASS64: constexpr = constexpr(2.0**-600)
LN2: constexpr = constexpr(0.6931471805599453)
IS_PARTITION: constexpr = constexpr(PARTITION)
IS_NLL: constexpr = constexpr(NLL)
IS_SCORE: constexpr = constexpr(SCORE)
# arguments that change from call to call must not compile a kernel again
PER_CALL = ["T", "s_b", "s_t", "g_b", "g_t", "B", "kappa"]
INPUTS = ["p_emissions", "p_tags", "p_mask", "p_lengths", "p_weights", "p_value", "p_grad", "p_scores", "p_path"]


@triton.jit
def split(x):
    """exp(x) = p * 2^n with p in [0.7, 1.5]; p = 0 where x = -inf. Exact reduction for |x| <= LIMIT."""
    within = (x >= -LIMIT) & (x <= LIMIT)
    z = tl.where(x == NEG_INF, 0.0, x)
    n = tl.where(within, tl.floor(z * 1.4426950408889634 + 0.5), 0.0)
    if x.dtype == tl.float32:
        r = z - n * 0.693359375  # 9 bits, then 10, then the rest: each product with n is exact
        r = r - n * -0.00021219253540039062
        r = r - n * -1.904654323148236e-09
        p = 1.0 / 5040 * r + 1.0 / 720
        p = p * r + 1.0 / 120
        p = p * r + 1.0 / 24
        p = p * r + 1.0 / 6
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
    else:
        r = z - n * 6.93145751953125e-1
        r = r - n * 1.42860682030941723212e-6
        p = tl.exp(r)
    return tl.where(x == NEG_INF, 0.0, p), n.to(tl.int32)


@triton.jit
def clamped(x):
    """x in [-LIMIT, LIMIT], -LIMIT where it is NaN: maximum alone keeps a NaN in the interpreter before Triton 3.8."""
    return tl.where(x > -LIMIT, tl.minimum(x, LIMIT), -LIMIT)


@triton.jit
def pow2(n):
    """2^n in float32, n clamped to normal numbers."""
    n = tl.minimum(tl.maximum(n, -126), 127)
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pow2_64(n):
    n = tl.minimum(tl.maximum(n, -1022), 1023).to(tl.int64)
    return ((n + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scaled(x, n):
    """x * 2^n, exact unless it leaves the normal numbers."""
    if x.dtype == tl.float32:
        out = x * pow2(n)
    else:
        out = x * pow2_64(n)
    return out


@triton.jit
def exponent(x):
    """floor(log2 x) of a positive normal x."""
    if x.dtype == tl.float32:
        out = (x.to(tl.int32, bitcast=True) >> 23) - 127
    else:
        out = ((x.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
    return out


@triton.jit
def long(k):
    return tl.zeros([], tl.int64) + k


@triton.jit
def load_vector(p, o, K: constexpr, dtype: constexpr):
    if p is None:
        out = tl.zeros(o.shape, dtype)
    else:
        out = tl.load(p + o, mask=o < K, other=0.0).to(dtype)
    return out


@triton.jit
def load_row(p, o, K: constexpr, dtype: constexpr):
    return tl.load(p + o, mask=o < K, other=NEG_INF).to(dtype)


@triton.jit
def step_time(p_steps, k, n):
    """Time of live step k, as int64."""
    if p_steps is None:
        t = tl.minimum(k, n - 1)
    else:
        t = tl.load(p_steps + tl.minimum(k, n - 1))
    return t.to(tl.int64)


@triton.jit
def live_steps(p_mask, p_lengths, p_steps, b, T, CHUNK: constexpr):
    """Number of live steps; with a mask, their times go to p_steps."""
    if p_mask is not None:
        n = T * 0
        for t in range(0, T, CHUNK):
            o_t = t + tl.arange(0, CHUNK)
            b_live = tl.load(p_mask + b * T + o_t, mask=o_t < T, other=0).to(tl.int32)
            tl.store(p_steps + n + tl.cumsum(b_live, 0) - b_live, o_t, mask=b_live > 0)
            n += tl.sum(b_live, 0)
        tl.debug_barrier()
    elif p_lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(p_lengths + b), 0), T).to(tl.int32)
    else:
        n = T * 1
    return n


@triton.jit
def wild(p_lengths, b, T):
    """1 where a length is out of range, which makes its sequence NaN, else 0."""
    if p_lengths is not None:
        n = tl.load(p_lengths + b)
        out = ((n < 0) | (n > T)).to(tl.int32)
    else:
        out = T * 0
    return out


@triton.jit
def counted(p_count, p_weights, b, dtype: constexpr):
    """Live steps of a sequence and its weight, which is NaN where its value is."""
    n = tl.load(p_count + b)
    if p_weights is None:
        w = tl.full([], 1.0, dtype)
    else:
        w = tl.load(p_weights + b)
    return tl.abs(n), tl.where(n < 0, float("nan"), w)


@triton.jit
def unscored(b_x):
    """1 where a score is NaN or +inf, else 0."""
    return 1 - (b_x < float("inf")).to(tl.int32)


@triton.jit
def resident(p_edges, KP: constexpr, BI: constexpr, KEEP: constexpr):
    """The edges where they fit in registers, else one number to pass along."""
    if KEEP:
        o = tl.arange(0, KP)
        edges = tl.load(p_edges + o[:, None] * KP + o[None, :])  # [KP, KP]
    else:
        edges = 0.0
    return edges


@triton.jit
def product(b_x, edges, p_edges, p_row, K: constexpr, KP: constexpr, BI: constexpr, KEEP: constexpr):
    """x @ edges. Where edges do not fit in registers they are streamed, x going through memory."""
    if KEEP:
        out = tl.sum(b_x[:, None] * edges, 0)
    else:
        o, o_i = tl.arange(0, KP), tl.arange(0, BI)
        tl.debug_barrier()
        tl.store(p_row + o, b_x.to(tl.float64))
        tl.debug_barrier()
        out = tl.zeros([KP], b_x.dtype)
        b_lost = tl.zeros([KP], b_x.dtype)  # compensated, so that errors do not grow with the number of tiles
        for i in range(0, K, BI):
            b_i = tl.load(p_row + i + o_i).to(b_x.dtype)
            b_e = tl.load(p_edges + (i + o_i)[:, None] * KP + o[None, :])  # [BI, KP]
            b_add = tl.sum(b_i[:, None] * b_e, 0) - b_lost
            b_sum = out + b_add
            b_lost = (b_sum - out) - b_add
            out = b_sum
    return out


@triton.jit
def log_product(b_x, p_row, p_transitions, s_from, s_to, K: constexpr, KP: constexpr, BL: constexpr):
    """LSE over i of x_i + transitions, its maximum taken a destination; float64."""
    o, o_l = tl.arange(0, KP), tl.arange(0, BL)
    tl.debug_barrier()
    tl.store(p_row + o, b_x)
    tl.debug_barrier()
    b_top = tl.full([KP], NEG_INF, tl.float64)
    b_sum = tl.zeros([KP], tl.float64)
    for i in range(0, K, BL):
        o_i = i + o_l
        b_g = tl.load(
            p_transitions + o_i[:, None] * s_from + o[None, :] * s_to,
            mask=(o_i[:, None] < K) & (o[None, :] < K),
            other=NEG_INF,
        )
        b_y = tl.load(p_row + o_i)[:, None] + b_g.to(tl.float64)  # [BL, KP]
        b_new = tl.maximum(b_top, tl.max(b_y, 0))
        b_ref = tl.where(b_new == NEG_INF, 0.0, b_new)
        b_sum = b_sum * tl.exp(b_top - b_ref) + tl.sum(tl.exp(b_y - b_ref[None, :]), 0)
        b_top = b_new
    b_dead = b_sum == 0
    return tl.where(b_dead, NEG_INF, tl.log(tl.where(b_dead, 1.0, b_sum)) + b_top)


@triton.jit
def log_sum(b_x):
    top = tl.max(b_x, 0)
    top = tl.where(top == NEG_INF, 0.0, top)
    total = tl.sum(tl.exp(b_x - top), 0)
    dead = total == 0
    return tl.where(dead, NEG_INF, tl.log(tl.where(dead, 1.0, total)) + top)


@triton.jit
def shares(b_x):
    """exp(x) over its sum, zeros where every x is -inf, and the log of that sum."""
    top = tl.max(b_x, 0)
    top = tl.where(top == NEG_INF, 0.0, top)
    b_p = tl.exp(b_x - top)
    total = tl.sum(b_p, 0)
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    return b_p / total, tl.where(dead, NEG_INF, tl.log(total) + top)


@triton.jit
def with_largest(b_x, b_f):
    """x plus a step's scores less their maximum, where that is finite: what a step adds for all tags alike is not to
    cost digits. Tags whose x is -inf have no say in it."""
    b_f = tl.where(b_x == NEG_INF, NEG_INF, b_f)
    top = tl.max(b_f, 0)
    return b_x + (b_f - tl.where(tl.abs(top) < float("inf"), top, 0.0))


@triton.jit
def tagged(p_steps, p_tags, o_k, live, K: constexpr):
    """Times and tags of live steps, int64, tags clamped."""
    if p_steps is None:
        b_t = tl.where(live, o_k, 0).to(tl.int64)
    else:
        b_t = tl.load(p_steps + o_k, mask=live, other=0).to(tl.int64)
    b_y = tl.load(p_tags + b_t, mask=live, other=0)
    return b_t, tl.minimum(tl.maximum(b_y, 0), K - 1)


@triton.jit
def store_state(p, b_a, o, K: constexpr):
    """A state on the tape, 1 to 2 at most; reachable ones stay above 0, so that a backward step sees what was lost."""
    DOWN: constexpr = 2.0**-100 if b_a.dtype == tl.float32 else 2.0**-900  # undoes TOP32, TOP64
    TINY: constexpr = 2.0**-126 if p.dtype.element_ty == tl.float32 else 2.0**-1022
    b_a = tl.where(b_a > 0, tl.maximum(b_a * DOWN, TINY), 0.0)
    tl.store(p + o, b_a, mask=o < K)
