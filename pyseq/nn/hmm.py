"""A first-order hidden Markov model over symbols, counted from tagged data or trained by gradients."""

import math
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyseq import ops
from pyseq.nn._chain import (
    Chain,
    ChainLayer,
    Reduction,
    check_compute,
    check_reduction,
    dense,
    forbid,
    matching,
    positive,
    reduced,
    steps,
)
from pyseq.nn.constraints import Constraints
from pyseq.ops._backend import settings
from pyseq.ops._torch import traced

Compute = Literal["nll", "viterbi", "decode", "marginals"]


class HMM(ChainLayer):
    """First-order hidden Markov model: p(x, y) = p(y_1) p(x_1 | y_1) prod_k p(y_k | y_{k-1}) p(x_k | y_k).

    num_tags: K. num_symbols: V, the number of symbols that may be observed; each at least 1, else ValueError.
    batch_first: the layout, False for observations, tags and masks (T, B), True for (B, T).
    constraints: (start (K,), transitions (K, K), end (K,)) of bool, True where allowed, None where everything is, as
    `tag_constraints` gives them. Probabilities are normalised over what is allowed; there is no probability of ending,
    so a constraint on the end takes paths away and leaves the others as they are.

    Parameters: start_logits (K,), transition_logits (K, K), where [i, j] is for going from tag i to tag j, and
    emission_logits (K, V). Their log-softmax over the last dimension is what the model knows: after `fit` they are
    log-probabilities, and `nll` trains them too, with tags or without. -inf is a probability of 0, and stays one: see
    `nn.CRF` on optimizers that turn it into NaN.

    A symbol that no tag emits, because `fit` has not seen it, tells nothing: its step counts as not observed. A tag
    that was never left may be followed by each allowed tag alike.

    Any mask will do: an absent step is skipped, its live neighbours connect directly, nothing there is read, and a
    row without live steps has probability 1. Every method but `fit` goes through `__call__`, as those of `nn.CRF`.

    Time O(B T K^2 + K V), memory O(B T K + K V). Source: Rabiner 1989.
    """

    def __init__(
        self, num_tags: int, num_symbols: int, batch_first: bool = False, *, constraints: Constraints | None = None
    ) -> None:
        super().__init__(num_tags, batch_first, constraints)
        self.num_symbols = positive("symbols", num_symbols)
        self.start_logits = nn.Parameter(torch.empty(self.num_tags))
        self.transition_logits = nn.Parameter(torch.empty(self.num_tags, self.num_tags))
        self.emission_logits = nn.Parameter(torch.empty(self.num_tags, self.num_symbols))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from the standard normal distribution: equal tags would stay equal without labels."""
        for parameter in (self.start_logits, self.transition_logits, self.emission_logits):
            nn.init.normal_(parameter)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_symbols={self.num_symbols}"

    @torch.no_grad()
    def fit(self, observations: Tensor, tags: Tensor, mask: Tensor | None = None, smoothing: float = 0.0) -> "HMM":
        """Set the parameters to the logarithms of relative frequencies, the most likely ones, and return the model.

        observations, tags: (T, B), or (B, T) with `batch_first`, int64 or int32, in [0, V) and [0, K) at live steps:
        the whole corpus at once, whatever was there before is forgotten. mask: as they, bool or uint8, nonzero is live;
        None: all live. smoothing: added to each count, at least 0. Starts and pairs that are forbidden are not counted.
        Without any count a distribution is uniform, over symbols that were seen or, with smoothing, over all; without
        smoothing a symbol that no tag has is left unknown.
        Raises ValueError for a wrong shape, a value out of range and no live step; TypeError for a wrong dtype.
        Synchronises with the host. Not under FSDP2, whose parameters are parts: fit first.

        >>> hmm = HMM(2, 3, batch_first=True).fit(torch.tensor([[0, 2, 2, 1]]), torch.tensor([[0, 1, 1, 0]]))
        >>> hmm.emission_logits.exp()  # tag 0 has symbols 0 and 1, tag 1 symbol 2
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]], grad_fn=<ExpBackward0>)
        """
        if not isinstance(smoothing, Real) or isinstance(smoothing, bool):
            raise TypeError(f"smoothing must be a number, got {smoothing!r}")
        if not 0 <= smoothing < math.inf:
            raise ValueError(f"smoothing must be at least 0 and finite, got {smoothing}")
        self._validate(observations, dense("tags", tags), mask)
        x, y, live = self._batched(observations).long(), self._batched(tags).long(), self._live(mask)
        live = torch.ones_like(x, dtype=torch.bool) if live is None else live
        for name, values, bound in (("observations", x, self.num_symbols), ("tags", y, self.num_tags)):
            _check_range(name, values, ((values < 0) | (values >= bound)) & live, bound)
        row, x, y = live.nonzero()[:, 0], x[live], y[live]
        if not len(row):
            raise ValueError("nothing to count: the mask leaves no live step")
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        size = self.num_tags
        pairs = (size * y[:-1] + y[1:])[~first[1:]]
        emitted = _counted(size * x + y, self.num_symbols, size).T
        start, transitions, _ = self._allowed
        _frequencies(self.start_logits, _counted(y[first], size), smoothing, start)
        _frequencies(self.transition_logits, _counted(pairs, size, size), smoothing, transitions)
        seen = None if smoothing else (emitted > 0).any(0).expand_as(emitted)
        _frequencies(self.emission_logits, emitted, smoothing, seen)
        return self

    def forward(
        self,
        observations: Tensor,
        tags: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
        *,
        compute: Compute = "nll",
        n_best: int | None = None,
    ) -> Any:
        """What `nll` gives for these arguments, or the method that `compute` names: "viterbi", "decode" or "marginals",
        which take no tags. Raises ValueError for another word, else as the method.

        >>> HMM(1, 1, batch_first=True)(torch.tensor([[0, 0]])).item()
        0.0
        """
        check_compute(compute, ("nll",), tags, n_best)
        check_reduction(reduction)
        self._validate(observations, tags, mask)
        chain = self._chain(self._batched(observations), self._live(mask))
        if compute != "nll":
            return self._infer(chain, compute, n_best)
        emissions, transitions, start, end, live = chain
        if tags is None:
            log_p = ops.crf_log_partition(*chain)
        else:
            log_p = ops.crf_score(emissions, transitions, self._batched(tags), start, end, live)
        nll = reduced(-log_p, reduction)
        return nll / steps(live, emissions) if reduction == "token_mean" else nll

    def nll(
        self,
        observations: Tensor,
        tags: Tensor | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """-log p(x, y) of observations and tags, or, without tags, -log p(x), the sum over all of them; in nats.

        observations: (T, B), or (B, T) with `batch_first`, int64 or int32, in [0, V) at live steps. tags: the same, in
        [0, K). mask: as they, bool or uint8, nonzero is live; None: all live.
        reduction: "none" gives (B,); "sum" adds over sequences; "mean", the default, divides that by B (NaN for an
        empty batch, as torch's losses); "token_mean" by the number of live steps, or by 1 where there is none.
        Returns float64 where parameters are float64, else float32: at least 0; +inf, with zero gradient, where the
        probability is 0. Differentiable, without tags twice.
        Raises ValueError for a wrong shape or reduction, for tensors on different devices, and for a value out of range
        (on the CPU outside compile or with PYSEQ_CHECK=1; elsewhere its sequence becomes NaN); TypeError for a wrong
        dtype.

        >>> hmm = HMM(2, 2, batch_first=True).fit(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
        >>> hmm.nll(torch.tensor([[0, 1]]), torch.tensor([[0, 1]])).exp().item()  # all that it has seen
        1.0
        """
        return self._call(observations, tags, mask, reduction)  # type: ignore[no-any-return]

    def decode(self, observations: Tensor, mask: Tensor | None = None, *, n_best: int | None = None) -> list[list[Any]]:
        """The most probable tags of each sequence's live steps, as B lists; all -1 where every path has probability 0.

        observations: (T, B), or (B, T) with `batch_first`, int64 or int32, in [0, V) at live steps. mask: as they, bool
        or uint8, nonzero is live; None: all live. n_best, ties and errors: as for `nn.CRF.decode`.

        >>> HMM(2, 2, batch_first=True).fit(*torch.tensor([[[0, 1]], [[1, 0]]])).decode(torch.tensor([[0, 1]]))
        [[1, 0]]
        """
        return self._call(observations, None, mask, compute="decode", n_best=n_best)  # type: ignore[no-any-return]

    def viterbi(
        self, observations: Tensor, mask: Tensor | None = None, *, n_best: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The most probable path and its log p(x, y), or the N most probable.

        observations: (T, B), or (B, T) with `batch_first`, int64 or int32, in [0, V) at live steps. mask: as they, bool
        or uint8, nonzero is live; None: all live. What is returned, n_best, ties and errors: as for `nn.CRF.viterbi`.

        >>> HMM(2, 2, batch_first=True).fit(*torch.tensor([[[0, 1]], [[1, 0]]])).viterbi(torch.tensor([[0, 1]]))
        (tensor([0.]), tensor([[1, 0]]))
        """
        return self._call(observations, None, mask, compute="viterbi", n_best=n_best)  # type: ignore[no-any-return]

    def marginals(self, observations: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior probability of each tag at each step, p(y_k | x): (T, B, K), or (B, T, K) with `batch_first`.

        observations: (T, B), or (B, T) with `batch_first`, int64 or int32, in [0, V) at live steps. mask: as they, bool
        or uint8, nonzero is live; None: all live. What is returned and errors: as for `nn.CRF.marginals`.

        >>> HMM(2, 2, batch_first=True).fit(*torch.tensor([[[0, 1]], [[1, 0]]])).marginals(torch.tensor([[0, 1]]))[0]
        tensor([[0., 1.],
                [1., 0.]], grad_fn=<SelectBackward0>)
        """
        return self._call(observations, None, mask, compute="marginals")  # type: ignore[no-any-return]

    def _call(self, *args: Any, **options: Any) -> Any:
        """Through `__call__`, but past a subclass's own forward, which may know nothing of `compute`."""
        return self(*args, **options) if type(self).forward is HMM.forward else HMM.forward(self, *args, **options)

    def _validate(self, observations: Tensor, tags: Tensor | None, mask: Tensor | None) -> None:
        dense("observations", observations)
        if observations.dim() != 2:
            raise ValueError(f"observations must have dimension of 2, got {observations.dim()}")
        if tags is not None:
            matching("tags", tags, tuple(observations.shape), "shapes of observations")
        if mask is not None:
            matching("mask", mask, tuple(observations.shape), "shapes of observations")
        for name, x in (("observations", observations), ("tags", tags)):
            if x is not None and x.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name} must be of dtype torch.int64 or torch.int32, got {x.dtype}")
        if observations.device != (own := self.emission_logits.device):
            raise ValueError(f"observations is on {observations.device} but the model is on {own}; move one of them")

    def _chain(self, observations: Tensor, mask: Tensor | None) -> Chain:
        """Observations (B, T)."""
        start, transitions, end = self._allowed
        logits = self.emission_logits
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        symbols = observations.clamp(0, self.num_symbols - 1)
        outside = observations != symbols
        emissions = F.embedding(symbols, logits.T).to(wide) - logits.to(wide).logsumexp(1)  # [B, T, K]
        emissions = torch.where((emissions == -torch.inf).all(2, keepdim=True), 0.0, emissions)
        if not traced() and (settings.check or observations.is_cpu):
            _check_range("observations", observations, outside if mask is None else outside & mask, self.num_symbols)
        else:
            emissions = torch.where(outside.unsqueeze(2), torch.nan, emissions)
        last = None if end is None else forbid(emissions.new_zeros(self.num_tags), end)
        first = _log_probabilities(self.start_logits.to(wide), start)
        return emissions, _log_probabilities(self.transition_logits.to(wide), transitions), first, last, mask


def _check_range(name: str, values: Tensor, bad: Tensor, bound: int) -> None:
    if bad.any():
        b, t = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must lie in [0, {bound}) at live steps, got {int(values[b, t])} for sequence {b}, step {t}; mask "
            "the step out if it is padding"
        )


def _log_probabilities(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Log-softmax over what is allowed, -inf elsewhere, without NaN where nothing is."""
    if allowed is None:
        return logits.log_softmax(-1)
    allowed = allowed.to(logits.device)
    some = torch.where(allowed.any(-1, keepdim=True), forbid(logits, allowed), 0.0)
    return forbid(some.log_softmax(-1), allowed)


def _counted(numbers: Tensor, *shape: int) -> Tensor:
    return torch.bincount(numbers, minlength=math.prod(shape)).view(shape)


def _frequencies(parameter: Tensor, counts: Tensor, smoothing: float, allowed: Tensor | None) -> None:
    """Each row's logarithms of relative frequencies; uniform over what is allowed where nothing was counted."""
    allowed = torch.ones_like(counts, dtype=torch.bool) if allowed is None else allowed.to(counts.device)
    weights = torch.where(allowed, counts.double() + smoothing, 0.0)
    weights = torch.where(weights.sum(-1, keepdim=True) == 0, allowed.double(), weights)
    parameter.copy_((weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)).log())
