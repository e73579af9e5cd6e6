"""Paths of linear chains in plain torch: the n best, samples, and the entropy of all. `live` as in chain.py."""

import torch
from torch import Tensor

from pyseq.reference.chain import NEG_INF, _scores, _widen, _zeros


def viterbi_n_best(
    emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor, n_best: int
) -> tuple[Tensor, Tensor]:
    """Scores (B, N), best first, and paths (B, N, T); -inf and -1 where there are fewer. Each tag keeps its n best
    predecessors, a tag and a rank; equal ones in the order of tags."""
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    emissions, transitions = _widen(emissions, live).double(), _scores(transitions).double()
    batch, time, tags = emissions.shape
    begun = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    delta = emissions.new_full((batch, tags, n_best), NEG_INF)
    pointers = []
    for t in range(time):
        here = live[:, t]
        first = emissions[:, t] if start is None else _scores(start) + emissions[:, t]
        first = torch.nn.functional.pad(first.unsqueeze(2), (0, n_best - 1), value=NEG_INF)
        joined = (delta.unsqueeze(2) + transitions[:, :, None]).transpose(1, 2).flatten(2)  # [B, K, K N]
        best, pointer = joined.sort(dim=2, descending=True, stable=True)
        later = emissions[:, t].unsqueeze(2) + best[..., :n_best]
        delta = torch.where(here[:, None, None], torch.where(begun[:, None, None], later, first), delta)
        pointers.append(pointer[..., :n_best])
        begun = begun | here
    delta = delta if end is None else delta + _scores(end).unsqueeze(1)
    scores, at = (x[:, :n_best] for x in delta.flatten(1).sort(dim=1, descending=True, stable=True))
    rank = torch.arange(n_best, device=emissions.device)
    scores = torch.where(begun.unsqueeze(1), scores, torch.where(rank == 0, 0.0, NEG_INF))
    scores = torch.where(scores.isnan().any(1, keepdim=True), torch.nan, scores)
    paths = torch.full((batch, n_best, time), -1, dtype=torch.int64, device=emissions.device)
    for t in reversed(range(time)):
        here, before = live[:, t], live[:, :t].any(1)
        paths[:, :, t] = torch.where(here.unsqueeze(1), at // n_best, -1)
        previous = pointers[t].flatten(1).gather(1, at)
        at = torch.where((here & before).unsqueeze(1), previous, at)
    return scores.to(dtype), torch.where((scores > NEG_INF).unsqueeze(2), paths, -1)


def _bits(z: Tensor, count: int) -> Tensor:
    """Shift of unsigned 64-bit numbers to the right."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _below(state: Tensor, index: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014): the state of an item below another one's."""
    z = state + (index + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _bits(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _bits(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _bits(z, 31)


def _draw(weights: Tensor, states: Tensor, step: Tensor) -> Tensor:
    """(B, N): the first tag whose sum of weights (B, N, K) up to it is above a uniform share of all."""
    share = _bits(_below(states, step), 12).double() * 2.0**-52
    sums = weights.cumsum(2)
    return (sums[..., :-1] <= share.unsqueeze(2) * sums[..., -1:]).sum(2)


def _shares(logs: Tensor) -> Tensor:
    """exp of logs over the last dimension, the largest 1; zeros where every log is -inf."""
    top = logs.amax(-1, keepdim=True)
    return (logs - torch.where(top.isfinite(), top, 0.0)).exp()


def crf_sample(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    live: Tensor,
    seed: Tensor,
    count: int,
) -> Tensor:
    """Paths (B, N, T) drawn backward from y_n ~ softmax(alpha_n + end) on, y_{k-1} ~ softmax(alpha_{k-1} +
    transitions[:, y_k]); -1 where absent, where nothing is feasible, and beside NaN. seed (1,): see _below."""
    emissions, transitions = _widen(emissions, live).double(), _scores(transitions).double()
    batch, time, tags = emissions.shape
    index = torch.arange(max(batch, count), device=emissions.device)
    states = _below(_below(seed, index[:batch]).unsqueeze(1), index[:count])
    step = live.cumsum(1) - 1  # of live ones
    alpha, alphas = emissions.new_zeros(batch, tags), []
    for t in range(time):
        first = emissions[:, t] if start is None else _scores(start) + emissions[:, t]
        later = emissions[:, t] + (alpha.unsqueeze(2) + transitions).logsumexp(1)
        here = torch.where((step[:, t] == 0).unsqueeze(1), first, later)
        alpha = torch.where(live[:, t].unsqueeze(1), here, alpha)
        alphas.append(alpha)
    alpha = alpha if end is None else alpha + _scores(end)
    feasible = (alpha > NEG_INF).any(1) & ~alpha.isnan().any(1)
    paths = torch.full((batch, count, time), -1, dtype=torch.int64, device=emissions.device)
    tag = torch.zeros(batch, count, dtype=torch.int64, device=emissions.device)
    begun = torch.zeros_like(feasible)  # from the end
    for t in reversed(range(time)):
        here = live[:, t].unsqueeze(1)
        weights = torch.where(
            begun[:, None, None], _shares(alphas[t].unsqueeze(1) + transitions.mT[tag]), _shares(alpha)[:, None]
        )
        tag = torch.where(here, _draw(weights, states, step[:, t].unsqueeze(1)), tag)
        paths[:, :, t] = torch.where(here & feasible.unsqueeze(1), tag, -1)
        begun = begun | live[:, t]
    return paths


def crf_entropy(
    emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> Tensor:
    """Entropy (B,) of the paths, in float64: with q(i|j) = softmax_i(alpha_{k-1}(i) + transitions[i, j]), H_1 = 0 and
    H_k(j) = sum_i q(i|j) (H_{k-1}(i) - log q(i|j)), sums of terms that are at least 0."""
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    emissions, transitions = _widen(emissions, live).double(), _scores(transitions).double()
    if emissions.size(1) == 0:
        return _zeros(emissions, transitions, start, end).to(dtype)

    def step(logs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Over the last dimension: the log sum, and the entropy of a choice by it, where each has an entropy before."""
        at = logs.argmax(-1, keepdim=True)
        top = logs.gather(-1, at)
        dead, off = top == NEG_INF, logs == NEG_INF
        top = torch.where(dead, 0.0, top)
        shares = (logs - top).exp()
        rest = shares.scatter(-1, at, 0.0).sum(-1, keepdim=True)  # beside the largest, which is 1
        log_q = torch.where(off, 0.0, logs - top - rest.log1p())
        total = torch.where(dead, NEG_INF, top + rest.log1p()).squeeze(-1)
        return total, (shares / (1 + rest) * (entropy - log_q)).sum(-1)

    batch, _, tags = emissions.shape
    begun = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    alpha, entropy = emissions.new_zeros(batch, tags), emissions.new_zeros(batch, tags)
    for t in range(emissions.size(1)):
        here = live[:, t]
        first = emissions[:, t] if start is None else _scores(start) + emissions[:, t]
        joined = (here & begun)[:, None, None]
        into = torch.where(joined, alpha.unsqueeze(1) + transitions.mT, 0.0)  # [B, K, K], by destination
        sums, mixed = step(into, torch.where(joined, entropy.unsqueeze(1), 0.0))
        alpha = torch.where(here.unsqueeze(1), torch.where(begun.unsqueeze(1), emissions[:, t] + sums, first), alpha)
        entropy = torch.where((here & begun).unsqueeze(1), mixed, entropy)
        begun = begun | here
    alpha = alpha if end is None else torch.where(begun.unsqueeze(1), alpha + _scores(end), alpha)
    log_z, total = step(torch.where(begun.unsqueeze(1), alpha, 0.0), entropy)
    total = torch.where(log_z.isnan(), torch.nan, total)
    return torch.where(begun & (log_z != NEG_INF), total, 0.0).to(dtype)
