"""Rows and codebooks to search, and whether what was found is near enough."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyseq import explain, ops
from pyseq.kernels.codebook import Search
from pyseq.ops._backend import launcher
from pyseq.testing import assert_within, unit
from pyseq.testing.aot import Binary

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("apart", "near", "offset", "grid", "spoilt", "huge")


def smoke() -> str:
    """A search, as a fresh installation must make it; returns the backend that served."""
    codes = torch.eye(5)
    indices, distance = ops.nearest_code(codes.flip(0) * 0.9, codes)
    assert indices.tolist() == [4, 3, 2, 1, 0]
    torch.testing.assert_close(distance, torch.full((5,), 0.01))
    return explain(ops.nearest_code, codes, codes).chosen


def search(
    kind: str, n: int, heads: int, count: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Search:
    """On the CPU. apart: independent; near: several almost equal codes a row; offset: far from the origin; grid: whole
    numbers, with many ties; huge: scores beyond float32; spoilt: NaN, infinities and large numbers, and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, codes, mask = normal(n, heads, dim), normal(heads, count, dim), None
    if kind == "near":
        codes = codes[:, torch.arange(count) // 4] + 1e-3 * normal(heads, count, dim)
    if kind == "offset":
        x, codes = x + 100, codes + 100
    if kind == "grid":
        x, codes = x.round(), codes.round()
    if kind == "huge" and dtype != torch.float16:
        x, codes = x * 1e20, codes * 1e20
    if kind == "spoilt":
        mask = torch.rand(n, generator=generator) < 0.8
        x[torch.rand(n, heads, generator=generator) < 0.1] *= torch.nan
        x[torch.rand(n, heads, dim, generator=generator) < 0.02] = torch.inf
        codes[torch.rand(heads, count, generator=generator) < 0.2] *= torch.nan
        codes[torch.rand(heads, count, dim, generator=generator) < 0.02] = -torch.inf
        if dtype != torch.float16:
            x[torch.rand(n, heads, generator=generator) < 0.1] *= 1e25
    wide = torch.promote_types(dtype, torch.float32)
    return Search(x.to(dtype), codes.to(wide), mask)


def excess(given: Search, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row and code in float64: how much worse than the best it is, how much it may be, and its value; NaN and
    zeros where nothing can be found."""
    x, codes = given.x.cpu().double(), given.codebook.cpu().double()
    usable = codes.isfinite().all(2)
    good = x.isfinite().all(2) & usable.any(1)
    good &= True if given.mask is None else given.mask.cpu().unsqueeze(1)
    clean = torch.where(good.unsqueeze(2), x, 0.0)
    codes = torch.where(usable.unsqueeze(2), codes, 0.0)
    u = unit(given.codebook.dtype)
    if cosine:
        value = torch.einsum("nhd,hkd->nhk", clean, codes)
        lengths = clean.norm(dim=2).unsqueeze(2) * codes.norm(dim=2)
        value = torch.where(lengths > 0, value / lengths.clamp(min=1e-300), 0.0)
        worse = torch.where(usable, value, -torch.inf).amax(2, keepdim=True) - value
        room = 4 * (x.size(2) + 4) * u * torch.ones_like(value)
    else:
        value = (clean.unsqueeze(2) - codes).square().sum(3)
        worse = value - torch.where(usable, value, torch.inf).amin(2, keepdim=True)
        center = codes.sum(1) / usable.sum(1).clamp(min=1).unsqueeze(1)
        away, off = (clean - center).norm(dim=2).unsqueeze(2), (codes - center.unsqueeze(1)).norm(dim=2)
        room = 4 * (x.size(2) + 4) * u * (away + off).square()
    worse = torch.where(usable & good.unsqueeze(2), worse, torch.nan)
    return worse, room, torch.where(good.unsqueeze(2), value, torch.nan)


def check(given: Search, metric: str, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A search against all distances: what the op promises of the chosen code, and of how near it is."""
    x, codes, mask = (None if t is None else t.to(device) for t in given)
    indices, distance = ops.nearest_code(x, codes, metric=metric, mask=mask, backend=backend)  # type: ignore[arg-type]
    worse, room, value = excess(given, metric == "cosine")
    found, there = indices.cpu(), worse.isfinite().any(2)
    assert torch.equal(found >= 0, there), "a row was found that is none, or none where there is one"
    at = found.clamp(min=0).unsqueeze(2)
    chosen = torch.where(there, worse.gather(2, at).squeeze(2), 0.0)
    assert_within("excess", chosen, torch.zeros_like(chosen).numpy(), room.gather(2, at).squeeze(2).numpy())
    right = torch.where(there, value.gather(2, at).squeeze(2), torch.nan)
    u = unit(distance.dtype) + (given.x.size(2) + 4) * unit(torch.float64)  # its rounding, and a sum in float64
    budget = u * (right.nan_to_num().abs() if metric == "l2" else torch.ones_like(right))
    small = torch.finfo(distance.dtype).max
    right = torch.where(right > small, torch.inf, right)
    assert_within("distance", distance, right.numpy(), budget.numpy())
    return indices, distance


def triton_call(dtype: torch.dtype, dim: int, cosine: bool) -> Callable[[], None]:
    """A launch with a mask, on tensors that nobody reads: for those who only record it."""
    given = search("apart", 3, 2, 5, dim, dtype)._replace(mask=torch.ones(3, dtype=torch.bool))
    out = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, 2, dtype=given.codebook.dtype)
    return functools.partial(launcher("codebook", "triton").nearest, given, cosine, *out, None, None)


def binaries(quick: bool) -> Iterator[Binary]:
    """What `make aot` compiles."""
    every = itertools.product(DTYPES, (4, 20, 64), (False, True))
    for dtype, dim, cosine in ((torch.float32, 64, False), (torch.bfloat16, 4, False)) if quick else every:
        labels: dict[str, str | int] = {"dtype": str(dtype)[6:], "D": dim, "metric": "cosine" if cosine else "l2"}
        yield Binary(labels, launcher("codebook", "triton"), triton_call(dtype, dim, cosine))


def cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `make gpu` asks of Triton first: a name, and a call that raises where a result is wrong."""
    sizes = [(9, 2, 17, 5)] if device == "cpu" else [(1000, 1, 300, 64), (300, 4, 1000, 8), (257, 1, 77, 300)]
    for size, dtype, kind, metric in itertools.product(sizes, DTYPES, ("near", "spoilt"), ("l2", "cosine")):
        name = f"nearest_code {kind} {metric} {str(dtype)[6:]} {size}"
        yield name, functools.partial(check, search(kind, *size, dtype), metric, "triton", device)
