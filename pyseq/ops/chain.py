"""Linear chains: log partition, path score, negative log-likelihood, marginals and Viterbi, fused.

Shapes: emissions (B, T, K), transitions (K, K) where [i, j] scores going from tag i to tag j, start and end (K,), where
None means zeros. Which steps are live is said by `mask` (B, T) bool or by `lengths` (B,), not both; None means all.
An absent step is skipped: nothing there is read, and its live neighbours connect directly. An empty sequence has log Z,
score and loss 0. A score of -inf forbids; its gradient is 0. NaN and +inf make their sequence NaN. Parameters may have
any float dtype, float64 only beside float64 emissions. See docs/chain.md for the derivation.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pyseq.kernels.common import BAD_LENGTH, BAD_TAG, NLL, PARTITION, SCORE, UNFIT
from pyseq.ops import _check
from pyseq.ops._autograd import applier, keeps_graph, refuse_batched, refuse_transforms, shared_weight
from pyseq.ops._backend import Backend, Room, checks_forced, compiled, launcher
from pyseq.ops._library import register
from pyseq.reference import chain as reference

Optional = Tensor | None
Reduction = Literal["none", "sum", "mean"]
# emissions, transitions, start, end, tags, mask, lengths
Chain = tuple[Tensor, Tensor, Optional, Optional, Optional, Optional, Optional]
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
    return _value(PARTITION, chain, backend)


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
    return _value(SCORE, chain, backend)


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
    return _value(NLL, chain, backend, reduction)


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
    chosen, check = _choose(chain, backend)
    if chosen == "reference":
        marginals = reference.crf_marginals(*chain[:4], _live(chain))
        return marginals if check else marginals * _one_or_nan(chain)[:, None, None]
    if _needs_grad(chain):
        return _Marginals.apply(*chain, check, chosen)  # type: ignore[no-any-return]
    return _value_and_grad(*chain, None, PARTITION, "none", check, chosen)[1]  # type: ignore[no-any-return]


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
    chosen, check = _choose(chain, backend)
    with torch.no_grad():
        if chosen == "reference":
            scores, tags = reference.viterbi(*chain[:4], _live(chain))
            if not check:
                scores = scores * _one_or_nan(chain)
                tags = tags.masked_fill(scores.isnan().unsqueeze(1), -1)
            return scores, tags
        return _viterbi(*chain, check, chosen)  # type: ignore[no-any-return]


def _value(kind: int, chain: Chain, backend: str, reduction: Reduction = "none") -> Tensor:
    chosen, check = _choose(chain, backend)
    if chosen == "reference":
        return _reduced(_reference(kind, check, chain), reduction)
    if _needs_grad(chain):
        return _apply_value(*chain, (kind, reduction, check, chosen))  # type: ignore[no-any-return]
    return _value_only(*chain, kind, reduction, check, chosen)  # type: ignore[no-any-return]


def _reduced(value: Tensor, reduction: Reduction) -> Tensor:
    return value if reduction == "none" else value.sum() if reduction == "sum" else value.mean()


def _reference(kind: int, checked: bool, chain: Chain) -> Tensor:
    emissions, transitions, start, end, tags, _, _ = chain
    if kind == PARTITION:
        value = reference.crf_log_partition(emissions, transitions, start, end, _live(chain))
    else:
        assert tags is not None
        serve = reference.crf_nll if kind == NLL else reference.crf_score
        value = serve(emissions, transitions, tags.clamp(0, emissions.size(2) - 1), start, end, _live(chain))
    return value if checked else value * _one_or_nan(chain)


def _one_or_nan(chain: Chain) -> Tensor:
    """(B,), NaN for a sequence with a live tag or a length out of range."""
    emissions, *_, tags, _, lengths = chain
    batch, time, num_tags = emissions.shape
    bad = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    if tags is not None:
        bad |= (((tags < 0) | (tags >= num_tags)) & _live(chain)).any(1)
    if lengths is not None:
        bad |= (lengths < 0) | (lengths > time)
    return torch.where(bad, torch.nan, 1.0)


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


def _choose(chain: Chain, backend: str) -> tuple[str, bool]:
    """The backend, and whether tags and lengths out of range raise rather than make their sequence NaN."""
    emissions = chain[0]
    traced = torch.compiler.is_compiling()
    if not traced:
        refuse_transforms(chain[:4])
    chosen = CHAIN.choose(backend, emissions)
    check = (emissions.is_cpu and not traced) or checks_forced()
    if check and (chosen == "reference" or not emissions.is_cpu):
        _raise_bad_values(*chain)
    return chosen, check


def _live(chain: Chain) -> Tensor:
    """(B, T) bool."""
    emissions, *_, mask, lengths = chain
    batch, time, _ = emissions.shape
    if mask is not None:
        return mask
    if lengths is None:
        return torch.ones(batch, time, dtype=torch.bool, device=emissions.device)
    return torch.arange(time, device=emissions.device) < lengths.unsqueeze(1)


def _raise_bad_values(*chain: Any) -> None:
    """Say which value is out of range, and where; synchronises with the host."""
    emissions, _, _, _, tags, _, lengths = chain
    _, time, num_tags = emissions.shape
    if lengths is not None:
        bad = ((lengths < 0) | (lengths > time)).nonzero()
        if len(bad):
            b = int(bad[0])
            raise ValueError(f"lengths must lie in [0, {time}], got {int(lengths[b])} for sequence {b}")
    if tags is not None:
        bad = (((tags < 0) | (tags >= num_tags)) & _live(chain)).nonzero()
        if len(bad):
            b, t = bad[0].tolist()
            raise ValueError(
                f"tags must lie in [0, {num_tags}) at live steps, got {int(tags[b, t])} for sequence {b}, step {t}; "
                "mask the step out if it is padding, or tell nn.CRF with `ignored` what the label means"
            )


# Raw ops: the chain, then for gradients a weight for each sequence or None (as with a reduction), then options.


def _launch(op: str, backend: str, inputs: Any, *rest: Any) -> None:
    launch = getattr(launcher("chain", backend), op)
    status = launch(*inputs, *rest) if backend == "cpp" else UNFIT
    if status == UNFIT:
        emissions, *others = inputs
        if emissions.element_size() == 2 and emissions.is_cpu and backend != "triton":
            emissions = emissions.float()
        others = [None if x is None else x.contiguous() for x in others]
        status = launch(_launchable(emissions), *others, *rest)
        if status == UNFIT:
            raise RuntimeError(f"{op}: a tensor that {backend} cannot take passed the checks; please report this call")
    if status in (BAD_TAG, BAD_LENGTH):
        _raise_bad_values(*inputs[:7])


def _launchable(emissions: Tensor) -> Tensor:
    """Tags contiguous; launchers take any stride of batch and time."""
    return emissions if emissions.stride(2) == 1 else emissions.contiguous()


def _value_fake(*args: Any) -> Tensor:
    emissions, transitions, *_, reduction, _, _ = args
    return transitions.new_empty(emissions.size(0) if reduction == "none" else ())  # type: ignore[no-any-return]


def _value_impl(*args: Any) -> Tensor:
    value = _value_fake(*args)
    _launch("crf", args[-1], (*args[:7], None), *args[7:-1], value, None)
    return value


def _value_and_grad_fake(emissions: Tensor, transitions: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    num_tags, new = emissions.size(2), transitions.new_empty
    return (
        new(emissions.size(0) if rest[-3] == "none" else ()),
        _launchable(torch.empty_like(emissions, dtype=transitions.dtype)),
        new(num_tags, num_tags),
        new(num_tags),
        new(num_tags),
    )


def _value_and_grad_impl(*args: Any) -> tuple[Tensor, ...]:
    out = _value_and_grad_fake(*args)
    value, *grads = out
    _launch("crf", args[-1], args[:8], *args[8:-1], value, grads)
    return out


def _viterbi_fake(emissions: Tensor, transitions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, time, _ = emissions.shape
    return transitions.new_empty(batch), transitions.new_empty(batch, time, dtype=torch.int64)


def _viterbi_impl(*args: Any) -> tuple[Tensor, Tensor]:
    *chain, check, backend = args
    scores, path = _viterbi_fake(*chain)
    _launch("viterbi", backend, chain, check, scores, path)
    return scores, path


_CHAIN_SCHEMA = (
    "Tensor emissions, Tensor transitions, Tensor? start, Tensor? end, Tensor? tags, Tensor? mask, Tensor? lengths"
)
_value_only = register(
    f"crf_value({_CHAIN_SCHEMA}, int kind, str reduction, bool check, str backend) -> Tensor", _value_impl, _value_fake
)
_value_and_grad = register(
    f"crf_value_and_grad({_CHAIN_SCHEMA}, Tensor? weights, int kind, str reduction, bool check, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _value_and_grad_impl,
    _value_and_grad_fake,
)
_viterbi = register(
    f"viterbi({_CHAIN_SCHEMA}, bool check, str backend) -> (Tensor, Tensor)", _viterbi_impl, _viterbi_fake
)


def _needs_grad(chain: Chain) -> bool:
    emissions, transitions, start, end, *_ = chain
    return torch.is_grad_enabled() and (
        emissions.requires_grad
        or transitions.requires_grad
        or (start is not None and start.requires_grad)
        or (end is not None and end.requires_grad)
    )


_NO_GRADS = (None,) * 4  # tags, mask, lengths, options


class _Value(torch.autograd.Function):
    """A value with its gradient from one sweep, kept until the upstream gradient is known."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *chain, ctx.options = args
        value, *grads = _value_and_grad(*chain, None, *ctx.options)
        ctx.save_for_backward(*chain, *grads)
        return value  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Optional, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor only once
        chain, grads = saved[:7], saved[7:]
        kind, reduction, check, backend = ctx.options
        upstream = upstream.resolve_neg()
        if torch.is_grad_enabled():  # create_graph=True
            refuse_batched(upstream)
            value = _reduced(_reference(kind, check, chain), reduction)
            return (*_reference_grad(ctx, value, chain, upstream), *_NO_GRADS)
        weight = shared_weight(upstream) if upstream.numel() else 1.0
        if weight is None:
            batch = chain[0].size(0)
            weights = upstream / batch if reduction == "mean" else upstream
            _, *grads = _value_and_grad(*chain, weights.expand(batch), kind, "none", check, backend)
        elif not isinstance(weight, float) or weight != 1.0 or keeps_graph():
            grads = torch._foreach_mul(grads, weight)
        g_emissions, g_transitions, g_start, g_end = grads  # autograd drops those that nobody asked for
        g_start, g_end = None if chain[2] is None else g_start, None if chain[3] is None else g_end
        return (g_emissions, g_transitions, g_start, g_end, *_NO_GRADS)


_apply_value = applier(_Value)


class _Marginals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *chain, check, backend = args
        ctx.save_for_backward(*chain)
        return _value_and_grad(*chain, None, PARTITION, "none", check, backend)[1]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Optional, ...]:  # type: ignore[override]
        refuse_batched(upstream)
        chain = ctx.saved_tensors
        if not torch.is_grad_enabled():
            chain = *(x if x is None else x.detach().requires_grad_() for x in chain[:4]), *chain[4:]
        with torch.enable_grad():
            emissions, transitions, start, end = chain[:4]
            marginals = reference.crf_marginals(emissions, transitions, start, end, _live(chain))
        return (*_reference_grad(ctx, marginals, chain, upstream), *[None] * 5)


def _reference_grad(ctx: Any, value: Tensor, chain: Chain, upstream: Tensor) -> list[Optional]:
    """Gradients of a value that the reference computed from the chain, differentiable again under create_graph."""
    wanted = [x if n else None for x, n in zip(chain[:4], ctx.needs_input_grad, strict=False)]
    inputs = [x for x in wanted if x is not None]
    found = iter(torch.autograd.grad(value, inputs, upstream, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [None if x is None else next(found) for x in wanted]
