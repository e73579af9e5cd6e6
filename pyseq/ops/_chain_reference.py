"""The chain's reference as a backend: values, gradients of any order, and what is out of range."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.chain import ENTROPY, NLL, PARTITION, Chain, Gradients, Sampling
from pyseq.ops._backend import settings
from pyseq.ops._torch import traced
from pyseq.reference import chain as reference
from pyseq.reference import chain_paths as paths


class ValueOptions(NamedTuple):
    kind: int  # PARTITION, NLL, SCORE or ENTROPY
    reduction: str  # "none" for the last
    check: bool  # whether tags and lengths out of range raise, rather than make their sequence NaN
    backend: str


class PathOptions(NamedTuple):
    check: bool
    backend: str


class NBestOptions(NamedTuple):
    n_best: int
    check: bool
    backend: str


class SampleOptions(NamedTuple):
    num_samples: int
    check: bool
    backend: str


def gradients_like(chain: Chain) -> Gradients:
    """Not filled; the tags of a step lie side by side."""
    new, num_tags = chain.transitions.new_empty, chain.emissions.size(2)
    emissions = torch.empty_like(chain.emissions, dtype=chain.transitions.dtype)
    emissions = emissions if emissions.stride(2) == 1 else emissions.contiguous()
    return Gradients(emissions, new(num_tags, num_tags), new(num_tags), new(num_tags))


def value(chain: Chain, options: ValueOptions) -> Tensor:
    options = checked(options, chain)
    scores = chain.emissions, chain.transitions
    if options.kind == PARTITION:
        out = reference.crf_log_partition(*scores, chain.start, chain.end, live(chain))
    elif options.kind == ENTROPY:
        out = paths.crf_entropy(*scores, chain.start, chain.end, live(chain))
    else:
        assert chain.tags is not None
        serve = reference.crf_nll if options.kind == NLL else reference.crf_score
        tags = chain.tags.clamp(0, chain.emissions.size(2) - 1)
        out = serve(*scores, tags, chain.start, chain.end, live(chain))
    out = out if options.check else out * _one_or_nan(chain)
    return out if options.reduction == "none" else out.sum() if options.reduction == "sum" else out.mean()


def marginals(chain: Chain, options: ValueOptions) -> Tensor:
    options = checked(options, chain)
    posteriors = reference.crf_marginals(chain.emissions, chain.transitions, chain.start, chain.end, live(chain))
    return posteriors if options.check else posteriors * _one_or_nan(chain)[:, None, None]


def best_path(chain: Chain, options: PathOptions) -> tuple[Tensor, Tensor]:
    options = checked(options, chain)
    scores, tags = reference.viterbi(chain.emissions, chain.transitions, chain.start, chain.end, live(chain))
    if not options.check:
        scores = scores * _one_or_nan(chain)
        tags = tags.masked_fill(scores.isnan().unsqueeze(1), -1)
    return scores, tags


def n_best_paths(chain: Chain, options: NBestOptions) -> tuple[Tensor, Tensor]:
    options = checked(options, chain)
    given = chain.emissions, chain.transitions, chain.start, chain.end, live(chain)
    scores, tags = paths.viterbi_n_best(*given, options.n_best)
    if not options.check:
        lost = _one_or_nan(chain).unsqueeze(1)
        scores, tags = scores * lost, tags.masked_fill(lost.isnan().unsqueeze(2), -1)
    return scores, tags


def chain_of(sampling: Sampling) -> Chain:
    return Chain(*sampling[:4], mask=sampling.mask, lengths=sampling.lengths)


def samples(sampling: Sampling, options: SampleOptions) -> Tensor:
    chain = chain_of(sampling)
    options = checked(options, chain)
    given = chain.emissions, chain.transitions, chain.start, chain.end, live(chain)
    tags = paths.crf_sample(*given, sampling.seed, options.num_samples)
    return tags if options.check else tags.masked_fill(_one_or_nan(chain).isnan()[:, None, None], -1)


def value_and_grad(chain: Chain, options: ValueOptions) -> tuple[Tensor, ...]:
    grads = gradients_like(chain)
    with torch.inference_mode(False):  # inside it, and of its tensors, there are no gradients
        chain = Chain(*(x.clone() if x is not None and x.is_inference() else x for x in chain))
        given = {name: x for name in Gradients._fields if (x := getattr(chain, name)) is not None}

        def of(*scores: Tensor) -> Tensor:
            return value(chain._replace(**dict(zip(given, scores, strict=True))), options)

        out, pull = torch.func.vjp(of, *given.values())[:2]  # below the dispatcher there is no autograd
        found = dict(zip(given, pull(torch.ones_like(out) if chain.weights is None else chain.weights), strict=True))
    for name, grad in zip(Gradients._fields, grads, strict=True):
        grad.copy_(found[name]) if name in found else grad.zero_()
    return out, *grads


def derivatives(
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
        leaves = Chain(*map(leaf, chain))
        # what is multiplied with the gradient of half precision scores is not rounded to them
        moved = leaves._replace(emissions=leaves.emissions.to(leaves.transitions.dtype))
        out = value(moved, options)
        outputs, seeds = [out], [torch.zeros_like(out) if upstream is None else upstream]
        if any(up is not None for up in ups):
            weighed = out if moved.weights is None else out * moved.weights
            scores = moved.emissions, moved.transitions, moved.start, moved.end
            of = [(x, up) for x, up in zip(scores, ups, strict=True) if x is not None and up is not None]
            first = torch.autograd.grad(weighed.sum(), [x for x, _ in of], create_graph=True, materialize_grads=True)
            for (_, up), grad in zip(of, first, strict=True):
                if grad.requires_grad:  # a path's score is linear
                    outputs, seeds = [*outputs, grad], [*seeds, up]
        wanted = [x for x, given in zip(leaves, chain, strict=True) if given is not None and given.requires_grad]
        grads = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=again, allow_unused=True))
    return [None if x is None or not x.requires_grad else next(grads) for x in chain]


def live(chain: Chain) -> Tensor:
    """(B, T) bool."""
    batch, time, _ = chain.emissions.shape
    if chain.mask is not None:
        return chain.mask  # type: ignore[no-any-return]
    if chain.lengths is None:
        return torch.ones(batch, time, dtype=torch.bool, device=chain.emissions.device)
    return torch.arange(time, device=chain.emissions.device) < chain.lengths.unsqueeze(1)  # type: ignore[no-any-return]


def _one_or_nan(chain: Chain) -> Tensor:
    """(B,), NaN for a sequence with a live tag or a length out of range."""
    batch, time, num_tags = chain.emissions.shape
    bad = torch.zeros(batch, dtype=torch.bool, device=chain.emissions.device)
    if chain.tags is not None:
        bad |= (((chain.tags < 0) | (chain.tags >= num_tags)) & live(chain)).any(1)
    if chain.lengths is not None:
        bad |= (chain.lengths < 0) | (chain.lengths > time)
    return torch.where(bad, torch.nan, 1.0)


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
                f"{t}; mask the step out if it is padding, or give nn.CRF or nn.MEMM ignored='absent' or 'unknown' "
                "for a label that is not known"
            )


def checked(options: Any, chain: Chain) -> Any:
    """With PYSEQ_CHECK=1 everything that runs is checked: here what the CPU's kernels do not check themselves."""
    options = options._replace(check=options.check or settings.check)
    if options.check and not traced() and (options.backend == "reference" or not chain.emissions.is_cpu):
        raise_bad_values(chain)
    return options
