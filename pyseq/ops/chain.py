"""Linear chains: log partition, path score, negative log-likelihood, marginals and Viterbi, fused.

Shapes: emissions (B, T, K), transitions (K, K) where [i, j] scores going from tag i to tag j, start and end (K,), where
None means zeros. Which steps are live is said by `mask` (B, T) bool or by `lengths` (B,), not both; None means all.
An absent step is skipped: nothing there is read, and its live neighbours connect directly. An empty sequence has log Z,
score and loss 0. A score of -inf forbids; its gradient is 0. NaN and +inf make their sequence NaN. See docs/chain.md
for the derivation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.chain import NLL, PARTITION, SCORE, Chain
from pyseq.ops import _chain, _check
from pyseq.ops._backend import Backend
from pyseq.ops._chain import BACKENDS, Reduction

_SCORES = {
    "emissions": "scores (batch, time, tags+)",
    "transitions": "sums (tags, tags)",
    "start": "sums (tags,)?",
    "end": "sums (tags,)?",
}
_LIVE = {"mask": "booleans (batch, time)?", "lengths": "integers (batch,)?"}
_TAGGED = _check.Signature(**_SCORES, tags="integers (batch, time)", **_LIVE, weights="sums (batch,)?")
_UNTAGGED = _check.Signature(**_SCORES, tags="integers (batch, time)?", **_LIVE, weights="sums (batch,)?")


@BACKENDS.op
def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Log of the summed exponentiated scores of all tag paths, log Z.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, the tags that a live step may have; None means every tag.
    Returns (B,) in nats, float64 for float64 emissions, else float32; -inf, with zero gradient, where no path is
    feasible. Differentiable twice in emissions, transitions, start and end.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN) and for a backend that cannot serve;
    TypeError for a wrong dtype or something that is no dense tensor.
    Time O(B T K^2), memory O(B T K); the second derivative runs in the reference, with O(B T K^2) memory.
    Source: Lafferty, McCallum and Pereira 2001; scaled recursion as in Rabiner 1989, section V.A.

    >>> ops.crf_log_partition(torch.zeros(1, 2, 3), torch.zeros(3, 3)).exp()  # nine paths of score 0
    tensor([9.])
    """
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths), allowed=allowed)
    return _chain.value(chain, PARTITION, "none", backend)


@BACKENDS.op
def crf_score(
    emissions: Tensor,
    transitions: Tensor,
    tags: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Score of one tag path a sequence: start, emissions, transitions between live neighbours, end.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    tags: (B, T) int64 or int32, in [0, K) at live steps, anything at absent ones.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    Returns (B,), float64 for float64 emissions, else float32; -inf, with zero gradient, for a forbidden path.
    Differentiable in emissions, transitions, start and end.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a tag or length out of range (on the CPU
    in eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN) and for a backend that cannot serve;
    TypeError for a wrong dtype or something that is no dense tensor.
    Time O(B T), memory O(B T K) with gradients.

    >>> ops.crf_score(torch.ones(1, 2, 3), torch.eye(3), torch.tensor([[2, 2]]))  # 1 + 1, and 1 from tag 2 to tag 2
    tensor([3.])
    """
    chain = _checked(Chain(emissions, transitions, start, end, tags, mask, lengths), _TAGGED)
    return _chain.value(chain, SCORE, "none", backend)


@BACKENDS.op
def crf_nll(
    emissions: Tensor,
    transitions: Tensor,
    tags: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    reduction: Reduction = "none",
    backend: Backend = "auto",
) -> Tensor:
    """Negative log-likelihood of a tag path, log partition minus score, or of all paths that partial labels allow.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    tags: (B, T) int64 or int32, in [0, K) at live steps, anything at absent ones. Or, in place of tags,
    allowed: (B, T, K) bool, the tags that a live step may have: the loss is log Z less log Z of the paths through them.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    reduction: "none" gives (B,), "sum" and "mean" a scalar, faster than to reduce the result; the mean of an empty
    batch is NaN, as with torch's losses.
    Returns nats, float64 for float64 emissions, else float32: at least 0; +inf, with zero gradient, for a forbidden
    path (what `zero_infinity=True` means in CTC loss), also beside a NaN off that path, and where no allowed path is
    feasible. Differentiable twice in emissions, transitions, start and end.
    Raises ValueError for a wrong shape or device, for tags beside allowed or neither, for mask beside lengths, for a
    tag or length out of range (on the CPU in eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN), for
    another word as reduction and for a backend that cannot serve; TypeError for a wrong dtype or something that is no
    dense tensor.
    Time O(B T K^2), memory O(B T K). Value and gradient come from one sweep, with partial labels from two; they are
    repeated in backward only when the upstream gradient differs between sequences. Sources: Lafferty, McCallum and
    Pereira 2001; Tsuboi et al. 2008 (partial labels).

    >>> emissions = torch.zeros(1, 2, 3, requires_grad=True)
    >>> ops.crf_nll(emissions, torch.zeros(3, 3), torch.tensor([[0, 1]]), reduction="sum").exp()  # one path of nine
    tensor(9., grad_fn=<ExpBackward0>)
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if (tags is None) == (allowed is None):
        raise ValueError("crf_nll needs either tags or allowed, " + ("got neither" if tags is None else "got both"))
    if allowed is not None:
        chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths))
        return _chain.partial_nll(chain, _allowed(chain, allowed), reduction, backend)
    chain = _checked(Chain(emissions, transitions, start, end, tags, mask, lengths), _TAGGED)
    return _chain.value(chain, NLL, reduction, backend)


