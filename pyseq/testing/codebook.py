"""Rows and codebooks to search, and whether what was found is near enough."""

import functools
import itertools
import resource
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyseq import explain, ops
from pyseq.kernels.codebook import Chosen, Pull, Search
from pyseq.ops._backend import launcher
from pyseq.testing import assert_within, unit
from pyseq.testing.aot import Binary

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("apart", "near", "offset", "grid", "spoilt", "huge")
SIZES = ((1, 1, 1, 1), (3, 1, 1, 7), (0, 1, 3, 2), (5, 1, 4, 0), (13, 2, 65, 3), (97, 1, 33, 17), (200, 1, 130, 64))
CASES = [(kind, size) for i, size in enumerate(SIZES) for kind in ("apart", "near", "holes")[i % 2 :: 2]]
WORDS: list[Any] = [{"metric": m, "estimator": e} for m in ("l2", "cosine") for e in ("straight_through", "rotation")]


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
    numbers, with many ties; huge: scores beyond float32; holes: NaN and infinities, and a mask; spoilt: large numbers
    too."""
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
    if kind in ("holes", "spoilt"):
        mask = torch.rand(n, generator=generator) < 0.8
        x[torch.rand(n, heads, generator=generator) < 0.1] *= torch.nan
        x[torch.rand(n, heads, dim, generator=generator) < 0.02] = torch.inf
        codes[torch.rand(heads, count, generator=generator) < 0.2] *= torch.nan
        codes[torch.rand(heads, count, dim, generator=generator) < 0.02] = -torch.inf
        if kind == "spoilt" and dtype != torch.float16:
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


def near_enough(given: Search, metric: str, indices: Tensor) -> Tensor:
    """Whether indices (N, H) are what a search promises; the values of all codes, as `excess` has them."""
    worse, room, value = excess(given, metric == "cosine")
    found, there = indices.cpu(), worse.isfinite().any(2)
    assert torch.equal(found >= 0, there), "a row was found that is none, or none where there is one"
    at = found.clamp(min=0).unsqueeze(2)
    chosen = torch.where(there, worse.gather(2, at).squeeze(2), 0.0)
    assert_within("excess", chosen, torch.zeros_like(chosen).numpy(), room.gather(2, at).squeeze(2).numpy())
    return value


def check(given: Search, metric: str, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A search against all distances: what the op promises of the chosen code, and of how near it is."""
    x, codes, mask = (None if t is None else t.to(device) for t in given)
    indices, distance = ops.nearest_code(x, codes, metric=metric, mask=mask, backend=backend)  # type: ignore[arg-type]
    value = near_enough(given, metric, indices)
    found = indices.cpu()
    there, at = found >= 0, found.clamp(min=0).unsqueeze(2)
    right = torch.where(there, value.gather(2, at).squeeze(2), torch.nan)
    u = unit(distance.dtype) + (given.x.size(2) + 4) * unit(torch.float64)  # its rounding, and a sum in float64
    budget = u * (right.nan_to_num().abs() if metric == "l2" else torch.ones_like(right))
    small = torch.finfo(distance.dtype).max
    right = torch.where(right > small, torch.inf, right)
    assert_within("distance", distance, right.numpy(), budget.numpy())
    return indices, distance


def chosen(n: int, heads: int, count: int, dim: int, dtype: torch.dtype = torch.float32, only: int = -1) -> Chosen:
    """Rows with a code each, or none, on the CPU; only: the code that all have."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    indices = torch.randint(-1, count, (n, heads), generator=generator)
    return Chosen(x, indices if only < 0 else torch.full_like(indices, only))


def one_hot(indices: Tensor, count: int) -> Tensor:
    """(N, H, K) float64."""
    return (indices.cpu().unsqueeze(2) == torch.arange(count)).double()


def check_statistics(given: Chosen, count: int, backend: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Counts exactly; sums within the rounding of float64 additions and one of their own."""
    x, indices = (t.to(device) for t in given)
    counts, sums = ops.code_statistics(x, indices, count, heads=True, backend=backend)  # type: ignore[arg-type]
    hot, rows = one_hot(given.indices, count), given.x.double()
    assert torch.equal(counts.cpu(), hot.sum(0).long())
    assert sums.dtype == torch.promote_types(x.dtype, torch.float32)
    right, size = (torch.einsum("nhk,nhd->hkd", hot, t) for t in (rows, rows.abs()))
    budget = unit(sums.dtype) * right.abs() + 2 * len(rows) * unit(torch.float64) * size
    assert_within("sums", sums, right.numpy(), budget.numpy())
    return counts, sums


