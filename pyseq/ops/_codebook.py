"""Raw ops of the codebook room, how they are launched, and the quantiser's gradient."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.codebook import BAD_INDEX, Chosen, Pull, Search
from pyseq.ops._autograd import refuse_upstream
from pyseq.ops._backend import Backends, Name, settings
from pyseq.ops._check import wide
from pyseq.ops._library import Raw, needs_grad
from pyseq.reference import codebook as reference
from pyseq.reference.codebook import length_of, terms, unit

ORDER: dict[str, tuple[Name, ...]] = {"cpu": ("cpp", "numba"), "cuda": ("triton",)}
SEARCH = Backends("codebook", Search, ORDER)
STATISTICS = Backends("codebook", Chosen, ORDER)
PULL = Backends("codebook", Pull, ORDER)


class SearchOptions(NamedTuple):
    cosine: bool
    backend: str


class StatisticsOptions(NamedTuple):
    codes: int
    check: bool
    backend: str


class QuantizeOptions(NamedTuple):
    cosine: bool
    rotation: bool
    beta: float
    gamma: float
    reduction: str
    sums: bool  # whether to sum the rows of each code; else their output is empty
    backend: str


class PullOptions(NamedTuple):
    rotation: bool
    backend: str


def nearest(search: Search, cosine: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Indices and distance (N, H)."""
    with torch.no_grad():
        search = Search(*(x if x is None else x.detach() for x in search))
        direct, _, chosen = SEARCH.way(backend, search)
        options = SearchOptions(cosine, chosen)
        return _nearest_kernel(search, options) if chosen == "reference" else _nearest(search, options, direct)


def statistics(chosen: Chosen, codes: int, backend: str) -> tuple[Tensor, Tensor]:
    """Counts (H, K) and sums (H, K, D)."""
    with torch.no_grad():
        chosen = Chosen(*(x.detach() for x in chosen))
        direct, check, name = STATISTICS.way(backend, chosen)
        options = StatisticsOptions(codes, check, name)
        return _statistics_kernel(chosen, options) if name == "reference" else _statistics(chosen, options, direct)


def quantize(search: Search, options: QuantizeOptions) -> tuple[Tensor, ...]:
    """Codes (N, H, D), indices (N, H), loss, counts (H, K), sums (H, K, D), and for cosines the codes of length one."""
    direct, _, chosen = SEARCH.way(options.backend, search)
    options = options._replace(backend=chosen)
    if chosen == "reference":
        return _quantize_by_reference(search, options)
    if not (torch.is_grad_enabled() and needs_grad(search)):
        search = Search(*(x if x is None else x.detach() for x in search))
    return _quantize(search, options, direct)  # type: ignore[no-any-return]


def _nearest_fake(search: Search, options: SearchOptions) -> tuple[Tensor, Tensor]:
    shape = search.x.shape[:2]
    return search.x.new_empty(shape, dtype=torch.int64), search.x.new_empty(shape, dtype=wide(search.x))


def _nearest_kernel(search: Search, options: SearchOptions) -> tuple[Tensor, Tensor]:
    if options.backend == "reference":
        indices, distance = reference.nearest_code(search.x, search.codebook, search.mask, options.cosine)
        return indices, distance.to(wide(search.x))
    indices, distance = _nearest_fake(search, options)
    _nearest.launch("nearest", search, options.backend, options.cosine, indices, distance, None, None)
    return indices, distance


def _statistics_fake(chosen: Chosen, options: StatisticsOptions) -> tuple[Tensor, Tensor]:
    _, heads, dim = chosen.x.shape
    counts = chosen.indices.new_empty(heads, options.codes)
    return counts, chosen.x.new_empty(heads, options.codes, dim, dtype=wide(chosen.x))


def _statistics_kernel(chosen: Chosen, options: StatisticsOptions) -> tuple[Tensor, Tensor]:
    by_kernel = options.backend in ("cpp", "numba")  # which look at the indices themselves
    if settings.check or (options.check and not by_kernel):
        raise_bad_indices(chosen.indices, options.codes)
    if options.backend == "reference":
        counts, sums = reference.code_statistics(chosen.x, chosen.indices, options.codes)
        return counts, sums.to(wide(chosen.x))
    counts, sums = _statistics_fake(chosen, options)
    if _statistics.launch("statistics", chosen, options.backend, counts, sums) == BAD_INDEX and options.check:
        raise_bad_indices(chosen.indices, options.codes)
    return counts, sums


def raise_bad_indices(indices: Tensor, codes: int) -> None:
    bad = (indices < -1) | (indices >= codes)
    if bad.any():
        raise ValueError(f"indices must be -1, or from 0 to {codes - 1}, got {int(indices[bad][0])}")


def _compared(search: Search, cosine: bool) -> Search:
    """What a quantiser compares: sums' dtype, and for cosines of length one."""
    x, codebook, mask = search
    return Search(unit(x.to(wide(x))), unit(codebook), mask) if cosine else search


def _quantize_fake(search: Search, options: QuantizeOptions) -> tuple[Tensor, ...]:
    (n, heads, dim), codes = search.x.shape, search.codebook.size(1)
    sums = search.codebook.new_empty((heads, codes, dim) if options.sums else (0,))
    counts = search.x.new_empty(heads, codes, dtype=torch.int64)
    indices = search.x.new_empty(n, heads, dtype=torch.int64)
    quantized = torch.empty_like(search.x, memory_format=torch.contiguous_format)
    compared = search.codebook.new_empty(search.codebook.shape if options.cosine else (0,))
    return quantized, indices, sums.new_empty(()), counts, sums, compared


