"""Clipping of gradients, sparse ones among them."""

from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` that takes sparse gradients, too: scales all so that their norm is at most
    max_norm, and returns the norm from before, a scalar.

    Gradients of one row, of which a sparse gradient may have many, are added up before the norm is taken, in float32 or
    better; the gradient itself is scaled as it is. Nothing waits for the device but error_if_nonfinite.
    Time: O(n log n + n D) for n gradients of rows of D numbers; memory O(n D).
    Raises ValueError for max_norm below 0 or NaN, RuntimeError with error_if_nonfinite for a norm that is not finite.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> table(torch.tensor([3, 3])).sum().backward()  # two ones in each place: the norm is that of four twos
    >>> optim.clip_grad_norm_(table.parameters(), max_norm=1.0)
    tensor(4.)
    """
    if not isinstance(max_norm, Real | Tensor) or not max_norm >= 0:
        raise ValueError(f"max_norm must be a number from 0, got {max_norm!r}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    sparse = [p for p in with_grad if p.grad is not None and p.grad.is_sparse]
    dense = [p for p in with_grad if p.grad is not None and not p.grad.is_sparse]
    grads = [p.grad for p in dense if p.grad is not None] + [_summed(p.grad) for p in sparse if p.grad is not None]
    norm = get_total_norm([g for g in grads if g.numel()], norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(dense, max_norm, norm, foreach)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in sparse:
        if p.grad is not None:
            p.grad._values().mul_(scale.to(p.device))
    return norm


def _summed(grad: Tensor) -> Tensor:
    """(n, ...): the sums of values that share an index, behind them zeros; without a question to the device."""
    values = grad._values()
    if grad.is_coalesced() or not len(values):
        return values
    key = torch.zeros_like(grad._indices()[0])
    for indices, size in zip(grad._indices(), grad.shape, strict=False):
        key = key * size + indices
    key, order = key.sort(stable=True)
    place = torch.zeros_like(key)
    torch.cumsum(key[1:] != key[:-1], 0, out=place[1:])
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.zeros_like(values, dtype=wide).index_put_((place,), values[order].to(wide), accumulate=True)
