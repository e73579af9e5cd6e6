"""How the codebook of a quantiser learns: rows drawn from all ranks, k-means, moving averages, expiry.

Functions of tensors alone, without a branch on their values: every rank runs the same ones in every step.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyseq.kernels.codebook import Chosen, Search
from pyseq.ops import _codebook
from pyseq.reference.codebook import unit

EPSILON = 1e-5  # of Laplace smoothing
FLOOR = 1e-3  # moving averages of fewer rows leave a code where it is: smoothing would drag it to the origin
ROUNDS = 10  # of k-means
JITTER = 1e-3  # of the codes' size, where fewer rows than codes are there to start from
_BITS = 31
_MASK = (1 << _BITS) - 1


class Averages(NamedTuple):
    """Codes (H, K, D), how many rows choose each (H, K), and their sums (H, K, D) or None, averaged over steps."""

    codes: Tensor
    counts: Tensor
    sums: Tensor | None


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, asked at each call."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduced(*parts: Tensor) -> list[Tensor]:
    """Tensors of one dtype added up over all ranks, by one collective."""
    if ranks()[1] == 1:
        return list(parts)
    packed = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(packed)
    split = packed.split([part.numel() for part in parts])
    return [found.view(part.shape) for found, part in zip(split, parts, strict=True)]


def _hash(x: Tensor) -> Tensor:
    """31 bits of each of some int64 numbers, the same on every device and rank."""
    x = (x & _MASK) * 0x2C1B3C6D & _MASK
    x = (x ^ (x >> 15)) * 0x297A2D39 & _MASK
    x = (x ^ (x >> 12)) * 0x6C8E9CF5 & _MASK
    return x ^ (x >> 16)


def draw(rows: Tensor, valid: Tensor, codes: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """A row for each code (H, K, D), and whether it comes from this rank (H, K): zeros elsewhere, to be added up.

    rows: (N, H, D), valid: (N, H), step: int64 scalar, the seed. Each head's rows of all ranks, one behind another, are
    cut into K equal parts and one is taken from each, at least one row behind the last, so none comes twice while there
    are K. A rank takes the others to have as many rows as it has; else two may give a row for one code.
    """
    count, heads, dim = rows.shape
    rank, world = ranks()
    k = torch.arange(codes, device=rows.device)
    each = _hash(step * heads * codes + torch.arange(heads * codes, device=rows.device)).view(heads, codes)
    there = valid.sum(0).unsqueeze(1)  # (H, 1)
    free = (there * world - codes).clamp(min=0)  # with K rows none may move in its part
    place = ((k + _hash(step)) % codes * there * world << 16) + (each >> 15) * free  # in all rows, K 2^16 for each
    number = place // (codes << 16)
    mine = (number // there.clamp(min=1) == rank) & (there > 0)
    if count == 0:
        return rows.new_zeros(heads, codes, dim), mine
    number = number % there.clamp(min=1)  # of a valid row
    at = torch.searchsorted(valid.t().long().cumsum(1), number + 1).clamp(max=count - 1)
    found = rows[at, torch.arange(heads, device=rows.device).unsqueeze(1)]
    return torch.where(mine.unsqueeze(2), found, 0.0), mine


def k_means(rows: Tensor, mask: Tensor | None, codes: Tensor, cosine: bool, step: Tensor) -> Averages:
    """Centers of all ranks' rows (N, H, D), in ten rounds; codes (H, K, D) stay where there is no row at all."""
    rows = rows.to(codes.dtype)
    valid = rows.isfinite().all(2) if mask is None else rows.isfinite().all(2) & mask.unsqueeze(1)
    rows = unit(rows) if cosine else rows
    found, mine = draw(rows, valid, codes.size(1), step)
    found, mine, there = reduced(found, mine.to(codes.dtype), valid.sum(0).to(codes.dtype))
    found = found / mine.clamp(min=1).unsqueeze(2)  # two ranks may have given a row
    few = there < codes.size(1)
    noise = (
        _hash(torch.arange(codes.numel(), device=codes.device)).view_as(codes).to(codes.dtype) / 2 ** (_BITS - 1) - 1
    )
    size = found.square().mean((1, 2), keepdim=True).sqrt()
    found = found + torch.where(few.view(-1, 1, 1), JITTER * size * noise, 0.0)
    codes = torch.where(mine.unsqueeze(2) > 0, unit(found) if cosine else found, codes)
    counts, sums = mine, codes
    for _ in range(ROUNDS):
        indices, _ = _codebook.nearest(Search(rows, codes, mask), cosine, "auto")
        counts, sums = _codebook.statistics(Chosen(rows, indices), codes.size(1), "auto")
        counts, sums = reduced(counts.to(codes.dtype), sums)
        means = unit(sums) if cosine else sums / counts.clamp(min=1).unsqueeze(2)
        codes = torch.where(counts.unsqueeze(2) > 0, means, codes)
    return Averages(codes, counts, counts.unsqueeze(2) * codes)


def followed(before: Averages, counts: Tensor, sums: Tensor | None, decay: float, cosine: bool) -> Averages:
    """Averages after a step in which rows chose codes `counts` times and add up to `sums`."""
    averaged = torch.lerp(counts, before.counts, decay)
    if before.sums is None or sums is None:
        return before._replace(counts=averaged)
    moved = torch.lerp(sums, before.sums, decay)
    total = averaged.sum(1, keepdim=True)
    smooth = total * (averaged + EPSILON) / (total + averaged.size(1) * EPSILON)
    codes = unit(moved) if cosine else moved / smooth.unsqueeze(2)
    return Averages(torch.where(averaged.unsqueeze(2) < FLOOR, before.codes, codes), averaged, moved)


def revived(now: Averages, found: Tensor, there: Tensor, threshold: float) -> Averages:
    """Codes that too few rows choose become rows `found` (H, K, D), where there is one, with the mean use."""
    mean = now.counts.mean(1, keepdim=True)
    dead = (now.counts < threshold * mean) & there
    counts = torch.where(dead, mean, now.counts)
    codes = torch.where(dead.unsqueeze(2), found, now.codes)
    sums = now.sums if now.sums is None else torch.where(dead.unsqueeze(2), mean.unsqueeze(2) * found, now.sums)
    return Averages(codes, counts, sums)
