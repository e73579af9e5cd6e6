"""What launchers and ops agree on."""

from collections.abc import Callable
from functools import wraps
from typing import Any

PARTITION, NLL, SCORE = 0, 1, 2  # what a chain kernel computes
OK, BAD_TAG, BAD_LENGTH, UNFIT = range(4)  # status codes of a CPU kernel


def reduces(launch: Callable[..., int]) -> Callable[..., int]:
    """Reductions for a launcher of `value (B,)` with weights: its `value` may have no dimension, "sum" or "mean"."""

    @wraps(launch)
    def crf(*args: Any, **kwargs: Any) -> int:
        *chain, weights, kind, reduction, check, value, grads = args
        values = value
        if reduction != "none":
            batch = chain[0].size(0)
            values = value.new_empty(batch)
            if reduction == "mean" and grads is not None:
                weights = value.new_full((batch,), 1.0 / max(batch, 1))
        status = launch(*chain, weights, kind, check, values, grads, **kwargs)
        if reduction != "none":
            value.copy_(values.sum() if reduction == "sum" else values.mean())
        return status

    return crf
