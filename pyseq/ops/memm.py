"""Maximum-entropy Markov models (MEMM) over linear chains: loss and exact decoding.

Each live step is a softmax over its emissions plus a row of transitions, that of the tag before it ("forward"), or the
column of the tag after it ("backward"); shapes, masks and -inf are those of pyseq.ops.chain. See docs/memm.md.
"""

from typing import Literal

import torch
from torch import Tensor

from pyseq.ops import _check, _memm
from pyseq.ops._backend import Backend
from pyseq.ops._chain_reference import live
from pyseq.ops._memm import BACKENDS, Memm, Options
from pyseq.ops.chain import crf_log_partition, crf_marginals, viterbi

Direction = Literal["both", "forward", "backward"]
Variant = Literal["sum", "mean"]
_REST = {
    "mask": "booleans (batch, time)?",
    "lengths": "integers (batch,)?",
    "weight": "sums (tags,)?",
    "token_weight": "sums (batch, time)?",
    "weights": "sums (batch,)?",
}
_EMISSIONS, _TAGS = "scores (batch, time, tags+)", "integers (batch, time)"
_DENSE = _check.Signature(
    emissions=_EMISSIONS, transitions="sums (tags, tags)", right="sums (tags, rank)?", tags=_TAGS, **_REST
)
_LOW_RANK = _check.Signature(
    emissions=_EMISSIONS, transitions="sums (tags, rank)", right="sums (tags, rank)", tags=_TAGS, **_REST
)


