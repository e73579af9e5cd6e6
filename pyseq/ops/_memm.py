"""Raw ops of maximum-entropy Markov models, how they are launched, their gradients, and their exact decoding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels.chain import FORBIDDEN, Chain, LabelledPath, LocalSteps, Unadjusted
from pyseq.ops import _chain_reference
from pyseq.ops._autograd import refuse_upstream, shared_weight
from pyseq.ops._backend import Backends, settings
from pyseq.ops._library import Raw, needs_grad
from pyseq.ops._torch import keeps_graph, traced
from pyseq.reference import memm as reference
from pyseq.reference.chain import _logsumexp
from pyseq.reference.memm import forbidden

SMALL = 1e-250  # a sum whose largest term was scaled to less may have lost digits
MOST = 1 << 22  # logits of low rank, and sums of pairs of tags, at a time


class Memm(NamedTuple):
    """The tensors of a call; transitions (K, K), or with right (K, d) both factors of them."""

    emissions: Tensor
    transitions: Tensor
    right: Tensor | None
    tags: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None
    weight: Tensor | None = None  # (K,) of the labels
    token_weight: Tensor | None = None  # (B, T)
    weights: Tensor | None = None  # (B,), of the sequences in the gradients


class Options(NamedTuple):
    forward: bool
    backward: bool
    halved: bool
    smoothing: float
    check: bool  # whether tags and lengths out of range raise, rather than make their sequence NaN
    backend: str


BACKENDS = Backends("chain", Memm, {"cpu": ("cpp", "numba"), "cuda": ("triton",)})


def nll(memm: Memm, options: Options, backend: str) -> Tensor:
    """(B,)."""
    direct, check, backend = BACKENDS.way(backend, memm)
    options = options._replace(check=check, backend=backend)
    if backend == "reference":
        return by_reference(memm, options)
    if torch.is_grad_enabled() and needs_grad(memm):
        return _nll_and_grad.first(memm, options, direct)
    return _nll(memm, options, direct)  # type: ignore[no-any-return]


def as_chain(memm: Memm) -> Chain:
    """What says which steps are live, and which values are out of range."""
    return Chain(memm.emissions, memm.transitions, None, None, memm.tags, memm.mask, memm.lengths)


def check_lengths(memm: Memm) -> None:
    """On the CPU in eager mode; elsewhere what is out of range is taken for the nearest length."""
    if settings.check or (memm.emissions.is_cpu and not traced()):
        _chain_reference.raise_bad_values(as_chain(memm))


def _checked(memm: Memm, options: Options) -> None:
    if settings.check or (options.check and not torch.compiler.is_compiling()):
        _chain_reference.raise_bad_values(as_chain(memm))


def by_reference(memm: Memm, options: Options) -> Tensor:
    _checked(memm, options)
    tags = memm.tags.clamp(0, memm.emissions.size(2) - 1)
    forward, backward, halved, smoothing, check, _ = options
    scores, live = (memm.emissions, memm.transitions, memm.right), _chain_reference.live(as_chain(memm))
    ways, how = (forward, backward, halved), (memm.weight, smoothing, memm.token_weight)
    out = reference.memm_nll(*scores, tags, live, *ways, *how)
    return out if check else out * _chain_reference._one_or_nan(as_chain(memm))


def _sweep(memm: Memm, options: Options, grads: tuple[Tensor, ...] | None) -> Tensor:
    """Value (B,); grads (emissions, transitions, right, which may be empty) are filled."""
    (batch, time, num_tags), check = memm.emissions.shape, options.check
    value = memm.transitions.new_zeros(batch)
    if grads is not None and (batch * time == 0 or memm.right is not None):
        for grad in grads:
            grad.zero_()
    if batch * time == 0:
        _checked(memm, options)
        return value
    label, before, after = memm.tags.new_empty(3, batch, time, dtype=torch.int64)
    path = LabelledPath(memm.tags, memm.mask, memm.lengths)
    status = _nll.launch("neighbours", path, options.backend, num_tags, label, before, after)
    if settings.check or (check and status != OK):
        _chain_reference.raise_bad_values(as_chain(memm))
    scale = value.new_full((batch, time), 0.5 if options.forward and options.backward else 1.0)
    scale = scale if memm.token_weight is None else torch.where(label < 0, 0.0, scale * memm.token_weight)
    scale = scale if memm.weights is None else scale * memm.weights.unsqueeze(1)
    if options.backend == "triton":  # nobody asks the device, so whom a forbidden step takes out is told before
        dead = forbidden(memm.emissions, memm.transitions, memm.right, label.clamp(min=0), label >= 0)
        loss = _both(memm, options, label, before, after, torch.where(dead.unsqueeze(1), 0.0, scale), grads)[0]
        value.copy_(torch.where(dead, torch.inf, loss.sum((0, 2))))
        return value if check else value * _chain_reference._one_or_nan(as_chain(memm))
    loss, found = _both(memm, options, label, before, after, scale, grads)
    value.copy_(loss.sum((0, 2)))
    if found == FORBIDDEN:
        dead = (loss == torch.inf).any(2).any(0)
        loss = _both(memm, options, label, before, after, torch.where(dead.unsqueeze(1), 0.0, scale), grads)[0]
        value.copy_(torch.where(dead, torch.inf, loss.sum((0, 2))))
    return value if status == OK else value * _chain_reference._one_or_nan(as_chain(memm))


def _both(
    memm: Memm, options: Options, label: Tensor, before: Tensor, after: Tensor, scale: Tensor, grads: Any
) -> tuple[Tensor, int]:
    """Losses (directions, B, T) float64, of one or both; and OK, or FORBIDDEN where a label is."""
    num_tags, right, transitions = memm.emissions.size(2), memm.right, memm.transitions
    scores = memm.emissions.reshape(-1, num_tags)
    if not (scores.is_cuda and options.backend == "triton"):
        scores = scores.to(transitions.dtype)
    loss = torch.empty(2, label.numel(), dtype=torch.float64, device=label.device)
    grad = None if grads is None else grads[0].view(-1, num_tags)
    scale, label, status = scale.view(-1), label.view(-1), OK
    sides = [(before, False)] * options.forward + [(after, True)] * options.backward
    for i, (context, turned) in enumerate(sides):
        bias = transitions.mT.contiguous() if turned and right is None else transitions
        steps = LocalSteps(scores, bias, context.view(-1), label, scale, memm.weight)
        how = options.backend, 0.5 if options.halved else 1.0, options.smoothing, i > 0
        if right is None:
            of_bias = None if grads is None else torch.empty_like(bias) if i or turned else grads[1]
            status = max(status, _launch(steps, *how, loss[i], grad, of_bias))
            if grads is not None and of_bias is not None and of_bias is not grads[1]:
                of_bias = of_bias.mT if turned else of_bias
                grads[1].add_(of_bias) if i else grads[1].copy_(of_bias)
        else:
            factors, of = (transitions, right), None if grads is None else grads[1:]
            if turned:
                factors, of = (right, transitions), None if of is None else of[::-1]
            status = max(status, _low_rank(steps, factors, of, grad, loss[i], how))
    return loss[: len(sides)].view(-1, *before.shape), status


def _launch(steps: LocalSteps, backend: str, *rest: object) -> int:
    status: int = _nll.launch("local_steps", steps, backend, *rest)
    return status


def _low_rank(
    steps: LocalSteps,
    factors: tuple[Tensor, Tensor],
    grads: tuple[Tensor, ...] | None,
    grad: Tensor | None,
    loss: Tensor,
    how: tuple[str, float, float, bool],
) -> int:
    """Some steps at a time, each with a bias of its own: row of the first factor times the second one."""
    first, second = factors
    count, num_tags = steps.scores.shape
    size = max(MOST // num_tags, 1)
    each = torch.arange(min(size, count), device=first.device)
    status: int = OK
    for at in range(0, count, size):
        some = slice(at, at + size)
        context = steps.context[some]
        joined = context >= 0
        rows = first[context.clamp(min=0)]
        bias = rows @ second.mT
        part = LocalSteps(
            steps.scores[some], bias, torch.where(joined, each[: len(context)], -1), steps.label[some],
            steps.scale[some], steps.weight,
        )  # fmt: skip
        of_bias = None if grads is None else bias
        status = max(status, _launch(part, *how, loss[some], None if grad is None else grad[some], of_bias))
        if grads is not None:
            of_rows = torch.where(joined.unsqueeze(1), bias @ second, 0.0)
            grads[0].index_put_((context.clamp(min=0),), of_rows, accumulate=True)
            grads[1].addmm_(bias.mT, rows)
    return status


def _fake(memm: Memm, options: Options) -> Tensor:
    return memm.transitions.new_empty(memm.emissions.size(0))


def _kernel(memm: Memm, options: Options) -> Tensor:
    return by_reference(memm, options) if options.backend == "reference" else _sweep(memm, options, None)


def _grads_like(memm: Memm) -> tuple[Tensor, ...]:
    new = memm.transitions.new_empty
    right = (0,) if memm.right is None else memm.right.shape
    return new(memm.emissions.shape), new(memm.transitions.shape), new(right)


def _and_grad_fake(memm: Memm, options: Options) -> tuple[Tensor, ...]:
    return _fake(memm, options), *_grads_like(memm)


def _and_grad_kernel(memm: Memm, options: Options) -> tuple[Tensor, ...]:
    grads = _grads_like(memm)
    if options.backend != "reference":
        return _sweep(memm, options, grads), *grads
    with torch.inference_mode(False):
        memm = Memm._make(x.clone() if x is not None and x.is_inference() else x for x in memm)
        scores = [x for x in memm[:3] if x is not None]

        def of(*scores: Tensor) -> Tensor:
            return by_reference(Memm(*scores, *memm[len(scores) :]), options)

        out, pull = torch.func.vjp(of, *scores)[:2]
        found = pull(torch.ones_like(out) if memm.weights is None else memm.weights)
    for grad, x in zip(grads, found, strict=False):
        grad.copy_(x)
    return out, *grads


def _gradient(
    memm: Memm, options: Options, grads: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    up, *ups = upstream
    refuse_upstream(upstream)
    nothing = (None,) * len(Memm._fields)
    assert not any(x is not None for x in ups)  # gradients are no public output
    if up is None:
        return nothing
    if torch.is_grad_enabled():  # create_graph=True
        wanted = [x for x in memm[:3] if x is not None and x.requires_grad]
        out = by_reference(memm._replace(weights=None), options)
        found = iter(torch.autograd.grad(out, wanted, up, create_graph=True, allow_unused=True))
        return *(next(found) if x is not None and x.requires_grad else None for x in memm[:3]), *nothing[3:]
    weight = shared_weight(up) if up.numel() else 1.0
    if weight is None or not grads:
        grads = _nll_and_grad(memm._replace(weights=up.resolve_neg().contiguous()), options)[1:]
    elif isinstance(weight, Tensor) or weight != 1.0 or keeps_graph():
        grads = [weight * x for x in grads]
    return grads[0], grads[1], None if memm.right is None else grads[2], *nothing[3:]


_nll = Raw("memm_nll", Memm, Options, _kernel, _fake, BACKENDS, gradient=lambda m, o, _, up: _gradient(m, o, (), up))
_nll_and_grad = Raw(
    "memm_nll_and_grad", Memm, Options, _and_grad_kernel, _and_grad_fake, BACKENDS, returns=4, gradient=_gradient
)


def adjusted(
    memm: Memm, live: Tensor, forward: bool, backward: bool, halved: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Emissions (B, T, K) and transitions (K, K) of the chain whose path scores are minus the loss, but for what is the
    same for all paths, which its first live step has; float64. Normalisers of a step go to the neighbour that they
    depend on."""
    emissions, transitions, right = memm[:3]
    g = transitions.double() if right is None else transitions.double() @ right.double().mT
    h = 0.5 if halved else 1.0
    direct, _, backend = BACKENDS.way(backend, memm)
    if direct and backend == "cpp" and emissions.numel() and not (torch.is_grad_enabled() and needs_grad(memm)):
        out = torch.empty(emissions.shape, dtype=torch.float64)
        mask = None if memm.mask is None and memm.lengths is None else live
        _nll.launch("adjust", Unadjusted(emissions, g, mask), backend, forward, backward, h, out)
        return out, g * h
    f = torch.where(live.unsqueeze(2), emissions, 0.0).double()
    first, last = _ends(live)
    share = 0.5 if forward and backward else 1.0
    out = torch.zeros_like(f)
    for wanted, end, scores in ((forward, first, g), (backward, last, g.mT)):
        if not wanted:
            continue
        begins = end.unsqueeze(2)
        out = out + share * torch.where(begins, f, h * f)
        alone = _normalisers(f, torch.zeros_like(scores[:1]), 1.0, end)[..., :1]
        given = _normalisers(f, scores, h, live & ~end)  # of a step, by its context
        out = out - share * (alone + _moved(given, live, -1 if end is first else 1))
    return out, g * h


