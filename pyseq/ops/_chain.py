"""Raw ops of the chain room, how they are launched, and their gradients."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyseq.kernels.chain import BAD_LENGTH, BAD_TAG, ENTROPY, PARTITION, Chain, Gradients, Sampling
from pyseq.ops import _chain_reference as by_reference
from pyseq.ops._autograd import refuse_upstream, shared_weight
from pyseq.ops._backend import Backends, Name, settings
from pyseq.ops._chain_reference import NBestOptions, PathOptions, SampleOptions, ValueOptions
from pyseq.ops._library import Raw, needs_grad
from pyseq.ops._torch import keeps_graph

Reduction = Literal["none", "sum", "mean"]
TRITON_MAX_TAGS = 1024


def _triton_limits(chain: Chain | Sampling) -> list[str]:
    if chain.emissions.dim() == 3 and chain.emissions.size(2) > TRITON_MAX_TAGS:
        return [f"triton serves at most {TRITON_MAX_TAGS} tags, got {chain.emissions.size(2)}"]
    return []


ORDER: dict[str, tuple[Name, ...]] = {"cpu": ("cpp", "numba"), "cuda": ("triton",)}
SAMPLE = Backends("chain", Sampling, ORDER, {"triton": _triton_limits})
N_BEST = Backends("chain", Chain, {"cpu": ("cpp", "numba")}, task="n-best")
BACKENDS = Backends(
    "chain",
    Chain,
    ORDER,
    {"triton": _triton_limits},
    others={"n_best": N_BEST},
)


def value(chain: Chain, kind: int, reduction: Reduction, backend: str) -> Tensor:
    """(B,), or a scalar with a reduction."""
    direct, check, backend = BACKENDS.way(backend, chain)
    options = ValueOptions(kind, reduction, check, backend)
    if backend == "reference":
        return by_reference.value(chain, options)
    if torch.is_grad_enabled() and needs_grad(chain):
        return _value_and_grad.first(chain, options, direct)
    return _value(chain, options, direct)  # type: ignore[no-any-return]


def partial_nll(chain: Chain, allowed: Chain, reduction: Reduction, backend: str) -> Tensor:
    """log Z less that of the allowed paths; a sequence without one takes no part in log Z, NaN or not."""
    log_allowed = value(allowed, PARTITION, "none", backend)
    dead = log_allowed == -torch.inf
    alive = chain._replace(emissions=chain.emissions.masked_fill(dead[:, None, None], 0.0))
    nll = value(alive, PARTITION, "none", backend) - log_allowed
    nll = nll - nll.detach().clamp(max=0)  # rounding must not make a loss negative
    nll = torch.where(dead, torch.inf, nll)
    return nll if reduction == "none" else nll.sum() if reduction == "sum" else nll.mean()


def marginals(chain: Chain, backend: str) -> Tensor:
    """(B, T, K)."""
    direct, check, backend = BACKENDS.way(backend, chain)
    options = ValueOptions(PARTITION, "none", check, backend)
    if backend == "reference":
        return by_reference.marginals(chain, options)
    return _value_and_grad(chain, options, direct)[1]  # type: ignore[no-any-return]


def best_path(chain: Chain, backend: str) -> tuple[Tensor, Tensor]:
    """Scores (B,) and tags (B, T)."""
    direct, check, backend = BACKENDS.way(backend, chain)
    options = PathOptions(check, backend)
    return by_reference.best_path(chain, options) if backend == "reference" else _viterbi(chain, options, direct)


def n_best_paths(chain: Chain, n_best: int, backend: str) -> tuple[Tensor, Tensor]:
    """Scores (B, N) and tags (B, N, T)."""
    direct, check, backend = N_BEST.way(backend, chain)
    options = NBestOptions(n_best, check, backend)
    return by_reference.n_best_paths(chain, options) if backend == "reference" else _n_best(chain, options, direct)


def samples(sampling: Sampling, count: int, backend: str) -> Tensor:
    """(B, N, T)."""
    direct, check, backend = SAMPLE.way(backend, sampling)
    options = SampleOptions(count, check, backend)
    return by_reference.samples(sampling, options) if backend == "reference" else _sample(sampling, options, direct)  # type: ignore[no-any-return]


def _launch(raw: Raw, name: str, chain: Chain, backend: str, *rest: Any) -> None:
    if raw.launch(name, chain, backend, *rest, rows=("emissions",)) in (BAD_TAG, BAD_LENGTH):
        by_reference.raise_bad_values(chain)


def _sweep(raw: Raw, chain: Chain, options: ValueOptions, out: Tensor, grads: Gradients | None) -> None:
    kind, reduction, check, backend = options
    if kind == ENTROPY:
        _launch(raw, "entropy", chain, backend, check, out, grads)
    else:
        _launch(raw, "crf", chain, backend, kind, reduction, check, out, grads)


def _value_fake(chain: Chain, options: ValueOptions) -> Tensor:
    return chain.transitions.new_empty(chain.emissions.size(0) if options.reduction == "none" else ())  # type: ignore[no-any-return]


def _value_kernel(chain: Chain, options: ValueOptions) -> Tensor:
    if settings.check:
        options = by_reference.checked(options, chain)
    if options.backend == "reference":
        return by_reference.value(chain, options)
    out = _value_fake(chain, options)
    _sweep(_value, chain, options, out, None)
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
    return _value_fake(chain, options), *by_reference.gradients_like(chain)


def _value_and_grad_kernel(chain: Chain, options: ValueOptions) -> tuple[Tensor, ...]:
    if settings.check:
        options = by_reference.checked(options, chain)
    if options.backend == "reference":
        return by_reference.value_and_grad(chain, options)
    out, grads = _value_fake(chain, options), by_reference.gradients_like(chain)
    _sweep(_value_and_grad, chain, options, out, grads)
    return out, *grads


def _value_and_grad_gradient(
    chain: Chain, options: ValueOptions, grads: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    up, *ups = upstream
    refuse_upstream(upstream)
    if torch.is_grad_enabled() or any(x is not None for x in ups):
        return by_reference.derivatives(chain, options, up, ups)
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
        options = by_reference.checked(options, chain)
    if options.backend == "reference":
        return by_reference.best_path(chain, options)
    scores, path = _viterbi_fake(chain, options)
    _launch(_viterbi, "viterbi", chain, options.backend, options.check, scores, path)
    return scores, path


def _n_best_fake(chain: Chain, options: NBestOptions) -> tuple[Tensor, Tensor]:
    (batch, time, _), new = chain.emissions.shape, chain.transitions.new_empty
    return new(batch, options.n_best), new(batch, options.n_best, time, dtype=torch.int64)


def _n_best_kernel(chain: Chain, options: NBestOptions) -> tuple[Tensor, Tensor]:
    if settings.check:
        options = by_reference.checked(options, chain)
    if options.backend == "reference":
        return by_reference.n_best_paths(chain, options)
    scores, paths = _n_best_fake(chain, options)
    _launch(_n_best, "n_best", chain, options.backend, options.check, scores, paths)
    return scores, paths


def _sample_fake(sampling: Sampling, options: SampleOptions) -> Tensor:
    batch, time, _ = sampling.emissions.shape
    return sampling.seed.new_empty(batch, options.num_samples, time)  # type: ignore[no-any-return]


def _sample_kernel(sampling: Sampling, options: SampleOptions) -> Tensor:
    if settings.check:
        options = by_reference.checked(options, by_reference.chain_of(sampling))
    if options.backend == "reference":
        return by_reference.samples(sampling, options)
    paths = _sample_fake(sampling, options)
    if _sample.launch("sample", sampling, options.backend, options.check, paths, rows=("emissions",)) == BAD_LENGTH:
        by_reference.raise_bad_values(by_reference.chain_of(sampling))
    return paths


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
_n_best = Raw("viterbi_n_best", Chain, NBestOptions, _n_best_kernel, _n_best_fake, N_BEST, returns=2)
_sample = Raw("crf_sample", Sampling, SampleOptions, _sample_kernel, _sample_fake, SAMPLE)
