"""Raw ops of the chain room, how they are launched, and their gradients."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyseq.kernels.common import BAD_LENGTH, BAD_TAG, NLL, PARTITION, UNFIT
from pyseq.ops._autograd import applier, keeps_graph, refuse_upstream, shared_weight
from pyseq.ops._backend import launcher
from pyseq.ops._library import Unfit, register
from pyseq.reference import chain as reference

Optional = Tensor | None
Reduction = Literal["none", "sum", "mean"]
# emissions, transitions, start, end, tags, mask, lengths
Chain = tuple[Tensor, Tensor, Optional, Optional, Optional, Optional, Optional]


def value(kind: int, chain: Chain, reduction: Reduction, check: bool, backend: str) -> Tensor:
    """(B,), or a scalar with a reduction; `check` as in `_choose` of the public ops."""
    if backend == "reference":
        return _reduced(_reference(kind, check, chain), reduction)
    if _needs_grad(chain):
        return _apply_value(*chain, (kind, reduction, check, backend))  # type: ignore[no-any-return]
    return _value_only(*chain, kind, reduction, check, backend)  # type: ignore[no-any-return]


def marginals(chain: Chain, check: bool, backend: str) -> Tensor:
    """(B, T, K)."""
    if backend == "reference":
        posteriors = reference.crf_marginals(*chain[:4], live(chain))
        return posteriors if check else posteriors * _one_or_nan(chain)[:, None, None]
    if _needs_grad(chain):
        return _Marginals.apply(*chain, check, backend)  # type: ignore[no-any-return]
    return _value_and_grad(*chain, None, PARTITION, "none", check, backend)[1]  # type: ignore[no-any-return]


def best_path(chain: Chain, check: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Scores (B,) and tags (B, T)."""
    if backend == "reference":
        scores, tags = reference.viterbi(*chain[:4], live(chain))
        if not check:
            scores = scores * _one_or_nan(chain)
            tags = tags.masked_fill(scores.isnan().unsqueeze(1), -1)
        return scores, tags
    return _viterbi(*chain, check, backend)  # type: ignore[no-any-return]


def live(chain: Chain) -> Tensor:
    """(B, T) bool."""
    emissions, *_, mask, lengths = chain
    batch, time, _ = emissions.shape
    if mask is not None:
        return mask
    if lengths is None:
        return torch.ones(batch, time, dtype=torch.bool, device=emissions.device)
    return torch.arange(time, device=emissions.device) < lengths.unsqueeze(1)


def raise_bad_values(*chain: Any) -> None:
    """Say which value is out of range, and where; synchronises with the host."""
    emissions, _, _, _, tags, _, lengths = chain
    _, time, num_tags = emissions.shape
    if lengths is not None:
        bad = ((lengths < 0) | (lengths > time)).nonzero()
        if len(bad):
            b = int(bad[0])
            raise ValueError(f"lengths must lie in [0, {time}], got {int(lengths[b])} for sequence {b}")
    if tags is not None:
        bad = (((tags < 0) | (tags >= num_tags)) & live(chain)).nonzero()
        if len(bad):
            b, t = bad[0].tolist()
            raise ValueError(
                f"tags must lie in [0, {num_tags}) at live steps, got {int(tags[b, t])} for sequence {b}, step {t}; "
                "mask the step out if it is padding, or tell nn.CRF with `ignored` what the label means"
            )


def _reduced(value: Tensor, reduction: Reduction) -> Tensor:
    return value if reduction == "none" else value.sum() if reduction == "sum" else value.mean()


def _reference(kind: int, checked: bool, chain: Chain) -> Tensor:
    emissions, transitions, start, end, tags, _, _ = chain
    if kind == PARTITION:
        value = reference.crf_log_partition(emissions, transitions, start, end, live(chain))
    else:
        assert tags is not None
        serve = reference.crf_nll if kind == NLL else reference.crf_score
        value = serve(emissions, transitions, tags.clamp(0, emissions.size(2) - 1), start, end, live(chain))
    return value if checked else value * _one_or_nan(chain)


