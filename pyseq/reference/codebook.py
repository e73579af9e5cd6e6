"""Nearest codes, their statistics and the quantiser in plain torch: the oracle of every kernel."""

import torch
from torch import Tensor

ROWS = 1 << 22  # scores that exist at a time
PARALLEL = 1e-6  # squared length of the sum of two unit vectors: below it they are opposite


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Index of the nearest code to each row, and its squared distance, or the largest cosine and that.

    x: (N, H, D) float, codebook: (H, K, D), mask: (N,) bool. Returns (N, H) int64 and (N, H) float64: of equal codes
    the lowest; -1 and NaN for a row that is masked or not finite, and where no code is finite.
    """
    wide, codes = x.double(), codebook.double()
    usable = codes.isfinite().all(2)
    codes = torch.where(usable.unsqueeze(2), codes, 0.0)
    if cosine:
        codes = codes / codes.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    center = codes.sum(1) / usable.sum(1).clamp(min=1).unsqueeze(1) * (not cosine)  # (H, D)
    moved = codes - center.unsqueeze(1)
    bias = (moved**2).sum(2) / 2 * (not cosine)
    rows = x.isfinite().all(2) if mask is None else x.isfinite().all(2) & mask.unsqueeze(1)
    rows = rows & usable.any(1)
    clean = torch.where(rows.unsqueeze(2), wide, 0.0)
    found = []
    size = codes.size(1) * codes.size(0)
    for part in clean.split(max(ROWS // max(size, 1), 1)):
        scores = bias - torch.einsum("nhd,hkd->nhk", part - center, moved)
        scores = torch.where(usable, scores, torch.inf)
        least = scores.amin(2, keepdim=True)
        lowest = torch.where(scores == least, torch.arange(scores.size(2), device=x.device), scores.size(2))
        found.append(lowest.amin(2))
    indices = torch.cat(found) if found else clean.new_zeros(clean.shape[:2], dtype=torch.int64)
    heads = torch.arange(codes.size(0), device=x.device)
    chosen = codes[heads, indices]  # (N, H, D)
    if cosine:
        value = (clean * chosen).sum(2) / clean.norm(dim=2).clamp(min=torch.finfo(torch.float64).tiny)
    else:
        value = ((clean - chosen) ** 2).sum(2)
    return torch.where(rows, indices, -1), torch.where(rows, value, torch.nan)


def code_statistics(x: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many rows chose each code (H, K) int64, and their sum (H, K, D). x: (N, H, D), indices: (N, H)."""
    heads = x.size(1)
    real = (indices >= 0) & (indices < count)
    at = torch.where(real, indices + count * torch.arange(heads, device=x.device), heads * count).reshape(-1)
    rows = torch.where(real.unsqueeze(2), x.double(), 0.0).reshape(at.numel(), x.size(2))
    counts = at.new_zeros(heads * count + 1).index_add(0, at, torch.ones_like(at))
    sums = rows.new_zeros(heads * count + 1, x.size(2)).index_add(0, at, rows)
    return counts[:-1].view(heads, count), sums[:-1].view(heads, count, x.size(2))


def length_of(x: Tensor) -> Tensor:
    """(..., 1), added up in float64: squares leave float32 soon. x: (..., D)."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return length.to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """Divided by their lengths; zero where that is 0, with no derivative of any order. x: (..., D)."""
    nothing = (x == 0).all(-1, keepdim=True)
    some = torch.where(nothing, 1.0, x)
    return torch.where(nothing, 0.0, some / length_of(some))


def rotated(x: Tensor, code: Tensor) -> Tensor:
    """The code, as what the rotation from x to it, and a factor, make of x: both are constants to the gradient.
    x, code: (..., D). The code added to nothing, with the gradient of x, where one is zero or they are opposite."""
    with torch.no_grad():
        e, q = unit(x), unit(code)
        ratio = length_of(code) / length_of(x)
        both = e + q
        square = 2 + 2 * (e * q).sum(-1, keepdim=True)
        turns = (square > PARALLEL) & (ratio > 0) & ratio.isfinite()
        ratio, square = torch.where(turns, ratio, 1.0), torch.where(turns, square, 1.0)
    turned = x - 2 * both * (both * x).sum(-1, keepdim=True) / square + 2 * q * (e * x).sum(-1, keepdim=True)
    return torch.where(turns, ratio * turned, x)


def look_up(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    cosine: bool,
    rotation: bool,
    beta: float,
    gamma: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of rows (N, H, D), loss, counts (H, K) and sums (H, K, D), with gradients by autograd.

    x: (N, H, D), codebook: (H, K, D), indices: (N, H). What is compared, looked up and summed are rows and codes, or
    for cosines both divided by their lengths.
    """
    real = (indices >= 0).unsqueeze(2)
    rows, codes = torch.where(real, x, 0.0), codebook
    rows, codes = (unit(rows), unit(codes)) if cosine else (rows, codes)
    counts, sums = code_statistics(rows.detach(), indices, codebook.size(1))
    chosen = codes[torch.arange(codes.size(0), device=x.device), indices.clamp(min=0)]
    chosen = torch.where(real, chosen, 0.0)
    apart = beta * (rows.detach() - chosen).square().sum() + gamma * (rows - chosen.detach()).square().sum()
    through = rotated(rows, chosen.detach()) if rotation else rows
    quantized = chosen.detach() + (through - through.detach())
    return quantized, apart / terms(counts, x.size(2), reduction), counts, sums


def terms(counts: Tensor, dim: int, reduction: str) -> Tensor:
    """What a sum of squares is divided by: its elements, its rows, or one; at least one."""
    rows = counts.sum().clamp(min=1).double()
    return rows * max(dim, 1) if reduction == "mean" else rows if reduction == "vector" else torch.ones_like(rows)