def _ends(live: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T): whether a step is the first live one, and the last one."""
    count = live.cumsum(1)
    return live & (count == 1), live & (count == count[:, -1:])


def _normalisers(f: Tensor, g: Tensor, h: float, wanted: Tensor) -> Tensor:
    """(B, T, C): log sum over tags j of exp h(f[j] + g[i, j]) for each context i of C, where wanted, else 0; +inf in
    place of -inf, of a context that nothing may follow."""
    chosen = f.is_cpu and not traced()  # elsewhere choosing waits for the device, or breaks the graph
    found: Tensor | None
    if traced():  # in one piece, for a compiler to fuse
        found = _logsumexp(h * (f.unsqueeze(2) + g), 3)
    else:
        rows = f[wanted] if chosen else f.flatten(0, 1)
        found = _sums_of(rows, g, h) if chosen and not f.requires_grad and not g.requires_grad else None
        if found is None:
            parts = rows.split(max(MOST // max(g.numel(), 1), 1))
            found = torch.cat([_logsumexp(h * (some.unsqueeze(1) + g), 2) for some in parts])
    found = torch.where(found == -torch.inf, torch.inf, found)
    if chosen:
        return f.new_zeros(*f.shape[:2], len(g)).index_put((wanted,), found)
    return torch.where(wanted.unsqueeze(2), found.view(*f.shape[:2], len(g)), 0.0)


def _sums_of(rows: Tensor, g: Tensor, h: float) -> Tensor | None:
    """The same by one product, unless something underflows."""
    top, most = rows.amax(1, keepdim=True), g.amax(1)
    total = (h * (rows - top)).exp() @ (h * (g - most.unsqueeze(1))).exp().mT
    return total.log() + h * (top + most) if bool((total > SMALL).all()) else None


def _moved(x: Tensor, live: Tensor, by: int) -> Tensor:
    """Of each live step to the live one before it (-1) or after it; 0 where none comes from."""
    if by > 0:
        return _moved(x.flip(1), live.flip(1), -1).flip(1)
    time = live.size(1)
    at = torch.where(live, torch.arange(time, device=live.device), time)
    after = at.flip(1).cummin(1).values.flip(1)
    after = torch.cat([after[:, 1:], torch.full_like(after[:, :1], time)], 1)
    there = live & (after < time)
    index = after.clamp(max=time - 1).unsqueeze(2).expand_as(x)
    return torch.where(there.unsqueeze(2), x.gather(1, index), 0.0)
