"""Kernels of the chain room, forward-backward and Viterbi of linear chains, and what its launchers and ops agree on.

Launchers: `crf(chain, kind, reduction, check, value, grads, paths=None)` fills value (B,), or a scalar with a
reduction, and where `grads` are given the gradients; `viterbi(chain, check, scores, path)` the best scores (B,) and
paths (B, T); `n_best(chain, check, scores, paths)` those of the N best, (B, N) and (B, N, T). `paths` (B,) int32 of
`crf` takes what served each sequence: 0 the first domain, the launcher's last number the log domain.
`entropy(chain, check, value, grads)` fills value (B,) with the entropy of the paths, and gradients as `crf` does.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

from torch import Tensor

PARTITION, NLL, SCORE, ENTROPY = 0, 1, 2, 3  # kinds of value; the last has a launcher of its own
BAD_TAG, BAD_LENGTH, FORBIDDEN = 1, 2, 3  # statuses


class Chain(NamedTuple):
    """The tensors of a call, in the order of every function of the room."""

    emissions: Tensor  # (B, T, K), any strides but that of K
    transitions: Tensor  # (K, K)
    start: Tensor | None = None  # (K,)
    end: Tensor | None = None  # (K,)
    tags: Tensor | None = None  # (B, T) int64
    mask: Tensor | None = None  # (B, T) bool
    lengths: Tensor | None = None  # (B,) int64
    weights: Tensor | None = None  # (B,), of the sequences in the gradients


class Gradients(NamedTuple):
    """Of the value, or of its sum over sequences, which `weights` weigh."""

    emissions: Tensor
    transitions: Tensor
    start: Tensor
    end: Tensor


class LabelledPath(NamedTuple):
    """Tags of sequences. The launcher `neighbours(path, num_tags, label, before, after)` fills three (B, T) int64: tags
    of the live steps, and of those before and after each, -1 where there is none; what is out of range is brought into
    it."""

    tags: Tensor
    mask: Tensor | None
    lengths: Tensor | None


class Sampling(NamedTuple):
    """What `sample(sampling, check, paths)` reads, to fill paths (B, N, T), -1 where there are none."""

    emissions: Tensor
    transitions: Tensor
    start: Tensor | None
    end: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    seed: Tensor  # (1,) int64; with row, sample and live step it gives each number, see csrc/chain/sample.hpp


class LocalSteps(NamedTuple):
    """Steps of a maximum-entropy Markov model, each a softmax over scores + bias of its context. The launcher
    `local_steps(steps, factor, smoothing, accumulate, loss, grad, grad_bias)` fills loss (N,) float64, grad (N, K),
    which it adds to where it is to accumulate, and grad_bias (M, K), which may be `bias` where each context has one
    step; both None: no gradients. The loss is +inf, without gradient, where the label's logit is -inf; on the CPU the
    status is then FORBIDDEN."""

    scores: Tensor  # (N, K)
    bias: Tensor  # (M, K)
    context: Tensor  # (N,) int64, -1: none
    label: Tensor  # (N,) int64, -1: no step
    scale: Tensor  # (N,) of the loss
    weight: Tensor | None = None  # (K,) of the labels


class Unadjusted(NamedTuple):
    """A maximum-entropy Markov model to decode. The launcher `adjust(model, forward, backward, factor, out)` fills out
    (B, T, K) float64, emissions of a chain whose path scores are minus the losses, as pyseq/ops/_memm.py has them."""

    emissions: Tensor  # (B, T, K)
    transitions: Tensor  # (K, K) float64
    mask: Tensor | None


Launcher = Callable[[Chain, int, bool, Tensor, Gradients | None, Tensor | None], int]


def reduces(launch: Launcher) -> Callable[..., int]:
    """Gives a launcher of `value (B,)` reductions: its `value` may have no dimension, "sum" or "mean"."""

    @wraps(launch)
    def crf(
        chain: Chain,
        kind: int,
        reduction: str,
        check: bool,
        value: Tensor,
        grads: Gradients | None,
        paths: Tensor | None = None,
    ) -> int:
        if reduction == "none":
            return launch(chain, kind, check, value, grads, paths)
        batch = chain.emissions.size(0)
        values = value.new_empty(batch)
        if reduction == "mean" and grads is not None:
            chain = chain._replace(weights=value.new_full((batch,), 1.0 / max(batch, 1)))
        status = launch(chain, kind, check, values, grads, paths)
        value.copy_(values.sum() if reduction == "sum" else values.mean())
        return status

    return crf
