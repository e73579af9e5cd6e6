"""Kernels of the chain room, forward-backward and Viterbi of linear chains, and what its launchers and ops agree on.

Launchers: `crf(chain, kind, reduction, check, value, grads, paths=None)` fills value (B,), or a scalar with a
reduction, and where `grads` are given the gradients; `viterbi(chain, check, scores, path)` the best scores (B,) and
paths (B, T). `paths` (B,) int32 takes what served each sequence: 0 the first domain, the launcher's last number the
log domain.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

from torch import Tensor

PARTITION, NLL, SCORE = 0, 1, 2  # kinds of value
BAD_TAG, BAD_LENGTH = 1, 2  # statuses


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
