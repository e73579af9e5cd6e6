"""Raw ops of the chain room, how they are launched, and their gradients."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.chain import BAD_LENGTH, BAD_TAG, NLL, PARTITION, Chain, Gradients
from pyseq.ops._autograd import refuse_tangents, refuse_transforms, refuse_upstream, shared_weight
from pyseq.ops._backend import Backends, settings
from pyseq.ops._library import Raw, needs_grad
from pyseq.ops._torch import keeps_graph, plain, traced
from pyseq.reference import chain as reference

Reduction = Literal["none", "sum", "mean"]
TRITON_MAX_TAGS = 1024


def _triton_limits(chain: Chain) -> list[str]:
    if chain.emissions.dim() == 3 and chain.emissions.size(2) > TRITON_MAX_TAGS:
        return [f"triton serves at most {TRITON_MAX_TAGS} tags, got {chain.emissions.size(2)}"]
    return []


BACKENDS = Backends("chain", Chain, {"cpu": ("cpp", "numba"), "cuda": ("triton",)}, {"triton": _triton_limits})


class ValueOptions(NamedTuple):
    kind: int  # PARTITION, NLL or SCORE
    reduction: str
    check: bool  # whether tags and lengths out of range raise, rather than make their sequence NaN
    backend: str


class PathOptions(NamedTuple):
    check: bool
    backend: str


def _way(chain: Chain, backend: str) -> tuple[bool, bool, str]:
    """Whether to go past the dispatcher; whether what is out of range raises; the backend."""
    if plain(chain):
        refuse_tangents((chain.emissions, chain.transitions, chain.start, chain.end))
        return True, chain.emissions.is_cpu, BACKENDS.choose(backend, chain)
    if traced():
        return False, False, BACKENDS.recorded(backend, chain)
    refuse_transforms()
    return False, chain.emissions.is_cpu, BACKENDS.choose(backend, chain)


def value(chain: Chain, kind: int, reduction: Reduction, backend: str) -> Tensor:
    """(B,), or a scalar with a reduction."""
    direct, check, backend = _way(chain, backend)
    options = ValueOptions(kind, reduction, check, backend)
    if backend == "reference":
        return _reference(chain, options)
    if torch.is_grad_enabled() and needs_grad(chain):
        return _value_and_grad.first(chain, options, direct)
    return _value(chain, options, direct)  # type: ignore[no-any-return]


def marginals(chain: Chain, backend: str) -> Tensor:
    """(B, T, K)."""
    direct, check, backend = _way(chain, backend)
    options = ValueOptions(PARTITION, "none", check, backend)
    return _marginals(chain, options) if backend == "reference" else _value_and_grad(chain, options, direct)[1]  # type: ignore[no-any-return]


def best_path(chain: Chain, backend: str) -> tuple[Tensor, Tensor]:
    """Scores (B,) and tags (B, T)."""
    direct, check, backend = _way(chain, backend)
    options = PathOptions(check, backend)
    return _reference_path(chain, options) if backend == "reference" else _viterbi(chain, options, direct)


def live(chain: Chain) -> Tensor:
    """(B, T) bool."""
    batch, time, _ = chain.emissions.shape
    if chain.mask is not None:
        return chain.mask  # type: ignore[no-any-return]
    if chain.lengths is None:
        return torch.ones(batch, time, dtype=torch.bool, device=chain.emissions.device)
    return torch.arange(time, device=chain.emissions.device) < chain.lengths.unsqueeze(1)  # type: ignore[no-any-return]


def raise_bad_values(chain: Chain) -> None:
    """Say which value is out of range, and where; synchronises with the host."""
    _, time, num_tags = chain.emissions.shape
    if chain.lengths is not None:
        bad = ((chain.lengths < 0) | (chain.lengths > time)).nonzero()
        if len(bad):
            b = int(bad[0])
            raise ValueError(f"lengths must lie in [0, {time}], got {int(chain.lengths[b])} for sequence {b}")
    if chain.tags is not None:
        bad = (((chain.tags < 0) | (chain.tags >= num_tags)) & live(chain)).nonzero()
        if len(bad):
            b, t = bad[0].tolist()
            raise ValueError(
                f"tags must lie in [0, {num_tags}) at live steps, got {int(chain.tags[b, t])} for sequence {b}, step "
                f"{t}; mask the step out if it is padding, or tell nn.CRF with `ignored` what the label means"
            )


def _checked(options: Any, chain: Chain) -> Any:
    """With PYSEQ_CHECK=1 everything that runs is checked: here what the CPU's kernels do not check themselves."""
    options = options._replace(check=options.check or settings.check)
    if options.check and not traced() and (options.backend == "reference" or not chain.emissions.is_cpu):
        raise_bad_values(chain)
    return options


