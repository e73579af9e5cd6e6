"""A maximum-entropy Markov model layer with the interface of `CRF`."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyseq import ops
from pyseq.nn._chain import (
    EmissionsLayer,
    Ignored,
    Reduction,
    agreeing,
    check_compute,
    check_ignored,
    check_reduction,
    forbid,
    live_paths,
    positive,
    reduced,
    steps,
)
from pyseq.nn.constraints import Constraints
from pyseq.ops.memm import Direction, Variant, _words

Compute = Literal["log_likelihood", "nll", "viterbi", "decode", "marginals"]
_WITH_TAGS = ("log_likelihood", "nll")


class MEMM(EmissionsLayer):
    """Maximum-entropy Markov model over an encoder's emissions: a softmax a step, given the neighbour's tag.

    Takes the place of `CRF`, method by method. It trains without a recursion over time; its decoding is exact, which
    Viterbi on emissions and transitions is not.

    num_tags, batch_first: as for `CRF`. direction: given the tag before ("forward"), after ("backward"), or the mean of
    both losses over one matrix, which is no likelihood. variant: "sum" of emissions and transitions, or their "mean".
    rank: d, for transitions left @ right.T of two (K, d), for label sets of tens of thousands; decoding forms (K, K).
    constraints: as for `CRF`; start and end are applied to the emissions of the first and last live step. ValueError
    beside rank.
    Parameters: transitions (K, K), where [i, j] scores going from tag i to tag j, or left and right. There are no start
    and end transitions. Masks, hooks and -inf are as in `CRF`.

    Time O(B T K) of the loss, O(B T K^2) of decoding. Source: McCallum, Freitag and Pereira 2000.
    """

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        direction: Direction = "both",
        rank: int | None = None,
        variant: Variant = "sum",
        constraints: Constraints | None = None,
    ) -> None:
        super().__init__(num_tags, batch_first, constraints)
        _words(direction, variant)
        self.direction, self.variant = direction, variant
        if rank is None:
            self.transitions = nn.Parameter(torch.empty(self.num_tags, self.num_tags))
        else:
            if any(x is not None for x in self._allowed):
                raise ValueError("constraints forbid pairs of tags, which rank never forms; leave one of them out")
            rank = positive("rank", rank)
            self.left, self.right = (nn.Parameter(torch.empty(self.num_tags, rank)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from the uniform distribution on [-0.1, 0.1]."""
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        rank = f", rank={self.left.size(1)}" if hasattr(self, "left") else ""
        return f"{super().extra_repr()}, direction={self.direction!r}{rank}, variant={self.variant!r}"

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
        """Minus the loss of the tags, to be maximised; or what another method computes. Arguments as in `CRF.forward`.

        >>> memm = MEMM(1, batch_first=True)  # with one tag there is one path
        >>> memm(torch.zeros(1, 2, 1), torch.tensor([[0, 0]])).exp().item()
        1.0
        """
        check_compute(compute, _WITH_TAGS, tags, n_best)
        sets = self._sets(allowed, emissions, tags, ignored, compute)
        self._validate(emissions, tags, mask, compute in _WITH_TAGS and sets is None)
        live = self._live(mask)
        given = self._batched(emissions)
        given = given.double() if next(self.parameters()).dtype == torch.float64 else given
        scores, words = self._transitions(), {"direction": self.direction, "variant": self.variant}
        if compute in _WITH_TAGS:
            check_reduction(reduction)
            check_ignored(ignore_index, ignored)
            if tags is None:
                loss = ops.memm_nll(self._bounded(given, live), scores, None, live, allowed=sets, **words)  # type: ignore[arg-type]
                return self._reduced(loss, live, given, reduction, compute)
            tags = self._batched(tags)
            known = tags != ignore_index
            labelled = known if live is None else known & live
            if ignored == "unknown":
                with torch.no_grad():
                    ops.memm_nll(given, scores, tags, labelled)  # raises on a tag out of range
                given = self._bounded(given, live)
                allowed = agreeing(tags, known, self.num_tags)
                loss = ops.memm_nll(given, scores, None, live, allowed=allowed, **words)  # type: ignore[arg-type]
            else:
                live = labelled if ignored == "absent" else live
                loss = ops.memm_nll(self._bounded(given, live), scores, tags, live, **words)  # type: ignore[arg-type]
            return self._reduced(loss, live, tags, reduction, compute)
        given = self._bounded(given, live)
        if compute == "marginals":
            return self._batched(ops.memm_marginals(given, scores, live, **words))  # type: ignore[arg-type]
        best, paths = ops.memm_viterbi(given, scores, live, **words, allowed=sets, n_best=n_best)  # type: ignore[arg-type]
        if compute == "decode":
            return live_paths(best, paths, live, n_best)
        return best, paths if n_best else self._batched(paths)

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
        """Loss of the tags, in nats, `ops.memm_nll`: at least 0, +inf for forbidden ones. Arguments as in `CRF.nll`;
        with ignored="unknown", and with allowed in place of tags, the mean over directions of minus the log of the
        probability of all paths that agree.

        >>> memm = MEMM(1, batch_first=True)  # with one tag there is one path
        >>> memm.nll(torch.zeros(1, 2, 1), torch.tensor([[0, 0]])).item()
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
        """The tags with the least loss of each sequence's live steps, exactly, as B lists; as `CRF.decode`. allowed
        leaves the normalisers those of all tags.

        >>> MEMM(3, batch_first=True).decode(torch.eye(3).unsqueeze(0))
        [[0, 1, 2]]
        """
        options: dict[str, Any] = {"compute": "decode", "n_best": n_best, "allowed": allowed}
        return self._call(emissions, None, mask, **options)  # type: ignore[no-any-return]

    def viterbi(
        self, emissions: Tensor, mask: Tensor | None = None, *, n_best: int | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The path with the least loss, exactly, and minus that loss; as `CRF.viterbi`.

        >>> MEMM(3, batch_first=True).viterbi(torch.eye(3).unsqueeze(0))[1]
        tensor([[0, 1, 2]])
        """
        options: dict[str, Any] = {"compute": "viterbi", "n_best": n_best, "allowed": allowed}
        return self._call(emissions, None, mask, **options)  # type: ignore[no-any-return]

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior probability of each tag at each step, as `CRF.marginals`; ValueError for both directions, whose
        mean loss is no distribution.

        >>> MEMM(3, batch_first=True, direction="forward").marginals(torch.zeros(1, 1, 3)).sum().round().item()
        1.0
        """
        return self._call(emissions, None, mask, compute="marginals")  # type: ignore[no-any-return]

    def _call(self, *args: Any, **options: Any) -> Any:
        """Through `__call__`, but past a subclass's own forward, which may know nothing of `compute`."""
        return self(*args, **options) if type(self).forward is MEMM.forward else MEMM.forward(self, *args, **options)

    def _reduced(
        self, loss: Tensor, live: Tensor | None, like: Tensor, reduction: Reduction, compute: Compute
    ) -> Tensor:
        """like: of a batch, (B, T) or more."""
        loss = reduced(loss, reduction)
        loss = loss / steps(live, like) if reduction == "token_mean" else loss
        return loss if compute == "nll" else -loss

    def _transitions(self) -> Tensor | tuple[Tensor, Tensor]:
        return (self.left, self.right) if hasattr(self, "left") else forbid(self.transitions, self._allowed[1])

    def _bounded(self, emissions: Tensor, live: Tensor | None) -> Tensor:
        """-inf where constraints forbid a tag at the first or last live step."""
        start, _, end = self._allowed
        if start is None and end is None:
            return emissions
        live = torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device) if live is None else live
        count = live.cumsum(1)
        ends = (start, live & (count == 1)), (end, live & (count == count[:, -1:]))
        away = [at.unsqueeze(2) & ~allowed.to(emissions.device) for allowed, at in ends if allowed is not None]
        return emissions.masked_fill(away[0] | away[-1], -torch.inf)