class Quantized(NamedTuple):
    """What the quantiser's loss, statistics and gradients are in float64, and how far each gradient may be off."""

    loss: Tensor
    counts: Tensor  # (H, K)
    perplexity: Tensor
    of_x: Tensor  # (N, H, D)
    of_codes: Tensor  # (H, K, D)
    loss_budget: Tensor
    of_x_budget: Tensor
    of_codes_budget: Tensor


def directed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of length one, or zero, and the lengths, 1 for 0."""
    length = x.norm(dim=-1, keepdim=True)
    length = torch.where(length > 0, length, 1.0)
    return x / length, length


def quantized(
    given: Search,
    indices: Tensor,
    upstream: Tensor,
    weight: float,
    metric: str = "l2",
    estimator: str = "straight_through",
    beta: float = 1.0,
    gamma: float = 0.25,
    loss_reduction: str = "mean",
) -> Quantized:
    """By formulas, with the rotation as a matrix; indices (N, H) as they were chosen. upstream: the gradient of codes;
    weight: of the loss."""
    indices, real = indices.cpu(), indices.cpu().unsqueeze(2) >= 0
    hot = one_hot(indices, given.codebook.size(1))
    finite = given.codebook.isfinite().all(2, keepdim=True)
    x = torch.where(real, given.x.double(), 0.0)
    codes = torch.where(finite, given.codebook.double(), 0.0)
    g = torch.where(real, upstream.double(), 0.0)
    (x, long), (codes, code_long) = (directed(t) if metric == "cosine" else (t, torch.ones(1)) for t in (x, codes))
    q = torch.einsum("nhk,hkd->nhd", hot, codes)
    counts, rows = hot.sum(0), max(float(hot.sum()), 1.0)
    terms = {"mean": rows * max(x.size(2), 1), "vector": rows, "sum": 1.0}[loss_reduction]
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    logs = torch.where(share > 0, share.log(), 0.0)
    apart = x - q
    of_x, size = g, g.norm(dim=2, keepdim=True)
    if estimator == "rotation":
        (e, x_long), (c, q_long) = directed(x), directed(q)
        both = (e + c).norm(dim=2, keepdim=True)
        turns = (both > 1e-3) & e.any(2, keepdim=True) & c.any(2, keepdim=True)
        s = (e + c) / torch.where(turns, both, 1.0)
        turn = torch.eye(x.size(2)).double() - 2 * s.unsqueeze(3) * s.unsqueeze(2) + 2 * c.unsqueeze(3) * e.unsqueeze(2)
        ratio = torch.where(turns, q_long / x_long, 1.0)
        of_x = torch.where(turns, ratio * torch.einsum("nhji,nhj->nhi", turn, g), g)
        size = size * ratio * torch.where(turns, 1 + 4 / both**2, 1.0)
    pull = 2 * weight / terms
    of_x = of_x + gamma * pull * apart
    of_codes = -beta * pull * torch.einsum("nhk,nhd->hkd", hot, apart)
    reach = x.norm(dim=2, keepdim=True) + q.norm(dim=2, keepdim=True)
    size = size + gamma * pull * reach
    code_size = beta * pull * torch.einsum("nhk,nhd->hkd", hot, reach)
    loss = apart.square().sum()
    u, own = unit(given.codebook.dtype), unit(given.x.dtype)
    loss_budget = 32 * u * loss
    if metric == "cosine":
        of_x = (of_x - x * (x * of_x).sum(2, keepdim=True)) / long * (x.norm(dim=2, keepdim=True) > 0)
        of_codes = (of_codes - codes * (codes * of_codes).sum(2, keepdim=True)) / code_long
        of_codes = of_codes * (codes.norm(dim=2, keepdim=True) > 0)
        size, code_size = size / long, code_size / code_long
        loss_budget = loss_budget + 4 * (x.size(2) + 8) * u * (apart.norm(dim=2) * 2 + u).sum()
    u = u * (8 + (x.size(2) if metric == "cosine" or estimator == "rotation" else 0))
    return Quantized(
        (beta + gamma) / terms * loss,
        counts.long(),
        (-share * logs).sum(1).exp().mean(),
        of_x,
        of_codes,
        (beta + gamma) / terms * loss_budget,
        own * of_x.abs() + 2 * u * size,
        2 * u * code_size,
    )


def check_quantize(given: Search, backend: str, device: str = "cpu", weight: float = 0.7, **options: Any) -> Tensor:
    """Codes, loss, statistics and gradients of a step against float64; returns the indices."""
    x, codes = (t.to(device).detach().requires_grad_() for t in given[:2])
    mask = None if given.mask is None else given.mask.to(device)
    out = ops.quantize(x, codes, mask=mask, backend=backend, **options)  # type: ignore[arg-type]
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype).to(device)
    grads = torch.autograd.grad([out.quantized, out.loss], [x, codes], [up, out.loss.new_tensor(weight)])
    for leaf, grad in zip((x, codes), grads, strict=True):
        assert (grad.dtype, grad.shape, grad.device) == (leaf.dtype, leaf.shape, leaf.device)
    cosine = options.get("metric") == "cosine"
    near_enough(given, options.get("metric", "l2"), out.indices)
    found = out.indices.cpu()
    heads = torch.arange(codes.size(0))
    book = codes.detach().cpu()
    book = book / torch.where((length := book.norm(dim=2, keepdim=True)) > 0, length, 1.0) if cosine else book
    code = torch.where(found.unsqueeze(2) >= 0, book[heads, found.clamp(min=0)].to(x.dtype), 0.0)
    if cosine:  # whose division may round otherwise, on another device
        assert_within("code", out.quantized, code.double().numpy(), 8 * unit(x.dtype) * code.double().abs().numpy())
    else:
        assert torch.equal(out.quantized.cpu(), code), "other bits than the code's"
    right = quantized(given, found, up.cpu(), weight, **options)
    assert torch.equal(out.counts.cpu(), right.counts)
    assert out.loss.dtype == out.perplexity.dtype == codes.dtype
    assert_within("loss", out.loss, right.loss.numpy(), right.loss_budget.numpy())
    assert_within("perplexity", out.perplexity, right.perplexity.numpy(), 4 * unit(codes.dtype) * codes.size(1))
    assert_within("gradient of x", grads[0], right.of_x.numpy(), right.of_x_budget.numpy())
    of_codes = grads[1] if not cosine else torch.where(codes.isfinite().all(2, keepdim=True), grads[1], 0.0)
    assert_within("gradient of codes", of_codes, right.of_codes.numpy(), right.of_codes_budget.numpy())
    return out.indices


def leaves(n: int, count: int, dim: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """Rows (N, D) near codes (K, D) that are far from one another, so that no small step changes the choice."""
    given = search("apart", n, 1, count, dim, dtype, seed=n)
    codes = 4 * given.codebook[0].to(dtype)
    x = codes[torch.arange(n) % count] + 0.3 * given.x[:, 0]
    return [t.to(device).requires_grad_() for t in (x, codes)]


def total(out: Any) -> Tensor:
    """A number from what `ops.quantize` returns, whose gradient differs from element to element."""
    weights = torch.arange(1.0, 1 + out.quantized.numel(), dtype=out.quantized.dtype, device=out.quantized.device)
    return (out.quantized * weights.view(out.quantized.shape).sin()).sum() + 0.7 * out.loss  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A layer and a quantiser; of x (..., 4) a number to learn from."""

    def __init__(self, **words: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.codes = (nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (4, 5))
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        return total(ops.quantize(x @ self.weight, self.codes, **self.words))

    def step(self, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """The number and its gradients, by what stands for the module."""
        loss = (run or self.forward)(x)
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters()))]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As one graph, with nothing left of graphs before."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def raw_calls(backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Raw ops of the quantiser, each with arguments."""
    raw, (x, codes, _) = torch.ops.pyseq, search("apart", 4, 2, 3, 5)
    indices, mask = torch.tensor([[0, 1], [-1, 2], [2, 2], [1, 0]]), torch.tensor([True, True, False, True])
    yield raw.code_statistics.default, (x, indices, 3, False, backend)
    yield raw.quantize_gradient.default, (x, codes, indices, torch.ones(1), x, True, backend)
    given = x.requires_grad_(), codes.requires_grad_(), mask
    for words in (True, True, 1.0, 0.25, "mean", True), (False, False, 1.0, 0.0, "sum", False):
        yield raw.quantize.default, (*given, *words, backend)


