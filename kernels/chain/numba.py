"""Numba launchers of the chain room: serial, float64 inside, one sequence at a time.

A sequence runs in the scaled exponential domain; where a reachable state underflows it is done again in the log domain.
All in one file: Numba's cache on disk watches only the file of the function that Python calls.
"""

import math

import numpy as np
from numba import njit
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels._numba import EXACT, JIT, exp
from pyseq.kernels.chain import BAD_LENGTH, BAD_TAG, PARTITION, SCORE, Chain, Gradients, Sampling, reduces
from pyseq.kernels.chain._entropy_numba import entropies
from pyseq.kernels.chain._memm_numba import local_steps, neighbours

__all__ = ["crf", "entropy", "local_steps", "n_best", "neighbours", "sample", "viterbi"]
_INF = np.inf
_LANES = 8  # tags are padded to whole vectors
_TINY = 1e-200  # a state below this, relative to the step before, may have lost digits to underflow
_SMALLEST, _HIDDEN = -700.0, -600.0  # log of what a state that holds 0 may hide, and of what no state would notice
_NEAR = 1e4  # start scores beyond it leave the exp domain
_MODEST = 1e4  # sum of squared scores of a step whose exponentials need no shift


@njit(**JIT)
def _dot(x, y):
    total = 0.0
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@njit(**JIT)
def _steps(b, time, mask, lengths, steps):
    """Positions of the live steps of sequence b into `steps`; returns their count, or -1 for a length out of range."""
    if mask.shape[0]:
        n = 0
        for t in range(time):
            steps[n] = t
            n += mask[b, t]
        return n
    n = lengths[b]
    for t in range(min(max(n, 0), time)):
        steps[t] = t
    return n if n >= 0 and n <= time else -1


@njit(**JIT)
def _gold(f, transitions, start, end, tags, steps, n):
    """Score of the path `tags` (of one sequence) over its live steps."""
    score = 0.0
    for k in range(n):
        y = tags[steps[k]]
        score += np.float64(f[steps[k], y])
        score += np.float64(start[y]) if k == 0 else np.float64(transitions[tags[steps[k - 1]], y])
    return score + np.float64(end[tags[steps[n - 1]]])


@njit(**JIT)
def _gold_counts(tags, steps, n, weight, g_em, counts, g_start, g_end):
    for k in range(n):
        y = tags[steps[k]]
        g_em[steps[k], y] += weight
        if k == 0:
            g_start[y] += weight
        else:
            counts[tags[steps[k - 1]], y] += weight
    g_end[tags[steps[n - 1]]] += weight


@njit(**JIT)
def _lose(steps, n, g_em, pairs, g_start, g_end):
    """NaN in all that a sequence reads."""
    for k in range(n):
        g_em[steps[k]] = np.nan
    if n > 1:
        pairs[:] = np.nan
    g_start[:] = np.nan
    g_end[:] = np.nan


@njit(**JIT)
def _underflowed(a, f, transitions, start, steps, last, num_tags):
    """Whether a state that some path reaches holds 0 at a step up to `last`, as only unreachable states should."""
    reached = np.empty(num_tags, np.bool_)
    before = np.empty(num_tags, np.bool_)
    for k in range(last + 1):
        for j in range(num_tags):
            if k == 0:
                possible = start[j] > -_INF
            else:
                possible = False
                for i in range(num_tags):
                    possible |= before[i] and transitions[i, j] > -_INF
            reached[j] = possible and f[steps[k], j] > -_INF
            if reached[j] and not a[k, j] > 0.0:
                return True
        before[:] = reached
    return False


