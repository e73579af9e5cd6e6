"""Drawing codes from logits, one position after another."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_rules(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number from 0 (greedy), got {temperature}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be a whole number from 0 (all codes), got {top_k!r}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be from 0 to 1 (all codes), got {top_p}")


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """A code (B,) of each row of logits (B, K): the temperature first, then top-k, then top-p of what that left.

    The likeliest code always stays, of equals the first. Half precision is drawn from in float32.
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(1, keepdim=True)) / temperature  # the largest is 0, at any temperature
    if not 0 < top_k < logits.size(1) and top_p == 1:
        return torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    ranked, order = logits.sort(dim=1, descending=True, stable=True)
    ranked = ranked[:, :top_k] if top_k else ranked
    shares = ranked.softmax(1)
    before = shares.cumsum(1) - shares
    before[:, 0] = -1.0
    shares = shares.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(shares, 1, generator=generator)).squeeze(1)


def progress(steps: int) -> Iterable[int]:
    """The steps, behind a bar where they take more than two seconds, a terminal looks on and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return range(steps)
    bar: Any = tqdm(range(steps), desc="sampling", unit="code", delay=2, leave=False, disable=None)
    return bar  # type: ignore[no-any-return]
