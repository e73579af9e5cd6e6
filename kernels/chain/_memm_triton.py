"""Triton launcher of a maximum-entropy Markov model's local steps: a program a step, its tags in blocks."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyseq.kernels import OK, UNFIT
from pyseq.kernels.chain import LabelledPath, LocalSteps

MOST = 64 if os.environ.get("TRITON_INTERPRET", "0") == "1" else 2048  # tags of a block


@triton.jit
def _logits(p_scores, p_bias, o, inside, h, JOINED, WIDE: tl.constexpr):
    """-inf outside. JOINED: whether the step has a context."""
    x = tl.load(p_scores + o, inside, other=float("-inf")).to(WIDE)
    return (x + tl.load(p_bias + o, inside & JOINED, other=0)) * h


@triton.jit(do_not_specialize=["N"])
def local_steps_kernel(
    p_scores, p_bias, p_context, p_label, p_scale, p_weight, p_loss, p_rows, N, K, FACTOR: tl.constexpr,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """p_loss (N,) float64; p_rows (N, K): gradients in the scores, or None; p_weight (K,) or None."""
    WIDE: tl.constexpr = p_bias.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    y, context, scale = tl.load(p_label + i), tl.load(p_context + i), tl.load(p_scale + i)
    p_scores += i * K
    if (y < 0) | (scale == 0):
        tl.store(p_loss + i, tl.zeros((), tl.float64))
        if p_rows is not None:
            for k in range(0, K, BLOCK):
                tl.store(p_rows + i * K + k + o, tl.zeros([BLOCK], WIDE), k + o < K)
        return
    joined = context >= 0
    p_bias += tl.where(joined, context, 0) * K
    h = tl.where(joined, FACTOR, 1.0).to(WIDE)
    right = tl.load(p_scores + y).to(WIDE) + tl.load(p_bias + y, joined, other=0)
    right *= h
    if right == float("-inf"):
        tl.store(p_loss + i, tl.full((), float("inf"), tl.float64))
        if p_rows is not None:
            for k in range(0, K, BLOCK):
                tl.store(p_rows + i * K + k + o, tl.zeros([BLOCK], WIDE), k + o < K)
        return
    top = tl.full((), float("-inf"), WIDE)
    total = tl.zeros((), WIDE)
    finite = tl.zeros((), WIDE)
    weights = tl.zeros((), WIDE)
    dot = tl.zeros((), WIDE)
    for k in range(0, K, BLOCK):
        x = _logits(p_scores, p_bias, k + o, k + o < K, h, joined, WIDE)
        new = tl.maximum(top, tl.max(x, 0))
        still = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        total = total * tl.exp(top - still) + tl.sum(tl.exp(x - still), 0)
        top = new
        if SMOOTHING > 0:
            there = x > float("-inf")
            w = there.to(WIDE)
            if p_weight is not None:
                w = tl.where(there, tl.load(p_weight + k + o, k + o < K, other=0), 0.0)
            finite += tl.sum(there.to(WIDE), 0)
            weights += tl.sum(w, 0)
            dot += tl.sum(tl.where(there, w * (x - right), 0.0), 0)
    share = tl.full((), 1 - SMOOTHING, WIDE)
    if p_weight is not None:
        share *= tl.load(p_weight + y)
    each = tl.zeros((), WIDE)
    if SMOOTHING > 0:
        each = tl.full((), SMOOTHING, WIDE) / finite
    away = tl.log(total) + (top - right)
    odd = total != total
    for k in range(0, K, BLOCK):  # a maximum does not keep what is no number
        x = _logits(p_scores, p_bias, k + o, k + o < K, h, joined, WIDE)
        odd |= tl.max(((x < float("inf")) == 0).to(tl.int32), 0) > 0
    loss = scale * (share * away + each * (weights * away - dot))
    tl.store(p_loss + i, tl.where(odd, float("nan"), loss).to(tl.float64))
    if p_rows is not None:
        of_exp = h * scale * (share + each * weights) / total
        for k in range(0, K, BLOCK):
            inside = k + o < K
            x = _logits(p_scores, p_bias, k + o, inside, h, joined, WIDE)
            g = of_exp * tl.exp(x - top) - tl.where(k + o == y, h * scale * share, 0.0)
            if SMOOTHING > 0:
                w = h * scale * each
                if p_weight is not None:
                    w *= tl.load(p_weight + k + o, inside, other=0)
                g -= tl.where(x > float("-inf"), w, 0.0)
            tl.store(p_rows + i * K + k + o, tl.where(odd, float("nan"), g), inside)


def neighbours(path: LabelledPath, num_tags: int, label: Tensor, before: Tensor, after: Tensor) -> int:
    """By torch; nobody waits for what is out of range."""
    time = path.tags.size(1)
    step = torch.arange(time, device=path.tags.device)
    live = path.mask
    if live is None:
        live = (step < (time if path.lengths is None else path.lengths.unsqueeze(1))).expand_as(label)
    label.copy_(torch.where(live, path.tags.clamp(0, num_tags - 1), -1))
    for out, flip in ((before, False), (after, True)):
        tags, there = (label.flip(1), live.flip(1)) if flip else (label, live)
        seen = torch.where(there, step, -1).cummax(1).values
        at = torch.nn.functional.pad(seen[:, :-1], (1, 0), value=-1)
        found = torch.where(there & (at >= 0), tags.gather(1, at.clamp(min=0)), -1)
        out.copy_(found.flip(1) if flip else found)
    return OK


def local_steps(
    steps: LocalSteps,
    factor: float,
    smoothing: float,
    accumulate: bool,
    loss: Tensor,
    grad: Tensor | None,
    grad_bias: Tensor | None,
) -> int:
    if not all(x.is_contiguous() for x in (*steps, loss, grad, grad_bias) if x is not None):
        return UNFIT
    scores, bias, context, *_ = steps
    count, tags = scores.shape
    rows = None if grad is None else torch.empty_like(grad)
    if count:
        block = min(triton.next_power_of_2(tags), MOST)
        local_steps_kernel[(count,)](
            *steps[:5], steps.weight, loss, rows, count, tags, factor, smoothing, block,
            num_warps=max(min(block // 256, 8), 1),
        )  # fmt: skip
    if grad is not None and grad_bias is not None and rows is not None:
        grad.add_(rows) if accumulate else grad.copy_(rows)
        wide = torch.float64 if len(bias) < count else bias.dtype  # sums of many
        sums = torch.zeros(len(bias) + 1, tags, dtype=wide, device=bias.device)
        at = torch.where(context < 0, len(bias), context)
        grad_bias.copy_(sums.index_put_((at,), rows.to(wide), accumulate=True)[:-1])
    return OK