def _launch(raw: Raw, name: str, chain: Chain, backend: str, *rest: Any) -> None:
    if raw.launch(name, chain, backend, *rest, rows=("emissions",)) in (BAD_TAG, BAD_LENGTH):
        raise_bad_values(chain)


# The reference, as the public ops call it and where a raw op runs that found no better backend.


def _reference(chain: Chain, options: ValueOptions) -> Tensor:
    options = _checked(options, chain)
    scores = chain.emissions, chain.transitions
    if options.kind == PARTITION:
        value = reference.crf_log_partition(*scores, chain.start, chain.end, live(chain))
    else:
        assert chain.tags is not None
        serve = reference.crf_nll if options.kind == NLL else reference.crf_score
        tags = chain.tags.clamp(0, chain.emissions.size(2) - 1)
        value = serve(*scores, tags, chain.start, chain.end, live(chain))
    value = value if options.check else value * _one_or_nan(chain)
    return value if options.reduction == "none" else value.sum() if options.reduction == "sum" else value.mean()


def _marginals(chain: Chain, options: ValueOptions) -> Tensor:
    options = _checked(options, chain)
    posteriors = reference.crf_marginals(chain.emissions, chain.transitions, chain.start, chain.end, live(chain))
    return posteriors if options.check else posteriors * _one_or_nan(chain)[:, None, None]


def _reference_path(chain: Chain, options: PathOptions) -> tuple[Tensor, Tensor]:
    options = _checked(options, chain)
    scores, tags = reference.viterbi(chain.emissions, chain.transitions, chain.start, chain.end, live(chain))
    if not options.check:
        scores = scores * _one_or_nan(chain)
        tags = tags.masked_fill(scores.isnan().unsqueeze(1), -1)
    return scores, tags


def _one_or_nan(chain: Chain) -> Tensor:
    """(B,), NaN for a sequence with a live tag or a length out of range."""
    batch, time, num_tags = chain.emissions.shape
    bad = torch.zeros(batch, dtype=torch.bool, device=chain.emissions.device)
    if chain.tags is not None:
        bad |= (((chain.tags < 0) | (chain.tags >= num_tags)) & live(chain)).any(1)
    if chain.lengths is not None:
        bad |= (chain.lengths < 0) | (chain.lengths > time)
    return torch.where(bad, torch.nan, 1.0)


