"""Linear chains: log partition, path score, negative log-likelihood, marginals and Viterbi, fused.

Shapes: emissions (B, T, K), transitions (K, K) where [i, j] scores going from tag i to tag j, start and end (K,), where
None means zeros. Which steps are live is said by `mask` (B, T) bool or by `lengths` (B,), not both; None means all.
An absent step is skipped: nothing there is read, and its live neighbours connect directly. An empty sequence has log Z,
score and loss 0. A score of -inf forbids; its gradient is 0. NaN and +inf make their sequence NaN. Parameters may have
any float dtype, float64 only beside float64 emissions. See docs/chain.md for the derivation.
"""

import torch
from torch import Tensor

from pyseq.kernels.common import NLL, PARTITION, SCORE
from pyseq.ops import _chain, _check
from pyseq.ops._autograd import refuse_transforms
from pyseq.ops._backend import Backend, Room, checks_forced, compiled
from pyseq.ops._chain import Chain, Optional, Reduction, raise_bad_values

TRITON_MAX_TAGS = 1024


def _triton_limits(emissions: Tensor) -> list[str]:
    if emissions.dim() == 3 and emissions.size(2) > TRITON_MAX_TAGS:
        return [f"triton serves at most {TRITON_MAX_TAGS} tags, got {emissions.size(2)}"]
    return []


ORDER = {"cpu": ("cpp", "numba", "reference"), "cuda": ("triton", "reference")}
CHAIN = Room("chain", ORDER, {"triton": _triton_limits})
_fits = compiled("chain_fits", lambda *_: False)


@CHAIN.op
def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start: Optional = None,
    end: Optional = None,
    mask: Optional = None,
    *,
    lengths: Optional = None,
    backend: Backend = "auto",
) -> Tensor:
    """Log of the summed exponentiated scores of all tag paths.

    emissions: (B, T, K) float32, float64, bfloat16 or float16. transitions: (K, K). start, end: (K,), None means zeros.
    mask: (B, T) bool, True where live; lengths: (B,) integers in [0, T]; at most one of them, neither means all live.
    Returns (B,) in nats, float64 for float64 emissions, else float32; -inf, with zero gradient, where no path is
    feasible. Differentiable twice in emissions, transitions, start and end.
    Raises ValueError for a wrong shape, device or length, TypeError for a wrong dtype.
    Time O(B T K^2), memory O(B T K); the second derivative runs in the reference, with O(B T K^2) memory.
    Source: Lafferty, McCallum and Pereira 2001; scaled recursion as in Rabiner 1989, section V.A.
    """
    chain = _arguments(emissions, transitions, start, end, None, mask, lengths)
    return _chain.value(PARTITION, chain, "none", *_choose(chain, backend))


@CHAIN.op
def crf_score(
    emissions: Tensor,
    transitions: Tensor,
    tags: Tensor,
    start: Optional = None,
    end: Optional = None,
    mask: Optional = None,
    *,
    lengths: Optional = None,
    backend: Backend = "auto",
) -> Tensor:
    """Score of one tag path a sequence: start, emissions, transitions between live neighbours, end.

    tags: (B, T) int64 or int32 in [0, K) at live steps, anything at absent ones; the rest as in `crf_log_partition`.
    Returns (B,); -inf, with zero gradient, for a forbidden path. Raises ValueError also for a tag out of range, on the
    CPU outside compile or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN. Time O(B T).
    """
    chain = _arguments(emissions, transitions, start, end, tags, mask, lengths, tagged=True)
    return _chain.value(SCORE, chain, "none", *_choose(chain, backend))