@BACKENDS.op
def crf_marginals(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Posterior probability of each tag at each step.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, the tags that a live step may have; None means every tag.
    Returns (B, T, K), float64 for float64 emissions, else float32; rows sum to 1 at live steps and are 0 at absent ones
    and where no path is feasible. Expected counts of tag pairs are the gradient of `crf_log_partition(...).sum()` in
    the transitions. Differentiable in emissions, transitions, start and end; the gradient runs in the reference.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN) and for a backend that cannot serve;
    TypeError for a wrong dtype or something that is no dense tensor.
    Time O(B T K^2), memory O(B T K). Source: Rabiner 1989, equation 27.

    >>> ops.crf_marginals(torch.zeros(1, 1, 2), torch.zeros(2, 2))
    tensor([[[0.5000, 0.5000]]])
    """
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths), allowed=allowed)
    return _chain.marginals(chain, backend)


@BACKENDS.op
def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    allowed: Tensor | None = None,
    n_best: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The best tag path and its score, or the n best.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    allowed: (B, T, K) bool, the tags that a live step may have; None means every tag.
    Returns scores (B,), float64 for float64 emissions, else float32, and tags (B, T) int64, -1 at absent steps. Sums
    are kept in float64; among equal paths the lowest tag wins, from the last step backwards. Where no path is
    feasible, or a score is NaN, the score is -inf, or NaN, and every tag is -1. Not differentiable.
    n_best: N, at least 1, gives scores (B, N), best first, and tags (B, N, T) of the N best paths, all distinct; the
    first is the path above, other equal ones come in any order. A path that there is not scores -inf with tags -1.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN), for n_best below 1 and for a backend that
    cannot serve; TypeError for a wrong dtype, something that is no dense tensor, or n_best that is no integer.
    Time O(B T K (K + N)), memory O(B T (K + N)); for N paths the reference, which serves them on CUDA, takes
    O(B T K^2 N log(K N)) and O(B K^2 N + B T K N). Sources: Viterbi 1967; Rabiner 1989, section III.B; Lawler 1972
    (N paths).

    >>> ops.viterbi(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.zeros(2, 2))
    (tensor([3.]), tensor([[0, 1]]))
    >>> ops.viterbi(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.zeros(2, 2), n_best=2)
    (tensor([[3., 2.]]), tensor([[[0, 1],
             [1, 1]]]))
    """
    if n_best is not None:
        _check.positive("n_best", n_best)
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths), allowed=allowed)
    with torch.no_grad():
        return _chain.best_path(chain, backend) if n_best is None else _chain.n_best_paths(chain, n_best, backend)


def _checked(chain: Chain, signature: _check.Signature = _UNTAGGED, allowed: Tensor | None = None) -> Chain:
    """Parameters widened to the dtype of the sums, integers to int64; what is not allowed is -inf in the emissions."""
    if chain.mask is not None and chain.lengths is not None:
        raise ValueError("mask and lengths say the same thing: give one of them, not both")
    chain = signature(chain)
    return chain if allowed is None else _allowed(chain, allowed)


class _Labels(NamedTuple):
    emissions: Tensor
    allowed: Tensor


_LABELS = _check.Signature(emissions=_SCORES["emissions"], allowed="booleans (batch, time, tags)")


def _allowed(chain: Chain, allowed: Tensor) -> Chain:
    emissions, allowed = _LABELS(_Labels(chain.emissions, allowed))
    return chain._replace(emissions=emissions.masked_fill(~allowed, -torch.inf))
