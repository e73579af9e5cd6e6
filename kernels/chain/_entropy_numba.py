"""Numba kernel of the entropy of linear chains: serial, in float64 logs, one sequence at a time; see docs/chain.md.

The end scores are edges to the one tag of a step behind the last, so that nothing is written twice.
"""

import math

import numpy as np
from numba import njit

from pyseq.kernels._numba import EXACT, JIT, exp

_INF = np.inf
_LANES = 8  # tags are padded to whole vectors
_LEAST = -700.0  # log of what `exp` takes for 0


@njit(**EXACT)  # the likeliest predecessor's log must be 0 from itself, or small entropies would lose their digits
def _choose(edges, alpha, entropy, sums, mixed, likeliest):
    """Of the choice among predecessors, by destination: the log sum, the entropy with theirs, and the likeliest, -1
    where there is none. Its -log q is log1p of what the others have beside it."""
    padded = edges.shape[1]
    top = np.full(padded, -_INF)
    rest = np.zeros(padded)
    likeliest[:] = -1
    for i in range(edges.shape[0]):
        for j in range(padded):
            x = alpha[i] + edges[i, j]
            likeliest[j] = i if x > top[j] else likeliest[j]
            top[j] = x if x > top[j] else top[j]
    for j in range(padded):
        sums[j] = top[j]
        top[j] = 0.0 if top[j] == -_INF else top[j]
        mixed[j] = 0.0
    for i in range(edges.shape[0]):
        for j in range(padded):
            x = alpha[i] + edges[i, j] - top[j]
            e = exp(x)
            rest[j] += 0.0 if likeliest[j] == i else e
            mixed[j] += e * (entropy[i] - (x if x > _LEAST else _LEAST))
    for j in range(padded):
        more = math.log1p(rest[j])
        sums[j] += more
        mixed[j] = mixed[j] / (1.0 + rest[j]) + more


@njit(**JIT)
def _return(edges, alpha, entropy, sums, mixed, likeliest, of_alpha, of_entropy, to_alpha, to_entropy, others, counts):
    """The adjoints of a step to those of the step before, and their parts to counts: by q (c - H) with c = H(i) - log
    q, where that of the likeliest predecessor is what those of the others lack to 0."""
    padded = edges.shape[1]
    others[:] = 0.0
    for i in range(edges.shape[0]):
        by_alpha = 0.0
        by_entropy = 0.0
        for j in range(padded):
            x = alpha[i] + edges[i, j] - (sums[j] if likeliest[j] >= 0 else 0.0)
            q = exp(x)
            part = q * (entropy[i] - (x if x > _LEAST else _LEAST) - mixed[j])
            part = 0.0 if likeliest[j] == i else part
            others[j] += part
            whole = q * of_alpha[j] + of_entropy[j] * part
            counts[i, j] += whole
            by_alpha += whole
            by_entropy += of_entropy[j] * q
        to_alpha[i] = by_alpha
        to_entropy[i] = by_entropy
    for j in range(padded):
        i = likeliest[j]
        if i >= 0:
            part = of_entropy[j] * others[j]
            to_alpha[i] -= part
            counts[i, j] -= part


@njit(**JIT)
def entropies(emissions, transitions, start, end, steps, count, weights, with_grad, value, grads):
    """steps (B, T + 1), count (B,): live ones, -1 less those of the nearest length for one out of range."""
    g_em, g_tr, g_start, g_end = grads
    batch, time, num_tags = emissions.shape
    padded = (num_tags + _LANES - 1) // _LANES * _LANES
    edges = np.full((2, num_tags, padded), -_INF)  # the last to the one tag behind the end
    for i in range(num_tags):
        edges[1, i, 0] = np.float64(end[i])
        for j in range(num_tags):
            edges[0, i, j] = np.float64(transitions[i, j])
    counts = np.zeros((2, num_tags, padded))
    firsts = np.zeros(num_tags)
    alpha = np.empty((time, padded))  # log sums of the paths to each tag, counted from the largest of a step
    sums, mixed = np.empty((time + 1, padded)), np.zeros((time + 1, padded))
    likeliest = np.empty((time + 1, padded), np.int64)
    adjoints = np.zeros((2, 2, padded))
    others = np.empty(padded)
    for b in range(batch):
        n = count[b]
        f = emissions[b]
        lost = n < 0
        for k in range(max(n, 0)):
            if k > 0:
                _choose(edges[0], alpha[k - 1], mixed[k - 1], sums[k], mixed[k], likeliest[k])
            top = -_INF
            alpha[k, :] = -_INF
            for j in range(num_tags):
                x = np.float64(f[steps[b, k], j]) + (sums[k, j] if k else np.float64(start[j]))
                lost |= not x < _INF
                alpha[k, j] = x
                top = max(top, x)
            alpha[k] -= top if abs(top) < _INF else 0.0
        total = -_INF
        if n > 0:
            _choose(edges[1], alpha[n - 1], mixed[n - 1], sums[n], mixed[n], likeliest[n])
            total = sums[n, 0]
            lost |= not total < _INF
        value[b] = np.nan if lost else mixed[n, 0] if total > -_INF else 0.0
        if not with_grad:
            continue
        g_em[b] = 0.0
        if lost:
            for k in range(n if n >= 0 else -1 - n):
                g_em[b, steps[b, k]] = np.nan
            if n != 1:
                counts[0] = np.nan
            counts[1] = np.nan
            firsts[:] = np.nan
            continue
        if total == -_INF:
            continue
        adjoints[n % 2] = 0.0
        adjoints[n % 2, 1, 0] = weights[b]
        for k in range(n, 0, -1):
            of, to, at = adjoints[k % 2], adjoints[(k - 1) % 2], 1 if k == n else 0
            taken = edges[at], alpha[k - 1], mixed[k - 1], sums[k], mixed[k], likeliest[k]
            _return(*taken, of[0], of[1], to[0], to[1], others, counts[at])
            for j in range(num_tags):
                g_em[b, steps[b, k - 1], j] = to[0, j]
        for j in range(num_tags):
            firsts[j] += adjoints[0, 0, j]
    if with_grad:
        for i in range(num_tags):
            for j in range(num_tags):
                g_tr[i, j] = counts[0, i, j]
            g_start[i] = firsts[i]
            g_end[i] = counts[1, i, 0]