@njit(**JIT)
def _forward(f, weights_in, start, steps, n, num_tags, a, u):
    """Fill a (n, P) with scaled forward vectors and u (n, P) so that a[k] = (a[k-1] @ E) * u[k].

    Returns the sum of the logs of the scales, without the n - 1 maxima of the transitions; whether no state fell below
    _TINY but to 0 and no score was NaN or +inf; and the last step at which a state that holds 0 may hide too much, or
    -1.
    """
    padded = a.shape[1]
    log_scale = 0.0
    scales = 1.0  # product of those not in log_scale yet: a logarithm a step would cost a tenth of the time
    clean = True
    suspect = -1
    hidden = -_INF
    for k in range(n):
        now, step, row = a[k], u[k], f[steps[k]]
        if k == 0:
            now[:num_tags] = 1.0
        else:
            for j in range(num_tags):
                now[j] = _dot(a[k - 1], weights_in[j])
        size = 0.0
        absent = 0
        for j in range(num_tags):
            score = np.float64(row[j])
            if k == 0:
                score += np.float64(start[j])
            step[j] = score
            size += score * score
            absent += not now[j] > 0.0
        shift = 0.0
        if absent or not size < _MODEST:
            shift = -_INF  # of the states that are held: another may have any score
            for j in range(num_tags):
                shift = max(shift, step[j] if now[j] > 0.0 else -_INF)
                clean &= step[j] < _INF
            shift = shift if shift > -_INF else 0.0
            log_scale += shift
        top = 0.0
        few = num_tags - padded
        for j in range(padded):
            weight = exp(step[j] - shift if now[j] > 0.0 else -_INF)
            mass = now[j] * weight
            step[j] = weight
            now[j] = mass
            top += mass
            few += not mass >= _TINY
        scale = 1.0 / top if top > 0.0 else 1.0
        if few == 0:
            hidden = -_INF
        else:
            before, hidden = max(hidden, _SMALLEST) + math.log(num_tags), -_INF
            for j in range(num_tags):
                if now[j] == 0.0:
                    step[j] = 0.0  # no path goes through it; seen from the end it might grow without bound
                    score = np.float64(row[j]) + (np.float64(start[j]) if k == 0 else 0.0)
                    mass = 1.0 if k == 0 else _dot(a[k - 1], weights_in[j])
                    hidden = max(hidden, score - shift + math.log(scale) + (math.log(mass) if mass > 0.0 else before))
                elif not now[j] >= _TINY:
                    clean = False
            suspect = k if hidden > _HIDDEN or top == 0.0 else suspect
        scales *= scale
        if not 1e-80 < scales < 1e80:
            log_scale -= math.log(scales)
            scales = 1.0
        for j in range(padded):
            now[j] *= scale
            step[j] *= scale
    return log_scale - math.log(scales), clean, suspect


@njit(**JIT)
def _certified(roundings, log_z, f, start, offset, last):
    """Whether so many roundings are what the contract allows beside log Z, the largest score of a first step f, or the
    largest log sum of paths to a last one, offset less the logs of `last`."""
    size = abs(log_z)
    if not roundings * 2.0**-29 <= 7.0 * size:
        for j in range(len(f)):
            score = abs(np.float64(f[j]) + np.float64(start[j]))
            size = max(size, score if score < _INF else 0.0)
            size = max(size, abs(offset + math.log(last[j])) if last[j] > 0.0 else 0.0)
    return roundings * 2.0**-29 <= 7.0 * size


@njit(**JIT)
def _backward(a, u, weights_out, end_weights, steps, n, num_tags, weight, g_em, counts, g_start, g_end):
    """Add the weighted expected counts; `counts` lacks the factor E. False, and nothing added, on lost digits."""
    padded = a.shape[1]
    b = end_weights.copy()
    later = np.empty((n, padded))  # u * b / overlap of each step
    for k in range(n - 1, -1, -1):
        overlap = 0.0  # about 1 but at the last step: b is kept so by dividing by it
        for j in range(padded):
            overlap += a[k, j] * b[j]
        if not (overlap >= _TINY and overlap <= 1e100):
            return False
        factor = 1.0 / overlap
        for j in range(padded):
            later[k, j] = u[k, j] * b[j] * factor
            u[k, j] = a[k, j] * b[j] * factor
        for i in range(num_tags):
            b[i] = _dot(later[k], weights_out[i])
    for k in range(n):
        row = g_em[steps[k]]
        for j in range(num_tags):
            row[j] += weight * u[k, j]
    alone = 1 + (n - 1) % 4
    for k in range(1, alone):
        for i in range(num_tags):
            mass = weight * a[k - 1, i]
            for j in range(padded):
                counts[i, j] += mass * later[k, j]
    for k in range(alone, n, 4):  # four steps a pass over the counts
        for i in range(num_tags):
            w0, w1, w2, w3 = weight * a[k - 1, i], weight * a[k, i], weight * a[k + 1, i], weight * a[k + 2, i]
            for j in range(padded):
                pair = w0 * later[k, j] + w1 * later[k + 1, j]
                counts[i, j] += pair + (w2 * later[k + 2, j] + w3 * later[k + 3, j])
    for j in range(num_tags):
        g_start[j] += weight * u[0, j]
        g_end[j] += weight * u[n - 1, j]
    return True