@BACKENDS.op
def memm_nll(
    emissions: Tensor,
    transitions: Tensor | tuple[Tensor, Tensor],
    tags: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    direction: Direction = "both",
    variant: Variant = "sum",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Loss of a tag path in a MEMM: the cross entropy of each live step given its neighbour's tag, summed.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), where [i, j] scores
    going from tag i to tag j, or a pair of (K, d) that means pair[0] @ pair[1].T, which is never formed; of any float
    dtype, float64 only beside float64 emissions. tags: (B, T) int64 or int32, in [0, K) at live steps.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, in place of tags, those that a live step may have: the mean over directions of minus the
    log of the probability of all paths through them; by the recursion of `crf_log_partition`, in float64.
    direction: given the tag before ("forward"), the tag after ("backward", by the same transitions), or the mean of
    both losses, which is no likelihood. A step without that neighbour has its emissions alone.
    variant: "sum" of emissions and transitions, or their "mean", half of it, but at the step without a neighbour.
    weight (K,), label_smoothing in [0, 1]: as in `torch.nn.functional.cross_entropy`, of each step; smoothing spreads
    over finite scores. token_weight (B, T): of each step. No gradient for these, and none of them beside allowed.
    Returns (B,) in nats, float64 for float64 emissions, else float32; +inf, with zero gradient, for a path with a score
    of -inf. Differentiable in emissions and transitions; the second derivative runs in the reference.
    Raises ValueError for a wrong shape, device or word, for both or neither of tags and allowed, for mask beside
    lengths, for a weight that wants a gradient, for a tag or length out of range (on the CPU in eager mode or with
    PYSEQ_CHECK=1; elsewhere its sequence becomes NaN) and for a backend that cannot serve; TypeError for a wrong dtype
    or something that is no dense tensor.
    Time O(B T K), O(B T K d) with a pair; memory O(B T K) for the gradient, and no more than some steps' logits.
    Source: McCallum, Freitag and Pereira 2000, "Maximum Entropy Markov Models".

    >>> ops.memm_nll(torch.zeros(1, 2, 3), torch.zeros(3, 3), torch.tensor([[0, 1]])).exp()  # a third, twice
    tensor([9.])
    """
    if (tags is None) == (allowed is None):
        raise ValueError("memm_nll needs either tags or allowed, " + ("got neither" if tags is None else "got both"))
    left, right = _pair(transitions)
    forward, backward, halved = _words(direction, variant)
    if tags is None:
        if weight is not None or token_weight is not None or label_smoothing:
            raise ValueError("weight, token_weight and label_smoothing are for tags, not for allowed")
        memm = _checked(Memm(emissions, left, right, _no_tags(emissions), mask, lengths))
        sides = [(True, False)] * forward + [(False, True)] * backward
        chains = [_adjusted(memm, *side, halved, backend) for side in sides]
        losses = [(-crf_log_partition(*chain, allowed=allowed, backend=backend)).clamp(min=0) for chain in chains]
        return (sum(losses[1:], losses[0]) / len(losses)).to(memm.transitions.dtype)
    memm = _checked(Memm(emissions, left, right, tags, mask, lengths, weight, token_weight))
    for name, x in (("weight", weight), ("token_weight", token_weight)):
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(f"memm_nll has no gradient for {name}, which requires one: pass {name}.detach()")
    number = isinstance(label_smoothing, (int, float)) and not isinstance(label_smoothing, bool)
    if not number or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    options = Options(forward, backward, halved, float(label_smoothing), False, "auto")
    return _memm.nll(memm, options, backend)


@BACKENDS.op
def memm_viterbi(
    emissions: Tensor,
    transitions: Tensor | tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    direction: Direction = "both",
    variant: Variant = "sum",
    allowed: Tensor | None = None,
    n_best: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The tag path with the least `memm_nll`, and its score, minus that loss; exact, also for both directions.

    `viterbi(emissions, transitions)`, which many people use instead, is not: the normalisers of the steps depend on the
    path. Here each goes to the emission of the tag that it depends on.

    emissions, transitions, mask, lengths, direction, variant: as for `memm_nll`. allowed: (B, T, K) bool, the tags that
    a live step may have; the model's normalisers stay those of all tags. n_best: N, for scores (B, N), best first, and
    tags (B, N, T), as in `viterbi`.
    Returns scores (B,), float64 for float64 emissions, else float32, and tags (B, T) int64, -1 at absent steps; -inf
    and -1 where no path is feasible, NaN and -1 where a score is NaN. Sums are kept in float64. Not differentiable.
    Raises as `memm_nll`. Time O(B T K^2), memory O(B T K + K^2), also with a pair.

    >>> ops.memm_viterbi(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.zeros(2, 2))[1]
    tensor([[0, 1]])
    """
    left, right = _pair(transitions)
    memm = _checked(Memm(emissions, left, right, _no_tags(emissions), mask, lengths))
    words = _words(direction, variant)
    with torch.no_grad():
        chain = _adjusted(memm, *words, backend)
        scores, path = viterbi(*chain, allowed=allowed, n_best=n_best, backend=backend)
        return scores.to(memm.transitions.dtype), path


@BACKENDS.op
def memm_marginals(
    emissions: Tensor,
    transitions: Tensor | tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    direction: Direction = "forward",
    variant: Variant = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Posterior probability of each tag at each step, of a MEMM of one direction.

    emissions, transitions, mask, lengths, variant: as for `memm_nll`. direction: "forward", the default here, or
    "backward"; the mean of both losses is no distribution over paths, so "both" raises ValueError.
    Returns (B, T, K), float64 for float64 emissions, else float32; rows sum to 1 at live steps, and are 0 at absent
    ones. Differentiable. Raises as `memm_nll`. Time O(B T K^2), memory O(B T K + K^2), also with a pair.

    >>> ops.memm_marginals(torch.zeros(1, 1, 2), torch.zeros(2, 2))
    tensor([[[0.5000, 0.5000]]])
    """
    if direction == "both":
        raise ValueError(
            "marginals are of one direction, and the mean of both losses is no likelihood: ask for direction='forward' "
            "or 'backward' (ops.memm_marginals takes a layer's transitions)"
        )
    left, right = _pair(transitions)
    memm = _checked(Memm(emissions, left, right, _no_tags(emissions), mask, lengths))
    chain = _adjusted(memm, *_words(direction, variant), backend)
    return crf_marginals(*chain, backend=backend).to(memm.transitions.dtype)


def _adjusted(
    memm: Memm, forward: bool, backward: bool, halved: bool, backend: str
) -> tuple[Tensor, Tensor, None, None, Tensor]:
    """A chain whose path scores are minus the losses."""
    alive = live(_memm.as_chain(memm))
    if memm.lengths is not None:
        _memm.check_lengths(memm)
    return *_memm.adjusted(memm, alive, forward, backward, halved, backend), None, None, alive


def _no_tags(emissions: object) -> Tensor:
    shape = emissions.shape[:2] if isinstance(emissions, Tensor) else (0, 0)
    device = emissions.device if isinstance(emissions, Tensor) else None
    return torch.zeros(shape, dtype=torch.int64, device=device)


def _pair(transitions: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(transitions, Tensor):
        return transitions, None
    if not isinstance(transitions, (tuple, list)):
        raise TypeError(f"transitions must be a tensor or a pair of them, got {type(transitions).__name__}")
    found = f"{type(transitions).__name__} of {', '.join(type(x).__name__ for x in transitions) or 'nothing'}"
    if len(transitions) != 2 or not all(isinstance(x, Tensor) for x in transitions):
        raise TypeError(f"transitions must be a tensor or a pair of them, got a {found}")
    return transitions[0], transitions[1]


def _words(direction: str, variant: str) -> tuple[bool, bool, bool]:
    if direction not in ("both", "forward", "backward"):
        raise ValueError(f"direction must be 'both', 'forward' or 'backward', got {direction!r}")
    if variant not in ("sum", "mean"):
        raise ValueError(f"variant must be 'sum' or 'mean', got {variant!r}")
    return direction != "backward", direction != "forward", variant == "mean"


def _checked(memm: Memm) -> Memm:
    if memm.mask is not None and memm.lengths is not None:
        raise ValueError("mask and lengths say the same thing: give one of them, not both")
    return _DENSE(memm) if memm.right is None else _LOW_RANK(memm)
