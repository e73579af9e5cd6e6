"""Linear chains: log partition, path score, negative log-likelihood, marginals and Viterbi, fused.

Shapes: emissions (B, T, K), transitions (K, K) where [i, j] scores going from tag i to tag j, start and end (K,), where
None means zeros. Which steps are live is said by `mask` (B, T) bool or by `lengths` (B,), not both; None means all.
An absent step is skipped: nothing there is read, and its live neighbours connect directly. An empty sequence has log Z,
score and loss 0. A score of -inf forbids; its gradient is 0. NaN and +inf make their sequence NaN. See docs/chain.md
for the derivation.
"""

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
    backend: Backend = "auto",
) -> Tensor:
    """Log of the summed exponentiated scores of all tag paths, log Z.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
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
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths))
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
    tags: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reduction: Reduction = "none",
    backend: Backend = "auto",
) -> Tensor:
    """Negative log-likelihood of a tag path: log partition minus score, value and gradient from one sweep.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    tags: (B, T) int64 or int32, in [0, K) at live steps, anything at absent ones.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    reduction: "none" gives (B,), "sum" and "mean" a scalar, faster than to reduce the result; the mean of an empty
    batch is NaN, as with torch's losses.
    Returns nats, float64 for float64 emissions, else float32: at least 0; +inf, with zero gradient, for a forbidden
    path (what `zero_infinity=True` means in CTC loss), also beside a NaN off that path. Differentiable twice in
    emissions, transitions, start and end.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a tag or length out of range (on the CPU
    in eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN), for another word as reduction and for a
    backend that cannot serve; TypeError for a wrong dtype or something that is no dense tensor.
    Time O(B T K^2), memory O(B T K). The sweep is repeated in backward only when the upstream gradient differs between
    sequences. Source: Lafferty, McCallum and Pereira 2001.

    >>> emissions = torch.zeros(1, 2, 3, requires_grad=True)
    >>> ops.crf_nll(emissions, torch.zeros(3, 3), torch.tensor([[0, 1]]), reduction="sum").exp()  # one path of nine
    tensor(9., grad_fn=<ExpBackward0>)
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
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
    backend: Backend = "auto",
) -> Tensor:
    """Posterior probability of each tag at each step.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
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
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths))
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
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The best tag path and its score.

    emissions: (B, T, K) float32, float64, bfloat16 or float16, K at least 1. transitions: (K, K), start and end: (K,),
    of any float dtype, float64 only beside float64 emissions; no start or end means zeros.
    mask: (B, T) bool, True where a step is live, any pattern. lengths: (B,) int64 or int32 in [0, T]. At most one of
    them; neither means that all steps are live.
    Returns scores (B,), float64 for float64 emissions, else float32, and tags (B, T) int64, -1 at absent steps. Sums
    are kept in float64; among equal paths the lowest tag wins, from the last step backwards. Where no path is
    feasible, or a score is NaN, the score is -inf, or NaN, and every tag is -1. Not differentiable.
    Raises ValueError for a wrong shape or device, for mask beside lengths, for a length out of range (on the CPU in
    eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN) and for a backend that cannot serve;
    TypeError for a wrong dtype or something that is no dense tensor.
    Time O(B T K^2), memory O(B T K). Source: Viterbi 1967; Rabiner 1989, section III.B.

    >>> ops.viterbi(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.zeros(2, 2))
    (tensor([3.]), tensor([[0, 1]]))
    """
    chain = _checked(Chain(emissions, transitions, start, end, None, mask, lengths))
    with torch.no_grad():
        return _chain.best_path(chain, backend)


def _checked(chain: Chain, signature: _check.Signature = _UNTAGGED) -> Chain:
    """Parameters widened to the dtype of the sums, integers to int64."""
    if chain.mask is not None and chain.lengths is not None:
        raise ValueError("mask and lengths say the same thing: give one of them, not both")
    return signature(chain)