@CHAIN.op
def crf_nll(
    emissions: Tensor,
    transitions: Tensor,
    tags: Tensor,
    start: Optional = None,
    end: Optional = None,
    mask: Optional = None,
    *,
    lengths: Optional = None,
    reduction: Reduction = "none",
    backend: Backend = "auto",
) -> Tensor:
    """Negative log-likelihood of a tag path: log partition minus score, value and gradient from one sweep.

    Arguments and errors as in `crf_score`. reduction: "none" gives (B,), "sum" and "mean" a scalar, faster than to
    reduce the result; the mean of an empty batch is NaN, as with torch's losses; another word raises ValueError.
    At least 0; +inf, with zero gradient, for a forbidden path (what `zero_infinity=True` means in CTC loss), also
    beside a NaN off that path. Differentiable twice. Time O(B T K^2), memory O(B T K).
    The sweep is repeated in backward only when the upstream gradient differs between sequences.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    chain = _arguments(emissions, transitions, start, end, tags, mask, lengths, tagged=True)
    return _chain.value(NLL, chain, reduction, *_choose(chain, backend))


@CHAIN.op
def crf_marginals(
    emissions: Tensor,
    transitions: Tensor,
    start: Optional = None,
    end: Optional = None,
    mask: Optional = None,
    *,
    lengths: Optional = None,
    backend: Backend = "auto",
) -> Tensor:
    """Posterior probability of each tag at each step.

    Arguments and errors as in `crf_log_partition`. Returns (B, T, K), float64 for float64 emissions, else float32; rows
    sum to 1 at live steps and are 0 at absent ones and where no path is feasible. Expected counts of tag pairs are the
    gradient of `crf_log_partition(...).sum()` in the transitions. Differentiable; the gradient runs in the reference.
    Time O(B T K^2), memory O(B T K). Source: Rabiner 1989, equation 27.
    """
    chain = _arguments(emissions, transitions, start, end, None, mask, lengths)
    return _chain.marginals(chain, *_choose(chain, backend))


@CHAIN.op
def viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start: Optional = None,
    end: Optional = None,
    mask: Optional = None,
    *,
    lengths: Optional = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The best tag path and its score.

    Arguments and errors as in `crf_log_partition`. Returns scores (B,), float64 for float64 emissions, else float32,
    and tags (B, T) int64, -1 at absent steps. Sums are kept in float64; among equal paths the lowest tag wins, from the
    last step backwards. Where no path is feasible, or a score is NaN, the score is -inf, or NaN, and every tag is -1.
    Not differentiable. Time O(B T K^2), memory O(B T K). Source: Viterbi 1967; Rabiner 1989, section III.B.
    """
    chain = _arguments(emissions, transitions, start, end, None, mask, lengths)
    with torch.no_grad():
        return _chain.best_path(chain, *_choose(chain, backend))


def _arguments(
    emissions: Tensor,
    transitions: Tensor,
    start: Optional,
    end: Optional,
    tags: Optional,
    mask: Optional,
    lengths: Optional,
    tagged: bool = False,
) -> Chain:
    """Checked arguments; parameters widened to the dtype of the sums, integers to int64."""
    chain = emissions, transitions, start, end, tags, mask, lengths
    if not torch.compiler.is_compiling() and _fits(*chain, tagged):
        return chain
    _check.tensor("emissions", emissions, "(batch, time, tags)", 3)
    _check.floating("emissions", emissions)
    emissions = emissions.resolve_neg()
    batch, time, num_tags = emissions.shape
    if num_tags == 0:
        raise ValueError(f"emissions must have at least one tag, got shape {tuple(emissions.shape)}")
    if tagged:
        tags = _integers("tags", tags, emissions, (batch, time), "(batch, time)")
    transitions = _parameter("transitions", transitions, emissions, (num_tags, num_tags), "(tags, tags)")
    if start is not None:
        start = _parameter("start", start, emissions, (num_tags,), "(tags,)")
    if end is not None:
        end = _parameter("end", end, emissions, (num_tags,), "(tags,)")
    if mask is not None:
        if lengths is not None:
            raise ValueError("mask and lengths say the same thing: give one of them, not both")
        if not _check.as_wanted(mask, (batch, time), torch.bool, emissions):
            _check.sized("mask", mask, (batch, time), "(batch, time)")
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be of dtype torch.bool, got {mask.dtype}; use mask.bool()")
            _check.same_device("mask", mask, "emissions", emissions)
    if lengths is not None:
        lengths = _integers("lengths", lengths, emissions, (batch,), "(batch,)")
    return emissions, transitions, start, end, tags, mask, lengths


def _parameter(name: str, x: Tensor, emissions: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    if not _check.as_wanted(x, shape, _check.wide(emissions), emissions):
        _check.sized(name, x, shape, meaning)
        x = _check.parameter(name, x, "emissions", emissions)
    return x.resolve_neg()  # launchers read memory, where the sign of a conjugate's imaginary part may be missing


def _integers(name: str, x: Optional, emissions: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    if x is not None and _check.as_wanted(x, shape, torch.int64, emissions):
        return x
    x = _check.sized(name, x, shape, meaning)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be of dtype torch.int64 or torch.int32, got {x.dtype}")
    _check.same_device(name, x, "emissions", emissions)
    return x.long()


def _choose(chain: Chain, backend: str) -> tuple[bool, str]:
    """Whether tags and lengths out of range raise rather than make their sequence NaN, and the backend."""
    emissions = chain[0]
    traced = torch.compiler.is_compiling()
    if not traced:
        refuse_transforms(chain[:4])
    chosen = CHAIN.choose(backend, emissions)
    check = (emissions.is_cpu and not traced) or checks_forced()
    if check and (chosen == "reference" or not emissions.is_cpu):
        raise_bad_values(*chain)
    return check, chosen