def _quantize_kernel(search: Search, options: QuantizeOptions) -> tuple[Tensor, ...]:
    if options.backend == "reference":
        return _quantize_by_reference(search, options)
    given = _compared(search, options.cosine)
    _, indices, _, counts, sums, compared = _quantize_fake(given, options)
    distance = sums.new_empty(indices.shape)
    quantized, total = sums.new_empty(given.x.shape), sums.new_empty(1, dtype=torch.float64)
    outputs = indices, distance, quantized, total
    _quantize.launch("nearest", given, options.backend, options.cosine, *outputs)
    chosen = Chosen(given.x, indices)
    _quantize.launch("statistics", chosen, options.backend, counts, sums if options.sums else None)
    loss = (options.beta + options.gamma) * total / terms(counts, search.x.size(2), options.reduction)
    compared = given.codebook if options.cosine else compared
    return quantized.to(search.x.dtype), indices, loss.reshape(()).to(sums.dtype), counts, sums, compared


def _quantize_by_reference(search: Search, options: QuantizeOptions) -> tuple[Tensor, ...]:
    x, codebook, mask = search
    indices, _ = reference.nearest_code(x.detach(), codebook.detach(), mask, options.cosine)
    quantized, loss, counts, sums = reference.look_up(x.to(wide(x)), codebook, indices, *options[:5])
    sums = sums.to(codebook.dtype) if options.sums else codebook.new_empty(0)
    compared = unit(codebook.detach()) if options.cosine else codebook.new_empty(0)
    return quantized.to(x.dtype), indices, loss.to(codebook.dtype), counts, sums, compared


def _quantize_gradient(
    search: Search, options: QuantizeOptions, outputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    up, _, up_loss, *_ = upstream
    indices, _, counts, sums, compared = outputs
    refuse_upstream(upstream)
    if up is None and up_loss is None:
        return None, None, None
    if torch.is_grad_enabled():
        return _differentiable_gradient(search, options, indices, up, up_loss)
    given = search
    if options.cosine:  # codes as an output: a compiler would take them from a buffer that has moved since
        given = Search(unit(search.x.to(wide(search.x))), compared)
    zero = given.codebook.new_zeros(())
    weight = (zero if up_loss is None else up_loss) * 2 / terms(counts, search.x.size(2), options.reduction)
    scale = (options.gamma * weight).to(given.codebook.dtype).view(1)
    pull = Pull(given.x, given.codebook, indices, scale, up)
    of_x = _pull(pull, PullOptions(options.rotation, options.backend))
    if options.cosine:
        of_x = torch.where((indices >= 0).unsqueeze(2), _through_unit(search.x.to(of_x.dtype), given.x, of_x), 0.0)
    of_codes = None
    if up_loss is not None and search.codebook.requires_grad:
        of_codes = torch.zeros_like(given.codebook)
        if options.beta:
            if not options.sums:
                _, sums = _statistics(
                    Chosen(given.x, indices), StatisticsOptions(counts.size(1), False, options.backend)
                )
            apart = (options.beta * weight).to(sums.dtype) * (counts.unsqueeze(2) * given.codebook - sums)
            apart = _through_unit(search.codebook, given.codebook, apart) if options.cosine else apart
            of_codes = torch.where(counts.unsqueeze(2) > 0, apart, of_codes)  # a code may be no number
    return of_x.to(search.x.dtype), of_codes, None


def _through_unit(x: Tensor, direction: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of x where that of x / |x| is upstream."""
    length = length_of(x)
    across = upstream - direction * (direction * upstream).sum(-1, keepdim=True)
    return torch.where(length == 0, 0.0, across / torch.where(length == 0, 1.0, length))


def _differentiable_gradient(
    search: Search, options: QuantizeOptions, indices: Tensor, up: Tensor | None, up_loss: Tensor | None
) -> Sequence[Tensor | None]:
    """By autograd, for the codes that were chosen, so that it has derivatives too."""
    x, codebook, _ = search
    quantized, loss, *_ = reference.look_up(x.to(wide(x)), codebook, indices, *options[:5])
    pairs = [(out, g.to(out.dtype)) for out, g in ((quantized, up), (loss, up_loss)) if g is not None]
    pairs = [(out, g) for out, g in pairs if out.requires_grad]
    wanted = [t for t in (x, codebook) if t.requires_grad]
    if not pairs:
        return None, None, None
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return *(next(found) if t.requires_grad else None for t in (x, codebook)), None


def _pull_fake(pull: Pull, options: PullOptions) -> Tensor:
    return torch.empty_like(pull.x, dtype=pull.scale.dtype, memory_format=torch.contiguous_format)


def _pull_kernel(pull: Pull, options: PullOptions) -> Tensor:
    out = _pull_fake(pull, options)
    _pull.launch("gradient", pull, options.backend, options.rotation, out)
    return out


_nearest = Raw("nearest_code", Search, SearchOptions, _nearest_kernel, _nearest_fake, SEARCH, returns=2)
_statistics = Raw(
    "code_statistics", Chosen, StatisticsOptions, _statistics_kernel, _statistics_fake, STATISTICS, returns=2
)
_quantize = Raw(
    "quantize",
    Search,
    QuantizeOptions,
    _quantize_kernel,
    _quantize_fake,
    SEARCH,
    returns=6,
    gradient=_quantize_gradient,
)
_pull = Raw("quantize_gradient", Pull, PullOptions, _pull_kernel, _pull_fake, PULL)