def growth_of_a_step(backends: Iterable[Any], n: int, count: int, dim: int) -> int:
    """By how many bytes the process grows at most in forward and backward, after small ones."""
    before = 0
    for rows in (64, n):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for backend, words in itertools.product(backends, (WORDS[0], WORDS[3])):
            given = [torch.randn(size, dim, requires_grad=True) for size in (rows, count)]
            out = ops.quantize(*given, backend=backend, **words)
            (out.quantized.sum() + out.loss).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def triton_calls(dtype: torch.dtype, dim: int) -> Iterator[tuple[dict[str, str | int], Callable[[], object]]]:
    """Launches on tensors that nobody reads, for those who only record them, and what tells them apart."""
    module = launcher("codebook", "triton")
    given = search("apart", 3, 2, 5, dim, dtype)._replace(mask=torch.ones(3, dtype=torch.bool))
    indices, like = torch.zeros(3, 2, dtype=torch.int64), given.codebook
    distance, rows = like.new_empty(3, 2), like.new_empty(3, 2, dim)
    total = torch.empty(1, dtype=torch.float64)
    for metric in ("l2", "cosine"):
        call = functools.partial(module.nearest, given, metric == "cosine", indices, distance)
        yield {"op": "nearest_code", "metric": metric}, functools.partial(call, None, None)
        if metric == "l2" or dtype == like.dtype:  # what has length one is as sums are
            yield {"op": "quantize", "metric": metric}, functools.partial(call, rows, total)
    counts, sums = indices.new_empty(2, 5), torch.empty_like(like)
    yield {"op": "code_statistics"}, functools.partial(module.statistics, Chosen(given.x, indices), counts, sums)
    for x, metric in ((given.x, "l2"), (rows, "cosine")):
        for name, upstream in (("none", None), ("straight_through", rows.to(dtype)), ("rotation", rows.to(dtype))):
            pull = Pull(x, like, indices, like.new_empty(1), upstream)
            call = functools.partial(module.gradient, pull, name == "rotation", rows)
            yield {"op": "quantize_gradient", "metric": metric, "estimator": name}, call