def _one_or_nan(chain: Chain) -> Tensor:
    """(B,), NaN for a sequence with a live tag or a length out of range."""
    emissions, *_, tags, _, lengths = chain
    batch, time, num_tags = emissions.shape
    bad = torch.zeros(batch, dtype=torch.bool, device=emissions.device)
    if tags is not None:
        bad |= (((tags < 0) | (tags >= num_tags)) & live(chain)).any(1)
    if lengths is not None:
        bad |= (lengths < 0) | (lengths > time)
    return torch.where(bad, torch.nan, 1.0)


def _needs_grad(chain: Chain) -> bool:
    emissions, transitions, start, end, *_ = chain
    return torch.is_grad_enabled() and (
        emissions.requires_grad
        or transitions.requires_grad
        or (start is not None and start.requires_grad)
        or (end is not None and end.requires_grad)
    )


# Raw ops: the chain, then for gradients a weight for each sequence or None (as with a reduction), then options.


def _launch(op: str, backend: str, inputs: Any, *rest: Any) -> None:
    launch = getattr(launcher("chain", backend), op)
    status = launch(*inputs, *rest) if backend == "cpp" else UNFIT
    if status == UNFIT:
        emissions, *others = inputs
        if any(x is not None and x._is_zerotensor() for x in inputs):
            raise Unfit(f"{op}: symbolic zeros have no memory")
        if emissions.element_size() == 2 and emissions.is_cpu and backend != "triton":
            emissions = emissions.float()
        others = [None if x is None else x.contiguous() for x in others]
        status = launch(_launchable(emissions), *others, *rest)
        if status == UNFIT:
            raise Unfit(f"{op}: {backend} cannot read or write a tensor that passed the checks; was its storage freed?")
    if status in (BAD_TAG, BAD_LENGTH):
        raise_bad_values(*inputs[:7])


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
        if torch.is_grad_enabled():  # create_graph=True
            refuse_upstream(upstream)
            value = _reduced(_reference(kind, check, chain), reduction)
            return (*_reference_grad(ctx, value, chain, upstream), *_NO_GRADS)
        weight = shared_weight(upstream) if upstream.numel() else 1.0
        if weight is None:
            batch = chain[0].size(0)
            weights = upstream / batch if reduction == "mean" else upstream.resolve_neg()
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
        refuse_upstream(upstream)
        chain = ctx.saved_tensors
        if torch.compiler.is_compiling():
            wanted = [i for i in range(4) if ctx.needs_input_grad[i]]

            def posteriors(*scores: Tensor) -> Tensor:
                given = dict(enumerate(chain[:4])) | dict(zip(wanted, scores, strict=True))
                return reference.crf_marginals(given[0], given[1], given[2], given[3], live(chain))

            grads: list[Optional] = [None] * 9
            pull = torch.func.vjp(posteriors, *[chain[i] for i in wanted])[1]  # autograd.grad does not compile here
            for i, gradient in zip(wanted, pull(upstream), strict=True):
                grads[i] = gradient
            return tuple(grads)
        if not torch.is_grad_enabled():
            chain = *(x if x is None else x.detach().requires_grad_() for x in chain[:4]), *chain[4:]
        with torch.enable_grad():
            emissions, transitions, start, end = chain[:4]
            marginals = reference.crf_marginals(emissions, transitions, start, end, live(chain))
        return (*_reference_grad(ctx, marginals, chain, upstream), *[None] * 5)


def _reference_grad(ctx: Any, value: Tensor, chain: Chain, upstream: Tensor) -> list[Optional]:
    """Gradients of a value that the reference computed from the chain, differentiable again under create_graph."""
    wanted = [x if n else None for x, n in zip(chain[:4], ctx.needs_input_grad, strict=False)]
    inputs = [x for x in wanted if x is not None]
    found = iter(torch.autograd.grad(value, inputs, upstream, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [None if x is None else next(found) for x in wanted]
