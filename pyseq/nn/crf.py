"""A linear-chain CRF layer: drop-in for `torchcrf.CRF` of pytorch-crf 0.7.2, for any mask and any float dtype."""

from itertools import accumulate, chain
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pyseq import ops

Reduction = Literal["none", "sum", "mean", "token_mean"]
Ignored = Literal["absent", "unknown"]
Compute = Literal["log_likelihood", "nll", "viterbi", "decode", "marginals"]
# emissions (B, T, K), transitions, start, end, mask (B, T)
_Chain = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class CRF(nn.Module):
    """Linear-chain conditional random field over an encoder's emissions.

    num_tags: K, at least 1, else ValueError. batch_first: the module's layout, False for emissions (T, B, K), tags and
    masks (T, B); True for (B, T, K) and (B, T).
    Parameters, interchangeable with those of `torchcrf.CRF`: start_transitions (K,), end_transitions (K,), transitions
    (K, K), where [i, j] scores going from tag i to tag j.

    A score of -inf forbids, with zero gradient. Write it into emissions, or into transitions that no optimizer updates:
    weight decay that is part of the gradient (SGD, Adam, RMSprop, Adagrad, RAdam), Adafactor and averages of weights
    (SWA, EMA) turn a trained -inf into NaN, and every best path into -1.

    Any mask will do: an absent step is skipped, its live neighbours connect directly, nothing there is read (padding
    labels may be -100, emissions NaN), and its gradient is 0. A row without live steps scores 0.

    Every method goes through `__call__`, so hooks, pruning, parametrizations and FSDP2 see each of them. Under
    DistributedDataParallel call the wrapper, `ddp(emissions, tags, mask, "mean", compute="nll")`, never
    `ddp.module.nll`. In a subclass with a `forward` of its own the methods compute past it, and past hooks.
    transformers' `from_pretrained` leaves a CRF that the checkpoint lacks as raw memory, unless the model's
    `_init_weights` calls its `reset_parameters()`.

    Time O(B T K^2), memory O(B T K). Source: Lafferty, McCallum and Pereira 2001.
    """

    def __init__(self, num_tags: int, batch_first: bool = False) -> None:
        try:
            num_tags = index(None if isinstance(num_tags, bool) else num_tags)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"num_tags must be an integer, got {num_tags!r}") from None
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from the uniform distribution on [-0.1, 0.1]."""
        for parameter in (self.start_transitions, self.end_transitions, self.transitions):
            nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        return f"num_tags={self.num_tags}"

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor | None,
        mask: Tensor | None = None,
        reduction: Reduction = "sum",
        *,
        ignore_index: int = -100,
        ignored: Ignored | None = None,
        compute: Compute = "log_likelihood",
    ) -> Tensor | tuple[Tensor, Tensor] | list[list[int]]:
        """Log-likelihood of the tags in nats, at most 0, to be maximised; or what another method computes.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. tags: (T, B) or
        (B, T) int64 or int32, in [0, K) at live steps. mask: as tags, bool or uint8, nonzero is live; None: all live.
        reduction: "none" gives (B,); "sum", the default for every `compute`, adds over sequences; "mean" divides that
        by B, "token_mean" by the number of live steps.
        ignored: what the label `ignore_index` means at a live step, "absent" or "unknown"; None: it is out of range.
        compute: "log_likelihood", or the method whose result is wanted for these arguments: "nll", "viterbi", "decode"
        or "marginals"; the last three take no tags.
        Returns float64 where emissions or parameters are float64, else float32; -inf, with zero gradient, for a
        sequence whose tags are forbidden. Differentiable twice.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape or reduction; ValueError for another word
        in `compute` or `ignored`, for tensors on different devices, and for a tag out of range (on the CPU in
        eager mode or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN); TypeError for a wrong dtype, and for tags
        that are missing or of no use.

        >>> crf = CRF(1, batch_first=True)  # with one tag there is one path
        >>> crf(torch.zeros(1, 2, 1), torch.tensor([[0, 0]])).exp().item()
        1.0
        """
        tagged = compute == "nll" or compute == "log_likelihood"
        if not tagged:
            if compute not in ("viterbi", "decode", "marginals"):
                wanted = "'log_likelihood', 'nll', 'viterbi', 'decode' or 'marginals'"
                raise ValueError(f"compute must be {wanted}, got {compute!r}")
            if tags is not None:
                raise TypeError(f"compute={compute!r} takes no tags; give None for them, then the mask")
        self._validate(emissions, tags, mask, tagged)
        given = self._chain(emissions, mask)
        if tags is not None:
            tags = tags if self.batch_first else tags.transpose(0, 1)
            nll = _nll(given, tags, reduction, ignore_index, ignored)
            return nll if compute == "nll" else -nll
        if compute == "marginals":
            marginals = ops.crf_marginals(*given)
            return marginals if self.batch_first else marginals.transpose(0, 1)
        scores, path = ops.viterbi(*given)
        if compute == "decode":
            return _live_tags(path, given[4])
        return scores, path if self.batch_first else path.transpose(0, 1)

    def nll(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        ignore_index: int = -100,
        ignored: Ignored | None = None,
    ) -> Tensor:
        """Negative log-likelihood of the tags, in nats: a loss, at least 0.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. tags: (T, B) or
        (B, T) int64 or int32, in [0, K) at live steps. mask: as tags, bool or uint8, nonzero is live; None: all live.
        reduction: "none" gives (B,); "sum" adds over sequences; "mean", the default, divides that by B (NaN for an
        empty batch, as torch's losses); "token_mean" by the number of live steps, or by 1 where there is none.
        ignored: what the label `ignore_index` means at a live step. None: nothing, it is out of range and raises.
        "absent": the step is masked out, also for "token_mean". "unknown": some tag, nobody knows which; the loss sums
        over all of them: log Z minus log Z over the paths that agree with the known labels, at twice the time and two
        more tensors of the size of the emissions.
        Returns float64 where emissions or parameters are float64, else float32; +inf, with zero gradient, for a
        sequence whose tags are forbidden. Differentiable twice.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape or reduction, before any value is looked
        at; ValueError for another word in `ignored`, for tensors on different devices, and for a tag out of range (on
        the CPU outside compile or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN); TypeError for a wrong dtype.

        >>> crf = CRF(1, batch_first=True)  # with one tag there is one path
        >>> crf.nll(torch.zeros(1, 2, 1), torch.tensor([[0, 0]])).item()
        0.0
        """
        options: dict[str, Any] = {"ignore_index": ignore_index, "ignored": ignored, "compute": "nll"}
        return self._call(emissions, tags, mask, reduction, **options)  # type: ignore[no-any-return]

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> list[list[int]]:
        """The best tags of each sequence's live steps, as B lists; all -1 where no path is feasible.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. mask: (T, B) or
        (B, T), bool or uint8, nonzero is live; None: all live. Ties go to the lowest tag, from the last step backwards.
        Copies to the host; `viterbi` does not.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape, and for tensors on different devices;
        TypeError for a wrong dtype.

        >>> CRF(3, batch_first=True).decode(torch.eye(3).unsqueeze(0))
        [[0, 1, 2]]
        """
        return self._call(emissions, None, mask, compute="decode")  # type: ignore[no-any-return]

    def viterbi(self, emissions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The best path and its score.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. mask: (T, B) or
        (B, T), bool or uint8, nonzero is live; None: all live.
        Returns scores (B,), float64 where emissions or parameters are float64, else float32, and tags int64 in the
        module's layout, -1 where masked. Where no path is feasible the score is -inf and every tag -1. Ties go to the
        lowest tag, from the last step backwards. Not differentiable.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape, and for tensors on different devices;
        TypeError for a wrong dtype.

        >>> CRF(3, batch_first=True).viterbi(torch.eye(3).unsqueeze(0))[1]
        tensor([[0, 1, 2]])
        """
        return self._call(emissions, None, mask, compute="viterbi")  # type: ignore[no-any-return]

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior probability of each tag at each step.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. mask: (T, B) or
        (B, T), bool or uint8, nonzero is live; None: all live.
        Returns the shape of the emissions, float64 where they or the parameters are float64, else float32: sums to 1
        over tags at live steps; 0 at masked ones and where no path is feasible. Differentiable.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape, and for tensors on different devices;
        TypeError for a wrong dtype.

        >>> CRF(3, batch_first=True).marginals(torch.zeros(1, 2, 3)).sum(2).round(decimals=4).tolist()
        [[1.0, 1.0]]
        """
        return self._call(emissions, None, mask, compute="marginals")  # type: ignore[no-any-return]

    def _call(self, *args: Any, **options: Any) -> Any:
        """Through `__call__`, but past a subclass's own forward, which may know nothing of `compute`."""
        return self(*args, **options) if type(self).forward is CRF.forward else CRF.forward(self, *args, **options)

    def _validate(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None, tagged: bool) -> None:
        _dense("emissions", emissions)
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        rows, columns, num_tags = emissions.shape
        if num_tags != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {num_tags}")
        if tagged:
            _matching("tags", tags, (rows, columns))
        if mask is not None:
            _matching("mask", mask, (rows, columns))

    def _chain(self, emissions: Tensor, mask: Tensor | None) -> _Chain:
        """Views with the batch first, and a bool mask."""
        transitions = self.transitions
        if transitions.dtype == torch.float64:
            emissions = emissions.double()
        if mask is not None and mask.dtype != torch.bool:
            if mask.dtype != torch.uint8:
                raise TypeError(f"mask must be of dtype torch.bool or torch.uint8, got {mask.dtype}; use mask.bool()")
            mask = mask != 0
        if not self.batch_first:
            emissions = emissions.transpose(0, 1)
            mask = None if mask is None else mask.transpose(0, 1)
        return emissions, transitions, self.start_transitions, self.end_transitions, mask


def _dense(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; use padding and a mask")
    return x


def _matching(name: str, x: Tensor | None, shape: tuple[int, int]) -> None:
    x = _dense(name, x)
    if x.shape != shape:
        raise ValueError(
            f"the first two dimensions of emissions and {name} must match, got {shape} and {tuple(x.shape)}"
        )


def _nll(given: _Chain, tags: Tensor, reduction: Reduction, ignore_index: int, ignored: Ignored | None) -> Tensor:
    if reduction not in ("none", "sum", "mean", "token_mean"):
        raise ValueError(f"invalid reduction: {reduction}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a number that a tag can be, of 64 bits, got {ignore_index}")
    if ignored not in (None, "absent", "unknown"):
        raise ValueError(f"ignored must be None, 'absent' or 'unknown', got {ignored!r}")
    emissions, transitions, start, end, mask = given
    reduced = "sum" if reduction == "token_mean" else reduction
    if ignored is not None:
        known = tags != ignore_index
        labelled = known if mask is None else known & mask
    if ignored == "unknown":
        nll = _partial_nll(given, tags, labelled)
        nll = nll.sum() if reduced == "sum" else nll.mean() if reduced == "mean" else nll
    else:
        mask = mask if ignored is None else labelled
        nll = ops.crf_nll(emissions, transitions, tags, start, end, mask, reduction=reduced)
    if reduction == "token_mean":
        return nll / (max(tags.numel(), 1) if mask is None else mask.sum().clamp(min=1))
    return nll


def _partial_nll(given: _Chain, tags: Tensor, labelled: Tensor) -> Tensor:
    """log Z minus log Z over the paths that agree with the tags at labelled steps, (B,)."""
    emissions, transitions, start, end, mask = given
    with torch.no_grad():
        ops.crf_score(emissions, transitions, tags, start, end, labelled)  # raises on a tag out of range
    others = torch.arange(emissions.size(2), device=tags.device) != tags.unsqueeze(2)
    agreeing = emissions.masked_fill(others & labelled.unsqueeze(2), -torch.inf)
    log_z = ops.crf_log_partition(*given)
    log_agreeing = ops.crf_log_partition(agreeing, transitions, start, end, mask)
    nll = torch.where(log_agreeing == -torch.inf, torch.inf, log_z - log_agreeing)
    return nll - nll.detach().clamp(max=0)  # rounding must not make a loss negative


def _live_tags(path: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tags of each sequence's live steps."""
    if mask is None:
        return path.tolist()  # type: ignore[no-any-return]
    mask = mask.cpu()  # NumPy selects several times faster than torch
    flat, counts = path.cpu().numpy()[mask.numpy()].tolist(), mask.sum(1).tolist()
    return [flat[stop - count : stop] for count, stop in zip(counts, accumulate(counts), strict=True)]


def crf_parameter_groups(model: nn.Module, lr: float, multiplier: float = 100.0) -> list[dict[str, Any]]:
    """Parameter groups, for any torch optimizer, in which the CRFs of a model learn `multiplier` times faster.

    At an encoder's own rate, 1e-5, a CRF's transitions hardly move; they want 1e-3 or more.
    model: a module that is or contains a CRF, else ValueError; TypeError for what is no module. lr: of all other
    parameters; TypeError for what is no number. Returns their group, then the group of the CRFs' own parameters, pruned
    and parametrized ones too, at `lr * multiplier`, without empty ones. Every parameter that requires a gradient
    appears once, also where modules share it (a CRF's claim comes first). Decoupled weight decay (AdamW) takes
    `lr * weight_decay` a step, so it grows too; set `groups[-1]["weight_decay"]` to choose otherwise.

    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(8, 3), "crf": CRF(3)})
    >>> [(len(group["params"]), group["lr"]) for group in crf_parameter_groups(model, lr=0.5, multiplier=10.0)]
    [(2, 0.5), (3, 5.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not its parameters, got {type(model).__name__}")
    for name, rate in (("lr", lr), ("multiplier", multiplier)):
        if not isinstance(rate, (int, float, Tensor)):
            raise TypeError(f"{name} must be a number, got {rate!r}")
    crfs = [module for module in model.modules() if isinstance(module, CRF)]
    if not crfs:
        raise ValueError(f"{type(model).__name__} contains no pyseq.nn.CRF; pass the model that holds it")
    own = [crf.parameters(recurse=False) for crf in crfs]
    own += [crf.parametrizations.parameters() for crf in crfs if is_parametrized(crf)]  # type: ignore[union-attr]
    heads = set(chain.from_iterable(own))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        {"params": [parameter for parameter in trained if parameter not in heads], "lr": lr},
        {"params": [parameter for parameter in trained if parameter in heads], "lr": lr * multiplier},
    )
    return [group for group in groups if group["params"]]
