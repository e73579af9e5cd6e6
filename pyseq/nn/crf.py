"""A linear-chain CRF layer: drop-in for `torchcrf.CRF` of pytorch-crf 0.7.2, for any mask and any float dtype."""

from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pyseq import ops
from pyseq.nn._chain import (
    Chain,
    EmissionsLayer,
    agreeing,
    check_compute,
    check_ignored,
    check_reduction,
    forbid,
    steps,
)
from pyseq.nn._chain import Ignored as Ignored
from pyseq.nn._chain import Reduction as Reduction
from pyseq.nn.constraints import Constraints
from pyseq.nn.hmm import HMM
from pyseq.nn.memm import MEMM

Compute = Literal["log_likelihood", "nll", "viterbi", "decode", "marginals"]
_WITH_TAGS = ("log_likelihood", "nll")


class CRF(EmissionsLayer):
    """Linear-chain conditional random field over an encoder's emissions.

    num_tags: K, at least 1, else ValueError. batch_first: the module's layout, False for emissions (T, B, K), tags and
    masks (T, B); True for (B, T, K) and (B, T).
    constraints: (start (K,), transitions (K, K), end (K,)) of bool, True where allowed, None where everything is, as
    `tag_constraints` gives them for BIO, BIOES and BMES. What is forbidden scores -inf in every method, while its
    weight stays finite. They are no part of the state dict, and follow the weights from device to device. TypeError
    or ValueError for what does not fit.
    Parameters, interchangeable with those of `torchcrf.CRF`: start_transitions (K,), end_transitions (K,), transitions
    (K, K), where [i, j] scores going from tag i to tag j.

    A score of -inf forbids, with zero gradient. Use `constraints` or write it into emissions, never into weights:
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

    def __init__(self, num_tags: int, batch_first: bool = False, *, constraints: Constraints | None = None) -> None:
        super().__init__(num_tags, batch_first, constraints)
        num_tags = self.num_tags
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from the uniform distribution on [-0.1, 0.1]."""
        for parameter in (self.start_transitions, self.end_transitions, self.transitions):
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor | None,
        mask: Tensor | None = None,
        reduction: Reduction = "sum",
        *,
        ignore_index: int = -100,
        ignored: Ignored | None = None,
        allowed: Tensor | None = None,
        compute: Compute = "log_likelihood",
        n_best: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | list[list[Any]]:
        """Log-likelihood of the tags in nats, at most 0, to be maximised; or what another method computes.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. tags: (T, B) or
        (B, T) int64 or int32, in [0, K) at live steps. mask: as tags, bool or uint8, nonzero is live; None: all live.
        reduction: "none" gives (B,); "sum", the default for every `compute`, adds over sequences; "mean" divides that
        by B, "token_mean" by the number of live steps.
        ignored: what the label `ignore_index` means at a live step, "absent" or "unknown"; None: it is out of range.
        allowed: as emissions, bool, in place of tags (None), the tags that each step may have.
        compute: "log_likelihood", or the method whose result is wanted for these arguments: "nll", "viterbi", "decode"
        or "marginals"; the last three take no tags. n_best: as `viterbi` and `decode` take it.
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
        check_compute(compute, _WITH_TAGS, tags, n_best)
        sets = self._sets(allowed, emissions, tags, ignored, compute)
        self._validate(emissions, tags, mask, compute in _WITH_TAGS and sets is None)
        given = self._chain(emissions, mask)
        if compute in _WITH_TAGS:
            labels = None if tags is None else self._batched(tags)
            nll = _nll(given, labels, sets, reduction, ignore_index, ignored)
            return nll if compute == "nll" else -nll
        return self._infer(given, compute, n_best, sets)  # type: ignore[no-any-return]

    def nll(
        self,
        emissions: Tensor,
        tags: Tensor | None,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        ignore_index: int = -100,
        ignored: Ignored | None = None,
        allowed: Tensor | None = None,
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
        allowed: as emissions, bool, in place of tags (None): the tags that each step may have; log Z minus log Z over
        them, +inf where there is no such path.
        Returns float64 where emissions or parameters are float64, else float32; +inf, with zero gradient, for a
        sequence whose tags are forbidden. Differentiable twice.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape or reduction, before any value is looked
        at; ValueError for another word in `ignored`, for tensors on different devices, and for a tag out of range (on
        the CPU outside compile or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN); TypeError for a wrong dtype.

        >>> crf = CRF(1, batch_first=True)  # with one tag there is one path
        >>> crf.nll(torch.zeros(1, 2, 1), torch.tensor([[0, 0]])).item()
        0.0
        """
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "ignored": ignored,
            "allowed": allowed,
            "compute": "nll",
        }
        return self._call(emissions, tags, mask, reduction, **options)  # type: ignore[no-any-return]

    def decode(
        self, emissions: Tensor, mask: Tensor | None = None, *, n_best: int | None = None, allowed: Tensor | None = None
    ) -> list[list[Any]]:
        """The best tags of each sequence's live steps, as B lists; all -1 where no path is feasible.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. mask: (T, B) or
        (B, T), bool or uint8, nonzero is live; None: all live. Ties go to the lowest tag, from the last step backwards.
        n_best: N, for B lists of the N best paths, best first; fewer, perhaps none, where no more are feasible.
        allowed: as emissions, bool, the tags that each step may have.
        Copies to the host; `viterbi` does not.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape, for tensors on different devices, and for
        n_best below 1; TypeError for a wrong dtype.

        >>> CRF(3, batch_first=True).decode(torch.eye(3).unsqueeze(0))
        [[0, 1, 2]]
        >>> CRF(2, batch_first=True).decode(torch.tensor([[[0.0, 1.0]]]), n_best=3)  # there are two paths
        [[[1], [0]]]
        """
        options: dict[str, Any] = {"compute": "decode", "n_best": n_best, "allowed": allowed}
        return self._call(emissions, None, mask, **options)  # type: ignore[no-any-return]

    def viterbi(
        self, emissions: Tensor, mask: Tensor | None = None, *, n_best: int | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best path and its score, or the N best.

        emissions: (T, B, K), or (B, T, K) with `batch_first`; float32, float64, bfloat16 or float16. mask: (T, B) or
        (B, T), bool or uint8, nonzero is live; None: all live.
        Returns scores (B,), float64 where emissions or parameters are float64, else float32, and tags int64 in the
        module's layout, -1 where masked. Where no path is feasible the score is -inf and every tag -1. Ties go to the
        lowest tag, from the last step backwards. Not differentiable.
        n_best: N, for scores (B, N), not increasing, and tags (B, N, T) of different paths, in this order whatever
        `batch_first` is; -inf and -1 where no more are feasible.
        allowed: as emissions, bool, the tags that each step may have.
        Raises ValueError, in the words of `torchcrf.CRF`, for a wrong shape, for tensors on different devices, and for
        n_best below 1; TypeError for a wrong dtype.

        >>> CRF(3, batch_first=True).viterbi(torch.eye(3).unsqueeze(0))[1]
        tensor([[0, 1, 2]])
        """
        options: dict[str, Any] = {"compute": "viterbi", "n_best": n_best, "allowed": allowed}
        return self._call(emissions, None, mask, **options)  # type: ignore[no-any-return]

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

    def _chain(self, emissions: Tensor, mask: Tensor | None) -> Chain:
        """Views with the batch first, and a bool mask."""
        weights = self.start_transitions, self.transitions, self.end_transitions
        start, transitions, end = map(forbid, weights, self._allowed)
        if transitions.dtype == torch.float64:
            emissions = emissions.double()
        return self._batched(emissions), transitions, start, end, self._live(mask)


def _nll(
    given: Chain,
    tags: Tensor | None,
    allowed: Tensor | None,
    reduction: Reduction,
    ignore_index: int,
    ignored: Ignored | None,
) -> Tensor:
    check_reduction(reduction)
    check_ignored(ignore_index, ignored)
    emissions, transitions, start, end, mask = given
    summed = "sum" if reduction == "token_mean" else reduction
    if tags is None:
        nll = ops.crf_nll(emissions, transitions, None, start, end, mask, allowed=allowed, reduction=summed)
        return nll / steps(mask, emissions) if reduction == "token_mean" else nll
    if ignored is not None:
        known = tags != ignore_index
        labelled = known if mask is None else known & mask
    if ignored == "unknown":
        with torch.no_grad():
            ops.crf_score(emissions, transitions, tags, start, end, labelled)  # raises on a tag out of range
        allowed = agreeing(tags, known, emissions.size(2))
        nll = ops.crf_nll(emissions, transitions, None, start, end, mask, allowed=allowed, reduction=summed)
    else:
        mask = mask if ignored is None else labelled
        nll = ops.crf_nll(emissions, transitions, tags, start, end, mask, reduction=summed)
    return nll / steps(mask, tags) if reduction == "token_mean" else nll


_HEADS = (CRF, MEMM, HMM)


def crf_parameter_groups(model: nn.Module, lr: float, multiplier: float = 100.0) -> list[dict[str, Any]]:
    """Parameter groups, for any torch optimizer, in which the heads of a model learn `multiplier` times faster.

    At an encoder's own rate, 1e-5, a CRF's transitions hardly move; they want 1e-3 or more.
    model: a module that is or contains a head, a CRF, MEMM or HMM, else ValueError; TypeError for what is no module.
    lr: of all other parameters; TypeError for what is no number. Returns their group, then the group of the heads' own
    parameters, pruned and parametrized ones too, at `lr * multiplier`, without empty ones. Every parameter that
    requires a gradient appears once, also where modules share it (a head's claim comes first). Decoupled weight decay
    (AdamW) takes `lr * weight_decay` a step, so it grows too; set `groups[-1]["weight_decay"]` to choose otherwise.

    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(8, 3), "crf": CRF(3)})
    >>> [(len(group["params"]), group["lr"]) for group in crf_parameter_groups(model, lr=0.5, multiplier=10.0)]
    [(2, 0.5), (3, 5.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not its parameters, got {type(model).__name__}")
    for name, rate in (("lr", lr), ("multiplier", multiplier)):
        if not isinstance(rate, (int, float, Tensor)):
            raise TypeError(f"{name} must be a number, got {rate!r}")
    layers = [module for module in model.modules() if isinstance(module, _HEADS)]
    if not layers:
        names = " or ".join(f"pyseq.nn.{head.__name__}" for head in _HEADS)
        raise ValueError(f"{type(model).__name__} contains no {names}; pass the model that holds it")
    own = [layer.parameters(recurse=False) for layer in layers]
    own += [layer.parametrizations.parameters() for layer in layers if is_parametrized(layer)]  # type: ignore[union-attr]
    heads = set(chain.from_iterable(own))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        {"params": [parameter for parameter in trained if parameter not in heads], "lr": lr},
        {"params": [parameter for parameter in trained if parameter in heads], "lr": lr * multiplier},
    )
    return [group for group in groups if group["params"]]