@njit(**EXACT)
def _log_sum(terms):
    top = -_INF
    for x in terms:
        top = x if x > top or x != x else top
    if top == -_INF or top != top:
        return top
    total = 0.0
    for x in terms:
        total += math.exp(x - top)
    return top + math.log(total)


@njit(**EXACT)
def _bring_to_zero(x):
    """Subtract the largest and return it; 0 where there is none."""
    top = x.max()
    top = top if abs(top) < _INF else 0.0
    x -= top
    return top


@njit(**EXACT)
def _to_probabilities(x):
    """exp(x) over its sum; zeros where every x is -inf."""
    _bring_to_zero(x)
    total = 0.0
    for j in range(len(x)):
        x[j] = math.exp(x[j])
        total += x[j]
    for j in range(len(x)):
        x[j] = 0.0 if total == 0.0 else x[j] / total


@njit(**JIT)
def _scored(f, transitions, start, end, steps, n):
    """Whether everything that the sequence reads is a score, which NaN and +inf are not."""
    good = np.all(start < _INF) and np.all(end < _INF) and (n < 2 or np.all(transitions < _INF))
    for k in range(n):
        good = good and np.all(f[steps[k]] < _INF)
    return good


@njit(**JIT)
def _crossed(f, transitions, start, end, steps, n, num_tags):
    """Whether some feasible path goes through each tag of each step, (n, K). Scores of the others count nowhere."""
    on = np.zeros((n, num_tags), np.bool_)
    for k in range(n):
        for j in range(num_tags):
            possible = k == 0 and start[j] > -_INF
            if k > 0:
                for i in range(num_tags):
                    possible |= on[k - 1, i] and transitions[i, j] > -_INF
            on[k, j] = possible and f[steps[k], j] > -_INF
    for k in range(n - 1, -1, -1):
        for i in range(num_tags):
            possible = k == n - 1 and end[i] > -_INF
            if k < n - 1:
                for j in range(num_tags):
                    possible |= on[k + 1, j] and transitions[i, j] > -_INF
            on[k, i] &= possible
    return on


@njit(**JIT)
def _top(x, on):
    """The largest of the scores that are on, 0 where there is none."""
    top = -_INF
    for j in range(len(on)):
        if on[j]:
            top = max(top, np.float64(x[j]))
    return top if top > -_INF else 0.0


@njit(**JIT)
def _top_into(transitions, on, k):
    """The largest transition on a feasible path into step k, 0 where there is none."""
    top = -_INF
    for i in range(on.shape[1]):
        for j in range(on.shape[1]):
            if on[k - 1, i] and on[k, j]:
                top = max(top, np.float64(transitions[i, j]))
    return top if top > -_INF else 0.0


@njit(**EXACT)
def _log_forward(f, transitions, start, end, steps, n, num_tags, on, alpha):
    """log Z by the plain recursion, scores counted from the largest of their kind on a feasible path; alpha (n, P)
    filled, every step brought to a maximum of 0."""
    terms = np.empty(num_tags)
    offset = 0.0
    for k in range(n):
        f_top = _top(f[steps[k]], on[k])
        top = _top_into(transitions, on, k) if k else _top(start, on[0])
        for j in range(num_tags):
            alpha[k, j] = -_INF
            if not on[k, j]:
                continue
            into = np.float64(start[j]) - top
            if k > 0:
                for i in range(num_tags):
                    terms[i] = alpha[k - 1, i] + (np.float64(transitions[i, j]) - top) if on[k - 1, i] else -_INF
                into = _log_sum(terms)
            alpha[k, j] = (np.float64(f[steps[k], j]) - f_top) + into
        offset += f_top + top + _bring_to_zero(alpha[k, :num_tags])
    end_top = _top(end, on[n - 1])
    for j in range(num_tags):
        terms[j] = alpha[n - 1, j] + (np.float64(end[j]) - end_top) if on[n - 1, j] else -_INF
    return offset + end_top + _log_sum(terms)