def binaries(quick: bool) -> Iterator[Binary]:
    """What `make aot` compiles."""
    every = itertools.product(DTYPES, (4, 20, 64))
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 4)) if quick else every:
        for words, call in triton_calls(dtype, dim):
            labels: dict[str, str | int] = {"op": "", "dtype": str(dtype)[6:], "D": dim, "metric": "", "estimator": ""}
            yield Binary(labels | words, launcher("codebook", "triton"), call)


def cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `make gpu` asks of Triton first: a name, and a call that raises where a result is wrong."""
    sizes = [(9, 2, 17, 5)] if device == "cpu" else [(1000, 1, 300, 64), (300, 4, 1000, 8), (257, 1, 77, 300)]
    for size, dtype, kind, metric in itertools.product(sizes, DTYPES, ("near", "spoilt"), ("l2", "cosine")):
        name = f"nearest_code {kind} {metric} {str(dtype)[6:]} {size}"
        yield name, functools.partial(check, search(kind, *size, dtype), metric, "triton", device)
    for size, dtype, only in itertools.product(sizes, DTYPES, (-1, 2)):
        name = f"code_statistics {'any code' if only < 0 else 'one code'} {str(dtype)[6:]} {size}"
        yield name, functools.partial(check_statistics, chosen(*size, dtype, only), size[2], "triton", device)
    for size, dtype, words in itertools.product(sizes, DTYPES, WORDS):
        name = f"quantize {' '.join(words.values())} {str(dtype)[6:]} {size}"
        yield name, functools.partial(check_quantize, search("holes", *size, dtype), "triton", device, **words)
