"""Numba launcher of a maximum-entropy Markov model's local steps: serial, those of one context together."""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pyseq.kernels import OK, UNFIT
from pyseq.kernels._numba import EXACT, JIT, exp, sorted_by_key
from pyseq.kernels.chain import BAD_LENGTH, BAD_TAG, FORBIDDEN, LabelledPath, LocalSteps


@njit(**JIT)
def _exponentials(x, top, out):
    total = 0.0
    for j in range(x.shape[0]):
        e = exp(x[j] - top)
        out[j] = e
        total += e
    return total


@njit(**EXACT)
def _row(f, b, has_bias, factor, y, scale, weight, smoothing, logits, grads):
    """Loss of a step, and its gradient in the scores into `grads`; NaN where a score is no number."""
    h = factor if has_bias else 1.0
    if (np.float64(f[y]) + np.float64(b[y]) if has_bias else np.float64(f[y])) == -np.inf:
        grads[:] = 0.0
        return np.inf
    top, bad = -np.inf, False
    for j in range(f.shape[0]):
        x = (np.float64(f[j]) + np.float64(b[j])) * h if has_bias else np.float64(f[j])
        bad |= not x < np.inf
        top = max(top, x)
        logits[j] = x
    if bad:
        grads[:] = np.nan
        return np.nan
    right, finite, weights, dot = logits[y] - top, 0.0, 0.0, 0.0
    if smoothing > 0:
        for j in range(f.shape[0]):
            if logits[j] > -np.inf:
                w = np.float64(weight[j]) if weight.shape[0] else 1.0
                finite, weights, dot = finite + 1, weights + w, dot + w * (logits[j] - top)
    total = _exponentials(logits, top, grads)
    each = smoothing / finite if finite > 0 else 0.0
    share = (1 - smoothing) * (np.float64(weight[y]) if weight.shape[0] else 1.0)
    log_total, of_exp = math.log(total), h * scale * (share + each * weights) / total
    for j in range(f.shape[0]):
        grads[j] *= of_exp
    grads[y] -= h * scale * share
    if each > 0:
        for j in range(f.shape[0]):
            if logits[j] > -np.inf:
                grads[j] -= h * scale * each * (np.float64(weight[j]) if weight.shape[0] else 1.0)
    return scale * (share * (log_total - right) + each * (weights * log_total - dot))


@njit(**EXACT)
def _steps(scores, bias, context, label, scale, weight, factor, smoothing, accumulate, loss, grad, grad_bias):
    tags, contexts, wanted = scores.shape[1], bias.shape[0], grad.shape[0] > 0
    keys = np.empty(len(context), np.int64)
    for i in range(len(context)):
        keys[i] = -1 if label[i] < 0 else contexts if context[i] < 0 else context[i]
        if label[i] < 0:
            loss[i] = 0.0
            if wanted and not accumulate:
                grad[i] = 0.0
    order, begin = sorted_by_key(keys, contexts + 1)
    logits, grads, sums, status = np.empty(tags), np.empty(tags), np.empty(tags), OK
    for c in range(contexts + 1):
        sums[:] = 0.0
        for at in range(begin[c], begin[c + 1]):
            i = order[at]
            if scale[i] == 0:
                loss[i] = 0.0
                if wanted and not accumulate:
                    grad[i] = 0.0
                continue
            b = bias[c] if c < contexts else scores[i]
            loss[i] = _row(
                scores[i], b, c < contexts, factor, label[i], np.float64(scale[i]), weight, smoothing, logits, grads
            )
            if loss[i] == np.inf:
                status = FORBIDDEN
            if wanted:
                for j in range(tags):
                    grad[i, j] = grad[i, j] + grads[j] if accumulate else grads[j]
                    sums[j] += grads[j]
        if wanted and c < contexts:
            for j in range(tags):
                grad_bias[c, j] = sums[j]
    return status


@njit(**EXACT)
def _neighbours(tags, mask, lengths, num_tags, label, before, after):
    status = OK
    for b in range(tags.shape[0]):
        length, last, at = lengths[b] if lengths.shape[0] else tags.shape[1], -1, -1
        if length < 0 or length > tags.shape[1]:
            status = BAD_LENGTH
        for t in range(tags.shape[1]):
            label[b, t] = before[b, t] = after[b, t] = -1
            if not (mask[b, t] if mask.shape[0] else t < length):
                continue
            y = min(max(tags[b, t], 0), num_tags - 1)
            if y != tags[b, t] and status == OK:
                status = BAD_TAG
            label[b, t], before[b, t] = y, last
            if at >= 0:
                after[b, at] = y
            last, at = y, t
    return status


def neighbours(path: LabelledPath, num_tags: int, label: Tensor, before: Tensor, after: Tensor) -> int:
    mask = torch.empty(0, 0, dtype=torch.bool) if path.mask is None else path.mask
    lengths = torch.empty(0, dtype=torch.int64) if path.lengths is None else path.lengths
    given = path.tags, mask, lengths, label, before, after
    if not all(x.is_contiguous() for x in given):
        return UNFIT
    arrays = [x.numpy() for x in given]
    status: int = _neighbours(*arrays[:3], num_tags, *arrays[3:])
    return status


def local_steps(
    steps: LocalSteps,
    factor: float,
    smoothing: float,
    accumulate: bool,
    loss: Tensor,
    grad: Tensor | None,
    grad_bias: Tensor | None,
) -> int:
    none = torch.empty(0, 0, dtype=steps.scores.dtype)
    steps = steps._replace(weight=none[:, 0:0].view(-1) if steps.weight is None else steps.weight)
    outputs = loss, none if grad is None else grad, none if grad_bias is None else grad_bias
    if not all(x.is_contiguous() for x in (*steps, *outputs) if x is not None):
        return UNFIT
    given = [x.detach().numpy() for x in steps if x is not None]
    status: int = _steps(*given, factor, smoothing, accumulate, *(x.numpy() for x in outputs))
    return status