def _derivatives(
    chain: Chain, options: ValueOptions, upstream: Tensor | None, ups: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Gradients in scores and weights, by the reference, of upstream . value + ups . (the gradients of the weighed
    value); differentiable as often as one likes."""
    again = torch.is_grad_enabled()  # create_graph=True

    def leaf(x: Tensor | None) -> Any:
        return (
            x if x is None or not x.is_floating_point() or (again and x.requires_grad) else x.detach().requires_grad_()
        )

    with torch.enable_grad():
        moved = Chain(*map(leaf, chain))
        value = _reference(moved, options)
        outputs, seeds = [value], [torch.zeros_like(value) if upstream is None else upstream]
        if any(up is not None for up in ups):
            weighed = value if moved.weights is None else value * moved.weights
            scores = moved.emissions, moved.transitions, moved.start, moved.end
            of = [(x, up) for x, up in zip(scores, ups, strict=True) if x is not None and up is not None]
            first = torch.autograd.grad(weighed.sum(), [x for x, _ in of], create_graph=True, materialize_grads=True)
            for (_, up), grad in zip(of, first, strict=True):
                if grad.requires_grad:  # a path's score is linear
                    outputs, seeds = [*outputs, grad], [*seeds, up]
        wanted = [x for x, given in zip(moved, chain, strict=True) if given is not None and given.requires_grad]
        grads = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=again, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(grads) for x in chain]


# Raw ops.


def _gradient_fake(chain: Chain) -> Gradients:
    new, num_tags = chain.transitions.new_empty, chain.emissions.size(2)
    emissions = torch.empty_like(chain.emissions, dtype=chain.transitions.dtype)
    emissions = emissions if emissions.stride(2) == 1 else emissions.contiguous()
    return Gradients(emissions, new(num_tags, num_tags), new(num_tags), new(num_tags))


def _value_fake(chain: Chain, options: ValueOptions) -> Tensor:
    return chain.transitions.new_empty(chain.emissions.size(0) if options.reduction == "none" else ())  # type: ignore[no-any-return]


def _value_kernel(chain: Chain, options: ValueOptions) -> Tensor:
    if settings.check:
        options = _checked(options, chain)
    if options.backend == "reference":
        return _reference(chain, options)
    out = _value_fake(chain, options)
    kind, reduction, check, backend = options
    _launch(_value, "crf", chain, backend, kind, reduction, check, out, None)
    return out


def _value_gradient(
    chain: Chain, options: ValueOptions, outputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    (up,) = upstream
    refuse_upstream(upstream)
    return _NOTHING if up is None else _of_weights(chain, options, up)


def _of_weights(chain: Chain, options: ValueOptions, up: Tensor) -> Sequence[Tensor | None]:
    """Another sweep, with a weight for each sequence."""
    batch = chain.emissions.size(0)
    weights = (up / max(batch, 1) if options.reduction == "mean" else up).resolve_neg().expand(batch)
    grads = _value_and_grad(chain._replace(weights=weights), options._replace(reduction="none"))[1:]
    return _given(chain, *grads)


_NOTHING = (None,) * len(Chain._fields)


def _given(chain: Chain, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Sequence[Tensor | None]:
    """In the order of a chain, without those of boundaries that were not given; autograd drops what nobody asked
    for."""
    first, last = None if chain.start is None else start, None if chain.end is None else end
    return emissions, transitions, first, last, None, None, None, None


def _value_and_grad_fake(chain: Chain, options: ValueOptions) -> tuple[Tensor, ...]:
    return _value_fake(chain, options), *_gradient_fake(chain)


def _value_and_grad_kernel(chain: Chain, options: ValueOptions) -> tuple[Tensor, ...]:
    if settings.check:
        options = _checked(options, chain)
    if options.backend == "reference":
        return _reference_value_and_grad(chain, options)
    out, grads = _value_fake(chain, options), _gradient_fake(chain)
    kind, reduction, check, backend = options
    _launch(_value_and_grad, "crf", chain, backend, kind, reduction, check, out, grads)
    return out, *grads


def _reference_value_and_grad(chain: Chain, options: ValueOptions) -> tuple[Tensor, ...]:
    given = {name: x for name in Gradients._fields if (x := getattr(chain, name)) is not None}

    def value(*scores: Tensor) -> Tensor:
        return _reference(chain._replace(**dict(zip(given, scores, strict=True))), options)

    out, pull = torch.func.vjp(value, *given.values())[:2]  # below the dispatcher there is no autograd
    found = dict(zip(given, pull(torch.ones_like(out) if chain.weights is None else chain.weights), strict=True))
    grads = _gradient_fake(chain)
    for name, grad in zip(Gradients._fields, grads, strict=True):
        grad.copy_(found[name]) if name in found else grad.zero_()
    return out, *grads


def _value_and_grad_gradient(
    chain: Chain, options: ValueOptions, grads: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    up, *ups = upstream
    refuse_upstream(upstream)
    if torch.is_grad_enabled() or any(x is not None for x in ups):
        return _derivatives(chain, options, up, ups)
    if up is None:
        return _NOTHING
    weight = shared_weight(up) if up.numel() else 1.0
    if weight is None or chain.weights is not None:
        return _of_weights(chain, options, up)
    if isinstance(weight, Tensor) or weight != 1.0 or keeps_graph():
        grads = [weight * x for x in grads]
    return _given(chain, *grads)


def _viterbi_fake(chain: Chain, options: PathOptions) -> tuple[Tensor, Tensor]:
    batch, time, _ = chain.emissions.shape
    return chain.transitions.new_empty(batch), chain.transitions.new_empty(batch, time, dtype=torch.int64)


def _viterbi_kernel(chain: Chain, options: PathOptions) -> tuple[Tensor, Tensor]:
    if settings.check:
        options = _checked(options, chain)
    if options.backend == "reference":
        return _reference_path(chain, options)
    scores, path = _viterbi_fake(chain, options)
    _launch(_viterbi, "viterbi", chain, options.backend, options.check, scores, path)
    return scores, path


_value = Raw("crf_value", Chain, ValueOptions, _value_kernel, _value_fake, BACKENDS, gradient=_value_gradient)
_value_and_grad = Raw(
    "crf_value_and_grad",
    Chain,
    ValueOptions,
    _value_and_grad_kernel,
    _value_and_grad_fake,
    BACKENDS,
    returns=5,
    gradient=_value_and_grad_gradient,
)
_viterbi = Raw("viterbi", Chain, PathOptions, _viterbi_kernel, _viterbi_fake, BACKENDS, returns=2)