@njit(**EXACT)
def _log_backward(f, transitions, end, steps, n, num_tags, on, alpha, weight, g_em, pairs, g_start, g_end):
    """Add the weighted expected counts by the plain recursion, probabilities divided by their sum: neither the size of
    the scores nor a step that only huge scores cross shows in a posterior."""
    beta = np.empty(num_tags)
    before = np.empty(num_tags)
    terms = np.empty(num_tags)
    later = np.empty((num_tags, num_tags))
    end_top = _top(end, on[n - 1])
    for j in range(num_tags):
        beta[j] = np.float64(end[j]) - end_top if on[n - 1, j] else -_INF
    for k in range(n - 1, -1, -1):
        for j in range(num_tags):
            terms[j] = alpha[k, j] + beta[j]
        _to_probabilities(terms)
        for j in range(num_tags):
            share = weight * terms[j]
            g_em[steps[k], j] += share
            if k == n - 1:
                g_end[j] += share
            if k == 0:
                g_start[j] += share
        if k == 0:
            break
        f_top, top = _top(f[steps[k]], on[k]), _top_into(transitions, on, k)
        for i in range(num_tags):
            for j in range(num_tags):
                score = (np.float64(transitions[i, j]) - top) + (np.float64(f[steps[k], j]) - f_top)
                later[i, j] = score + beta[j] if on[k - 1, i] and on[k, j] else -_INF
            before[i] = _log_sum(later[i])
            terms[i] = alpha[k - 1, i] + before[i]
            _to_probabilities(later[i])
        _to_probabilities(terms)
        for i in range(num_tags):
            for j in range(num_tags):
                pairs[i, j] += weight * terms[i] * later[i, j]
        _bring_to_zero(before)
        beta[:] = before


@njit(**JIT)
def _crf(emissions, transitions, start, end, tags, mask, lengths, weights, kind, check, with_grad, paths, value, grads):
    g_em, g_tr, g_start, g_end = grads
    batch, time, num_tags = emissions.shape
    padded = (num_tags + _LANES - 1) // _LANES * _LANES
    steps = np.empty(time + 1, np.int64)
    a = np.zeros((time, padded))
    u = np.zeros((time, padded))
    counts = np.zeros((num_tags, padded))
    pairs = np.zeros((num_tags, num_tags))
    sum_start = np.zeros(num_tags)
    sum_end = np.zeros(num_tags)
    path = np.zeros(time, np.int64)

    top = -_INF
    for i in range(num_tags):
        for j in range(num_tags):
            top = max(top, np.float64(transitions[i, j]))
    top = top if abs(top) < _INF else 0.0
    usable = True  # no transition or end score is NaN or +inf, no start score far from 0
    weights_out = np.zeros((num_tags, padded))
    weights_in = np.zeros((num_tags, padded))
    for i in range(num_tags):
        for j in range(num_tags):
            w = math.exp(np.float64(transitions[i, j]) - top)
            usable &= w <= 1.0
            weights_out[i, j] = w
            weights_in[j, i] = w
    end_top = -_INF
    for j in range(num_tags):
        end_top = max(end_top, np.float64(end[j]))
    end_top = end_top if abs(end_top) < _INF else 0.0
    start_top = np.float64(start.max())
    usable &= not _NEAR < abs(start_top) < _INF  # it is added to the first step, which would lose digits
    end_weights = np.zeros(padded)
    for j in range(num_tags):
        end_weights[j] = math.exp(np.float64(end[j]) - end_top)
        usable &= end_weights[j] <= 1.0

    for b in range(batch):
        n = _steps(b, time, mask, lengths, steps)
        lost = n < 0  # a label or length out of range: NaN where nobody may raise
        if lost:
            if check:
                return BAD_LENGTH
            n = min(max(lengths[b], 0), time)
        f = emissions[b]
        if with_grad:
            g_em[b] = 0.0
        weight = np.float64(weights[b])
        if kind != PARTITION:
            for k in range(n):
                y = tags[b, steps[k]]
                if y < 0 or y >= num_tags:
                    if check:
                        return BAD_TAG
                    lost = True
                path[steps[k]] = y
        if lost:
            value[b] = np.nan
            if with_grad:
                _lose(steps, n, g_em[b], pairs, sum_start, sum_end)
            continue
        value[b] = 0.0
        if n == 0:
            continue
        score = 0.0
        if kind != PARTITION:
            score = _gold(f, transitions, start, end, path, steps, n)
            score = score if score < _INF else np.nan
        if kind == SCORE:
            value[b] = score
            if with_grad and score > -_INF:
                _gold_counts(path, steps, n, weight, g_em[b], pairs, sum_start, sum_end)
            continue
        if score == -_INF:
            value[b] = _INF
            continue

        slow = not usable
        log_z = 0.0
        if not slow:
            log_scale, clean, suspect = _forward(f, weights_in, start, steps, n, num_tags, a, u)
            slow = not clean or _underflowed(a, f, transitions, start, steps, suspect, num_tags)
            total = 0.0
            for j in range(num_tags):
                total += a[n - 1, j] * end_weights[j]
            slow |= not total >= _TINY
            tops = (n - 1) * top
            offset = log_scale + tops
            log_z = offset + math.log(total) + end_top
            added = abs(log_scale) + abs(tops) + abs(end_top)
            slow |= not _certified(n * (num_tags + 8.0) + 4.0 * added, log_z, f[steps[0]], start, offset, a[n - 1])
            if with_grad and not slow:
                slow = not _backward(
                    a, u, weights_out, end_weights, steps, n, num_tags, weight, g_em[b], counts, sum_start, sum_end
                )
        if slow:
            if _scored(f, transitions, start, end, steps, n):
                on = _crossed(f, transitions, start, end, steps, n, num_tags)
                log_z = _log_forward(f, transitions, start, end, steps, n, num_tags, on, a)
                if with_grad and log_z != -_INF:
                    sums = g_em[b], pairs, sum_start, sum_end
                    _log_backward(f, transitions, end, steps, n, num_tags, on, a, weight, *sums)
            else:
                log_z = np.nan
                if with_grad:
                    _lose(steps, n, g_em[b], pairs, sum_start, sum_end)
        paths[b] = slow
        if kind == PARTITION:
            value[b] = log_z
        else:
            value[b] = log_z - score if not log_z - score < 0.0 else 0.0
            if with_grad:
                _gold_counts(path, steps, n, -weight, g_em[b], pairs, sum_start, sum_end)
    if with_grad:
        for i in range(num_tags):
            for j in range(num_tags):
                g_tr[i, j] = pairs[i, j] + (counts[i, j] * weights_out[i, j] if usable else 0.0)
            g_start[i] = sum_start[i]
            g_end[i] = sum_end[i]
    return OK


