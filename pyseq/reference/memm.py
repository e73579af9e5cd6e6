"""Maximum-entropy Markov models in plain torch. `live` is a (B, T) bool mask; absent steps are skipped, never read."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyseq.reference.chain import _logsumexp, _scores, _widen, _zeros

NEG_INF = -torch.inf


def neighbours(tags: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Tags (B, T) of the live steps before and after each live one; -1 where there is none."""
    if tags.size(1) == 0:
        return tags, tags

    def before(tags: Tensor, live: Tensor) -> Tensor:
        seen = torch.where(live, torch.arange(tags.size(1), device=tags.device), -1).cummax(1).values
        at = pad(seen[:, :-1], (1, 0), value=-1)
        return torch.where(live & (at >= 0), tags.gather(1, at.clamp(min=0)), -1)

    return before(tags, live), before(tags.flip(1), live.flip(1)).flip(1)


def forbidden(emissions: Tensor, transitions: Tensor, right: Tensor | None, tags: Tensor, live: Tensor) -> Tensor:
    """(B,): whether a score of the path is -inf."""
    if tags.size(1) == 0:
        return tags.new_zeros(tags.size(0), dtype=torch.bool)
    tags = torch.where(live, tags, 0)
    before, _ = neighbours(tags, live)
    of_tag = emissions.gather(2, tags.unsqueeze(2)).squeeze(2)
    left = before.clamp(min=0)
    edge = transitions[left, tags] if right is None else (transitions[left] * right[tags]).sum(-1)
    return ((live & (of_tag == NEG_INF)) | ((before >= 0) & (edge == NEG_INF))).any(1)


def memm_nll(
    emissions: Tensor,
    transitions: Tensor,
    right: Tensor | None,
    tags: Tensor,
    live: Tensor,
    forward: bool,
    backward: bool,
    halved: bool,
    weight: Tensor | None,
    smoothing: float,
    token_weight: Tensor | None,
) -> Tensor:
    """(B,): the sum over live steps of the cross entropy of f_k + g[y_{k-1}], of that with the step after, or the mean
    of both; +inf, with zero gradient, where the path is forbidden. halved: times 1/2 but at the step without a
    neighbour. right: transitions (K, d) and right (K, d) mean transitions @ right.T."""
    if emissions.size(1) == 0:
        return _zeros(_widen(emissions, live), transitions, right)
    dead = forbidden(emissions, transitions, right, tags, live)
    reached = live & ~dead.unsqueeze(1)
    emissions, tags = _widen(emissions, reached), torch.where(reached, tags, 0)
    g = _scores(transitions) if right is None else _scores(transitions) @ _scores(right).mT
    each = 1.0 if weight is None else weight[tags]
    total = emissions.new_zeros(emissions.size(0))
    sides = zip((forward, backward), neighbours(tags, reached), (g, g.mT), strict=True)
    for scores, context in [(scores, context) for wanted, context, scores in sides if wanted]:
        joined = (context >= 0).unsqueeze(2)
        logits = emissions + torch.where(joined, scores[context.clamp(min=0)], 0.0)
        logits = torch.where(joined, logits / 2, logits) if halved else logits
        log_z = _logsumexp(logits, 2)
        loss = (1 - smoothing) * each * (log_z - logits.gather(2, tags.unsqueeze(2)).squeeze(2))
        if smoothing:
            finite = logits > NEG_INF
            away = torch.where(finite, log_z.unsqueeze(2) - torch.where(finite, logits, 0.0), 0.0)
            away = away if weight is None else away * weight
            loss = loss + smoothing * away.sum(2) / finite.sum(2).clamp(min=1)
        loss = loss if token_weight is None else loss * token_weight
        total = total + torch.where(reached, loss, 0.0).sum(1)
    total = total / 2 if forward and backward else total
    return torch.where(dead, torch.inf, total)
