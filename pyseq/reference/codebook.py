"""Nearest codes in plain torch: the oracle of every kernel."""

import torch
from torch import Tensor

ROWS = 1 << 22  # scores that exist at a time


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
