"""Linear chains in plain torch. `live` is a (B, T) bool mask; absent steps are skipped and never read."""

import torch
from torch import Tensor

NEG_INF = -torch.inf


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every term is -inf."""
    top = x.amax(dim, keepdim=True).detach()
    top = torch.where(top.isfinite(), top, 0.0)
    total = (x - top).exp().sum(dim, keepdim=True)
    dead = total == 0
    out = torch.where(dead, NEG_INF, torch.where(dead, 1.0, total).log() + top)
    return out.squeeze(dim)


def _widen(emissions: Tensor, live: Tensor) -> Tensor:
    """Emissions in float32 or better, with absent steps replaced so that nothing there is ever read."""
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    return _scores(torch.where(live.unsqueeze(-1), emissions, 0.0).to(dtype))


def _scores(x: Tensor) -> Tensor:
    """+inf is no score: NaN stands for it."""
    return torch.where(x == torch.inf, torch.nan, x)


def _zeros(emissions: Tensor, *scores: Tensor | None) -> Tensor:
    """(B,), of emissions without steps, in the graph of all scores."""
    return emissions.sum((1, 2)) + sum(x[:0].sum() for x in scores if x is not None)


def crf_log_partition(
    emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> Tensor:
    """log Z (B,): alpha_1 = start + f_1, alpha_k(j) = f_k(j) + LSE_i(alpha_{k-1}(i) + transitions[i, j])."""
    emissions, transitions = _widen(emissions, live), _scores(transitions)
    batch, time, tags = emissions.shape
    if time == 0:
        return _zeros(emissions, transitions, start, end)
    begun = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    alpha = emissions.new_zeros(batch, tags)
    for t in range(time):
        here = live[:, t]
        first = emissions[:, t] if start is None else _scores(start) + emissions[:, t]
        joined = (here & begun)[:, None, None]  # a NaN that nobody reads stays out of the gradient
        later = emissions[:, t] + _logsumexp(torch.where(joined, alpha.unsqueeze(2) + transitions, 0.0), 1)  # [B, K, K]
        alpha = torch.where(here.unsqueeze(1), torch.where(begun.unsqueeze(1), later, first), alpha)
        begun = begun | here
    if end is not None:
        alpha = torch.where(begun.unsqueeze(1), alpha + _scores(end), alpha)
    total = _logsumexp(alpha, 1)
    return torch.where(begun, total, 0.0)


def crf_score(
    emissions: Tensor, transitions: Tensor, tags: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> Tensor:
    """Score (B,) of the tag path over the live steps; -inf, with zero gradient, where the path is forbidden."""
    emissions = _widen(emissions, live)
    time = emissions.size(1)
    if time == 0:
        return _zeros(emissions, transitions, start, end)
    tags = torch.where(live, tags, 0)
    total = torch.where(live, emissions.gather(2, tags.unsqueeze(2)).squeeze(2), 0.0).sum(1)
    step = torch.arange(time, device=tags.device)
    seen = torch.where(live, step, -1).cummax(1).values  # last live step at or before t
    before = torch.nn.functional.pad(seen[:, :-1], (1, 0), value=-1)  # last live step before t
    joined = live & (before >= 0)
    edge = _scores(transitions)[tags.gather(1, before.clamp(min=0)), tags]
    total = total + torch.where(joined, edge, 0.0).sum(1)
    begun = live.any(1)
    if start is not None:
        opening = tags.gather(1, live.int().argmax(1, keepdim=True)).squeeze(1)
        total = total + torch.where(begun, _scores(start)[opening], 0.0)
    if end is not None:
        closing = tags.gather(1, seen[:, -1:].clamp(min=0)).squeeze(1)
        total = total + torch.where(begun, _scores(end)[closing], 0.0)
    return torch.where(total == NEG_INF, NEG_INF, total)


def crf_nll(
    emissions: Tensor, transitions: Tensor, tags: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> Tensor:
    """log Z minus the path's score (B,); +inf, with zero gradient, where the path is forbidden."""
    score = crf_score(emissions, transitions, tags, start, end, live)
    dead = score == NEG_INF
    alive = torch.where(dead[:, None, None], 0.0, emissions)  # a NaN off a forbidden path stays out of its gradient
    nll = crf_log_partition(alive, transitions, start, end, live) - score
    nll = nll - nll.detach().clamp(max=0)  # rounding must not make a loss negative
    return torch.where(dead, torch.inf, nll)


def crf_marginals(
    emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> Tensor:
    """Posterior probability (B, T, K) of each tag: the gradient of log Z in the emissions."""
    given = emissions, transitions, start, end, live
    compiling = torch.compiler.is_compiling()
    if not compiling and (torch.is_inference_mode_enabled() or any(x is not None and x.is_inference() for x in given)):
        with torch.inference_mode(False):  # inside it, and of its tensors, there are no gradients
            return crf_marginals(*(x if x is None else x.clone() for x in given))  # type: ignore[arg-type]
    scores = emissions.to(torch.promote_types(emissions.dtype, torch.float32))
    if scores.size(1) == 0:
        return scores + _zeros(scores, transitions, start, end)[:, None, None]

    def total(scores: Tensor) -> Tensor:
        return crf_log_partition(scores, transitions, start, end, live).sum()

    if compiling:  # autograd.grad is not traced; torch.func does not take saved-tensor hooks
        return torch.func.grad(total)(scores)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        scores = scores if scores.requires_grad else scores.detach().requires_grad_()
        return torch.autograd.grad(total(scores), scores, create_graph=differentiable, materialize_grads=True)[0]


def viterbi(
    emissions: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Best score (B,) and path (B, T), -1 where absent or nothing is feasible. Sums in float64, lowest tag wins."""
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    emissions, transitions = _widen(emissions, live).double(), _scores(transitions).double()
    batch, time, tags = emissions.shape
    path = torch.full((batch, time), -1, dtype=torch.int64, device=emissions.device)
    begun = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    delta = emissions.new_zeros(batch, tags)
    pointers = []
    for t in range(time):
        first = emissions[:, t] if start is None else _scores(start) + emissions[:, t]
        best, pointer = (delta.unsqueeze(2) + transitions).max(1)
        here = live[:, t]
        later = emissions[:, t] + best
        delta = torch.where(here.unsqueeze(1), torch.where(begun.unsqueeze(1), later, first), delta)
        pointers.append(pointer)
        begun = begun | here
    score, tag = (delta if end is None else delta + _scores(end)).max(1)
    score = torch.where(begun, score, 0.0)
    for t in reversed(range(time)):
        here = live[:, t]
        path[:, t] = torch.where(here, tag, -1)
        before = live[:, :t].any(1)
        tag = torch.where(here & before, pointers[t].gather(1, tag.unsqueeze(1)).squeeze(1), tag)
    feasible = score > NEG_INF  # False for NaN too
    return score.to(dtype), torch.where(feasible.unsqueeze(1), path, -1)