@njit(**JIT)
def _sources(transitions):
    """Transitions padded with -inf, and whether none is NaN or +inf."""
    num_tags = len(transitions)
    into = np.full((num_tags, (num_tags + _LANES - 1) // _LANES * _LANES), -_INF)
    usable = True
    for i in range(num_tags):
        for j in range(num_tags):
            into[i, j] = transitions[i, j]
            usable &= into[i, j] < _INF
    return into, usable


@njit(**JIT)
def _best_scores(f, start, into, steps, n, num_tags, delta):
    """Fill delta (n, P): best score of a path that ends in each tag. Returns whether one is NaN or +inf."""
    padded = into.shape[1]
    poisoned = False
    for k in range(n):
        row = f[steps[k]]
        delta[k, :] = -_INF
        if k == 0:
            for j in range(num_tags):
                delta[k, j] = np.float64(start[j])
        else:
            alone = num_tags % 4
            for i in range(alone):
                best = delta[k - 1, i]
                for j in range(padded):
                    there = best + into[i, j]
                    delta[k, j] = there if there > delta[k, j] else delta[k, j]
            for i in range(alone, num_tags, 4):  # four sources a pass over the destinations
                d0, d1, d2, d3 = delta[k - 1, i], delta[k - 1, i + 1], delta[k - 1, i + 2], delta[k - 1, i + 3]
                for j in range(padded):
                    x, y = d0 + into[i, j], d1 + into[i + 1, j]
                    z, w = d2 + into[i + 2, j], d3 + into[i + 3, j]
                    x = x if x > y else y
                    z = z if z > w else w
                    x = x if x > z else z
                    delta[k, j] = x if x > delta[k, j] else delta[k, j]
        for j in range(num_tags):
            delta[k, j] += np.float64(row[j])
            poisoned |= not delta[k, j] < _INF
    return poisoned


@njit(**JIT)
def _best_end(last, end, num_tags):
    """Score and tag of the best end, -1 where none is feasible; and whether a score is NaN or +inf."""
    best = -_INF
    tag = -1
    poisoned = False
    for j in range(num_tags):
        there = last[j] + np.float64(end[j])
        poisoned |= not there < _INF
        if there > best:
            best = there
            tag = j
    return best, tag, poisoned


@njit(**JIT)
def _viterbi(emissions, transitions, start, end, mask, lengths, check, scores, path):
    batch, time, num_tags = emissions.shape
    into, usable = _sources(transitions)
    steps = np.empty(time + 1, np.int64)
    delta = np.empty((time + 1, into.shape[1]))
    for b in range(batch):
        n = _steps(b, time, mask, lengths, steps)
        if n < 0 and check:
            return BAD_LENGTH
        path[b] = -1
        scores[b] = 0.0 if n == 0 else np.nan
        if n <= 0:
            continue
        poisoned = _best_scores(emissions[b], start, into, steps, n, num_tags, delta)
        best, tag, lost = _best_end(delta[n - 1], end, num_tags)
        poisoned |= lost or (n > 1 and not usable)
        scores[b] = np.nan if poisoned else best
        if poisoned or tag < 0:
            continue
        for k in range(n - 1, -1, -1):
            path[b, steps[k]] = tag
            if k:
                top = -_INF
                before = 0
                for i in range(num_tags):
                    there = delta[k - 1, i] + into[i, tag]
                    if there > top:
                        top = there
                        before = i
                tag = before
    return OK


@njit(**JIT)
def _best_before(delta, into, k, j):
    """The best predecessor of tag j at step k."""
    before = 0
    for i in range(into.shape[1]):
        if delta[k - 1, i] + into[j, i] > delta[k - 1, before] + into[j, before]:
            before = i
    return before


@njit(**JIT)
def _take_detour(f, steps, n, delta, into, best, path, step, tag):
    """Enter a step of the path from this tag, and that from the best ones; returns the score. See n_best.hpp."""
    path[step - 1] = tag
    k = step - 1
    while k > 0 and path[k] != best[k]:
        path[k - 1] = _best_before(delta, into, k, path[k])
        k -= 1
    path[:k] = best[:k]
    score = delta[step - 1, tag]
    for j in range(step, n):
        score = score + into[path[j], path[j - 1]] + np.float64(f[steps[j], path[j]])
    return score + into[-1, path[n - 1]]


@njit(**JIT)
def _n_best(emissions, transitions, start, end, mask, lengths, check, scores, paths):
    batch, time, num_tags = emissions.shape
    count = scores.shape[1]
    sources, usable = _sources(transitions)
    into = np.empty((num_tags + 1, num_tags))  # by destination, the end last
    into[:num_tags] = sources[:, :num_tags].T
    for i in range(num_tags):
        into[num_tags, i] = np.float64(end[i])
    steps = np.empty(time + 1, np.int64)
    delta = np.empty((time + 1, sources.shape[1]))
    found = np.empty((count, time), np.int64)
    totals = np.empty(count)
    losses = np.empty(count)  # of the cheapest detours, and their paths, steps and tags; see n_best.hpp
    detours = np.empty((count, 3), np.int64)
    scores[:] = -_INF
    paths[:] = -1
    for b in range(batch):
        n = _steps(b, time, mask, lengths, steps)
        if n < 0 and check:
            return BAD_LENGTH
        if n <= 0:
            scores[b, :] = np.nan if n < 0 else -_INF
            scores[b, 0] = np.nan if n < 0 else 0.0
            continue
        f = emissions[b]
        poisoned = _best_scores(f, start, sources, steps, n, num_tags, delta)
        best, tag, lost = _best_end(delta[n - 1], end, num_tags)
        if poisoned or lost or (n > 1 and not usable):
            scores[b, :] = np.nan
            continue
        if tag < 0:
            continue
        for k in range(n - 1, -1, -1):
            found[0, k] = tag
            tag = _best_before(delta, into, k, tag) if k else 0
        totals[0] = best
        made, held, last, loss = 1, 0, n, 0.0
        while True:
            path = found[made - 1]
            most = count - made
            held = min(held, most)
            for k in range(last if most else 0, 0, -1):
                g = into[path[k] if k < n else num_tags]
                top = delta[k - 1, path[k - 1]] + g[path[k - 1]]
                for i in range(num_tags):
                    cost = loss + (top - (delta[k - 1, i] + g[i]))
                    if i == path[k - 1] or cost == _INF or (held == most and cost >= losses[held - 1]):
                        continue
                    at = held if held < most else held - 1
                    held = at + 1
                    while at > 0 and losses[at - 1] > cost:
                        losses[at] = losses[at - 1]
                        detours[at] = detours[at - 1]
                        at -= 1
                    losses[at] = cost
                    detours[at, 0], detours[at, 1], detours[at, 2] = made - 1, k, i
            if held == 0:
                break
            loss, parent, step, tag = losses[0], detours[0, 0], detours[0, 1], detours[0, 2]
            for at in range(held - 1):
                losses[at] = losses[at + 1]
                detours[at] = detours[at + 1]
            held -= 1
            found[made] = found[parent]
            totals[made] = _take_detour(f, steps, n, delta, into, found[0], found[made], step, tag)
            made, last = made + 1, step - 1
        order = np.argsort(-totals[:made], kind="mergesort")  # sums along the paths may round to another order
        for c in range(made):
            scores[b, c] = totals[order[c]]
            for k in range(n):
                paths[b, c, steps[k]] = found[order[c], k]
    return OK


@njit(**EXACT)
def _below(state, index):
    """The state of a random number's item below another one's, as csrc/chain/sample.hpp has it."""
    z = state + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(**EXACT)
def _sum_shares(row, sums):
    """Sums of exp(row) up to each tag, the largest 1; in row logs."""
    _bring_to_zero(row)
    total = 0.0
    for i in range(len(row)):
        total += math.exp(row[i])
        sums[i] = total


@njit(**JIT)
def _sample(emissions, transitions, start, end, mask, lengths, seed, check, paths):
    batch, time, num_tags = emissions.shape
    count = paths.shape[1]
    padded = (num_tags + _LANES - 1) // _LANES * _LANES
    steps = np.empty(time + 1, np.int64)
    a = np.zeros((time, padded))
    u = np.zeros((time, padded))
    tags = np.empty(count, np.int64)
    states = np.empty(count, np.uint64)
    terms = np.empty(num_tags)
    sums = np.empty((num_tags, num_tags))  # of the weights of predecessors up to each, by destination
    known = np.empty(num_tags, np.int64)  # the step whose sums are there
    top = np.float64(transitions.max())
    top = top if abs(top) < _INF else 0.0
    end_top = np.float64(end.max())
    end_top = end_top if abs(end_top) < _INF else 0.0
    weights = np.zeros((num_tags + 1, padded))  # by destination, the end last
    usable = not _NEAR < abs(np.float64(start.max())) < _INF
    for i in range(num_tags):
        for j in range(num_tags):
            weights[j, i] = math.exp(np.float64(transitions[i, j]) - top)
            usable &= weights[j, i] <= 1.0
        weights[num_tags, i] = math.exp(np.float64(end[i]) - end_top)
        usable &= weights[num_tags, i] <= 1.0
    paths[:] = -1
    for b in range(batch):
        n = _steps(b, time, mask, lengths, steps)
        if n < 0 and check:
            return BAD_LENGTH
        f = emissions[b]
        if n <= 0 or not _scored(f, transitions, start, end, steps, n):
            continue
        on = np.empty((0, 0), np.bool_)
        slow = not usable
        if not slow:
            _, clean, suspect = _forward(f, weights, start, steps, n, num_tags, a, u)
            slow = not clean or _underflowed(a, f, transitions, start, steps, suspect, num_tags)
            slow |= not _dot(a[n - 1], weights[num_tags]) >= _TINY
        if slow:
            on = _crossed(f, transitions, start, end, steps, n, num_tags)
            if not on[0].any():
                continue
            _log_forward(f, transitions, start, end, steps, n, num_tags, on, a)
        row = _below(seed, b)
        for s in range(count):
            states[s] = _below(row, s)
        tags[:] = 0
        known[:] = -1
        for k in range(n - 1, -1, -1):
            for s in range(count):
                j = tags[s]
                if known[j] != k:
                    known[j] = k
                    if slow:
                        for i in range(num_tags):
                            score = np.float64(end[i] if k == n - 1 else transitions[i, j])
                            terms[i] = a[k, i] + score if on[k, i] else -_INF
                        _sum_shares(terms, sums[j])
                    else:
                        edges = weights[num_tags if k == n - 1 else j]
                        total = 0.0
                        for i in range(num_tags):
                            total += a[k, i] * edges[i]
                            sums[j, i] = total
                share = np.float64(_below(states[s], k) >> np.uint64(12)) * 2.0**-52 * sums[j, num_tags - 1]
                tag = 0
                for i in range(num_tags - 1):
                    tag += sums[j, i] <= share
                tags[s] = tag
                paths[b, s, steps[k]] = tag
    return OK


@njit(**JIT)
def _live(batch, time, mask, lengths):
    """Times of every sequence's live steps (B, T + 1), and how many there are; for a length out of range -1 less those
    of the nearest one."""
    steps = np.zeros((batch, time + 1), np.int64)
    count = np.empty(batch, np.int64)
    for b in range(batch):
        n = _steps(b, time, mask, lengths, steps[b])
        count[b] = n if n >= 0 else -1 - min(max(lengths[b], 0), time)
    return steps, count


_NO_ROWS = {kind: np.empty((0, 0), kind) for kind in (np.bool_, np.int64)}


def _arrays(chain):  # type: ignore[no-untyped-def]
    """Emissions, transitions, start, end, mask, lengths; what is not given as zeros, no rows and full lengths."""
    batch, time, num_tags = chain.emissions.shape
    zeros = np.zeros(num_tags, chain.transitions.numpy().dtype)
    return (
        chain.emissions.contiguous().numpy(),
        chain.transitions.numpy(),
        zeros if chain.start is None else chain.start.numpy(),
        zeros if chain.end is None else chain.end.numpy(),
        _NO_ROWS[np.bool_] if chain.mask is None else chain.mask.numpy(),
        np.full(batch, time) if chain.lengths is None else chain.lengths.numpy(),
    )


def _outputs(dtype, grads):  # type: ignore[no-untyped-def]
    """Contiguous arrays for gradients, empty ones where none are wanted."""
    if grads is None:
        return tuple(np.empty((0,) * rank, dtype) for rank in (3, 2, 1, 1))
    return tuple((g if g.is_contiguous() else g.new_empty(g.shape)).numpy() for g in grads)


@reduces
def crf(
    chain: Chain, kind: int, check: bool, value: Tensor, grads: Gradients | None, paths: Tensor | None = None
) -> int:
    """paths: 0 the scaled domain, 1 the log domain; both in float64."""
    batch, dtype = len(chain.emissions), chain.transitions.numpy().dtype
    out = _outputs(dtype, grads)
    tags = _NO_ROWS[np.int64] if chain.tags is None else chain.tags.numpy()
    weights = np.ones(batch, dtype) if chain.weights is None else chain.weights.numpy()
    served = np.zeros(batch, np.int32) if paths is None else paths.numpy()
    options = kind, check, grads is not None
    *scores, mask, lengths = _arrays(chain)
    status: int = _crf(*scores, tags, mask, lengths, weights, *options, served, value.numpy(), out)
    if grads is not None and not grads.emissions.is_contiguous():
        grads.emissions.copy_(grads.emissions.new_tensor(out[0]))
    return status


def viterbi(chain: Chain, check: bool, scores: Tensor, path: Tensor) -> int:
    status: int = _viterbi(*_arrays(chain), check, scores.numpy(), path.numpy())
    return status


def n_best(chain: Chain, check: bool, scores: Tensor, paths: Tensor) -> int:
    status: int = _n_best(*_arrays(chain), check, scores.numpy(), paths.numpy())
    return status


def sample(chain: Sampling, check: bool, paths: Tensor) -> int:
    seed = np.uint64(int(chain.seed) % 2**64)
    status: int = _sample(*_arrays(chain), seed, check, paths.numpy())
    return status


def entropy(chain: Chain, check: bool, value: Tensor, grads: Gradients | None) -> int:
    *scores, mask, lengths = _arrays(chain)
    batch, time, _ = chain.emissions.shape
    dtype = chain.transitions.numpy().dtype
    steps, count = _live(batch, time, mask, lengths)
    if check and (count < 0).any():
        return BAD_LENGTH
    out = _outputs(dtype, grads)
    weights = np.ones(batch, dtype) if chain.weights is None else chain.weights.numpy()
    entropies(*scores, steps, count, weights, grads is not None, value.numpy(), out)
    if grads is not None and not grads.emissions.is_contiguous():
        grads.emissions.copy_(grads.emissions.new_tensor(out[0]))
    return OK
