"""Adam on the rows of a table that a step has seen, in plain torch: the oracle of every kernel."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def random_bits(seed: int, step: int, tensor: int, elements: Tensor) -> Tensor:
    """32 bits for each element of a table's params (tensor 0), exp_avg (1), exp_avg_sq (2) or max_exp_avg_sq (3): the
    same on every device, for any order of rows. elements: int64. Each round is that of a 32-bit integer hash."""

    def mixed(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
        x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
        return x ^ (x >> 15)

    low, high = elements & _MASK, elements >> 32
    key = (seed & _MASK) ^ (step * 0x9E3779B9 & _MASK) ^ (tensor * 0x85EBCA6B & _MASK)
    return mixed(mixed(low ^ key) ^ (high * 0xC2B2AE35 & _MASK) ^ (seed >> 32 & _MASK))


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 x in bfloat16, up or down with the odds of where it lies between both; what is not finite stays, and
    nothing finite becomes infinite. bits: 32 random ones each, of which 16 are used."""
    whole = x.view(torch.int32).long() & _MASK
    moved = (whole + (bits & 0xFFFF)) & 0xFFFF0000
    cut = whole & 0xFFFF0000
    chosen = torch.where((moved & 0x7FFFFFFF) >= 0x7F800000, cut, moved)  # at the end of the range
    signed = torch.where(chosen >= 1 << 31, chosen - (1 << 32), chosen).int()
    return torch.where(x.isfinite(), signed.view(torch.float32), x).bfloat16()


def lazy_adam_update_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    last: Tensor | None,
    touches: Tensor | None,
    indices: Tensor | None,
    values: Tensor,
    step: int,
    seed: int,
    hyper: tuple[float, ...],
    decay: bool,
    row_bias: bool,
    maximize: bool,
) -> None:
    """One table, in place. param, averages: (V, D); last, touches: (V,); indices: (n,), values: (n, D), or None and
    (V, D), of which rows of zeros are not seen. hyper: lr, beta1, beta2, eps, weight_decay."""
    lr, beta1, beta2, eps, weight_decay = hyper
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    if indices is None:
        rows = (values != 0).any(1).nonzero().squeeze(1)
        grad = values[rows].to(wide)
    else:
        rows, inverse = torch.unique(indices, return_inverse=True)
        grad = torch.zeros(len(rows), param.size(1), dtype=torch.float64, device=param.device)
        grad = grad.index_add(0, inverse, values.double()).to(wide)
    good = grad.isfinite().all(1)
    rows, grad = rows[good], grad[good] * (-1 if maximize else 1)
    ones = torch.ones_like(rows, dtype=torch.float64)
    since = step - last[rows].double() if decay and last is not None else ones
    age = touches[rows].double() + 1 if row_bias and touches is not None else step * ones
    fade1, fade2, c1, c2 = (
        x.to(wide).unsqueeze(1) for x in (beta1**since, beta2**since, 1 - beta1**age, 1 - beta2**age)
    )
    m = fade1 * exp_avg[rows].to(wide) + (1 - beta1) * grad
    v = fade2 * exp_avg_sq[rows].to(wide) + (1 - beta2) * grad * grad
    most = v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq[rows].to(wide), v)
    w = param[rows].to(wide) * (1 - lr * weight_decay)
    w = w - lr / c1 * m / (most.sqrt() / c2.sqrt() + eps)
    elements = rows.unsqueeze(1) * param.size(1) + torch.arange(param.size(1), device=rows.device)
    for number, (table, new) in enumerate(((param, w), (exp_avg, m), (exp_avg_sq, v), (max_exp_avg_sq, most))):
        if table is not None:
            half = table.dtype == torch.bfloat16
            table[rows] = rounded(new, random_bits(seed, step, number, elements)) if half else new
    if last is not None:
        last[rows] = step
    if touches is not None:
        touches[rows] += 1
