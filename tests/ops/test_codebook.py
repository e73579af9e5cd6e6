"""One suite for every backend of the codebook room: exactness, ties, what is not finite, layouts, memory, errors."""

from typing import Any

import pytest
import torch

from pyseq import ops
from pyseq.testing import guarded, pairwise, script
from pyseq.testing.codebook import DTYPES, KINDS, check, search

SIZES = (
    (1, 1, 1, 1), (3, 1, 1, 7), (0, 1, 3, 2), (5, 1, 4, 0), (13, 2, 65, 3), (97, 1, 33, 17), (200, 1, 130, 64),
    (7, 3, 64, 8), (25, 1, 31, 130),
)  # fmt: skip
CASES = [
    (*size, kind) for i, size in enumerate(SIZES) for j, kind in enumerate(KINDS) if (i + j) % 2 == 0 or size[0] == 13
]


def shown(x: Any) -> str:
    return str(x)[6:] if isinstance(x, torch.dtype) else "-".join(map(str, x)) if isinstance(x, tuple) else str(x)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # NumPy's, below Triton's interpreter
@pytest.mark.levels
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("case", "dtype"), pairwise(CASES, DTYPES), ids=shown)
def test_the_chosen_code_is_near_enough(case: tuple[Any, ...], dtype: torch.dtype, metric: str, target: Any) -> None:
    n, heads, count, dim, kind = case
    target.spare(n * heads * count * dim, 3000)
    check(search(kind, n, heads, count, dim, dtype, seed=n), metric, target.backend, target.device)


@pytest.mark.levels
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equal_codes_give_the_lowest_index(metric: Any, target: Any) -> None:
    """Bit for bit equal ones, at any place of a panel; also where a zero row makes all cosines equal."""
    n, count = (6, 37) if target.interpreted else (101, 150)
    given = search("apart", n, 1, count, 5)
    codes = given.codebook.repeat(1, 3, 1).to(target.device)
    rows = given.x.clone().to(target.device)
    rows[1] = 0
    indices, _ = ops.nearest_code(rows, codes, metric=metric, backend=target.backend)
    assert (indices < count).all()
    assert metric == "l2" or indices[1] == 0
    alone = [ops.nearest_code(row, codes, metric=metric, backend=target.backend)[0] for row in rows[:9]]
    assert torch.equal(torch.stack(alone), indices[:9])  # whatever rows are beside


def test_a_common_offset_costs_no_digits(target: Any) -> None:
    size = (9, 1, 20, 8) if target.interpreted else (100, 1, 200, 16)
    given = search("near", *size, torch.float64)
    moved = (given.x + 4096).float().double() - 4096  # what float32 holds there
    codes = (given.codebook + 4096).float().double() - 4096
    far = ops.nearest_code(
        (moved + 4096).float().to(target.device), (codes + 4096).float().to(target.device), backend=target.backend
    )
    near = ops.nearest_code(moved, codes, backend="reference")
    distance = (moved - codes[:, far[0].cpu().view(-1)].transpose(0, 1)).square().sum(2)
    torch.testing.assert_close(distance, near[1], rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # NumPy's, below Triton's interpreter
def test_scores_beyond_the_format_are_searched_in_float64(target: Any) -> None:
    """Where all codes are as large, and where a row is large beside them."""
    given = search("huge", 9, 1, 20, 6)
    check(given, "l2", target.backend, target.device)
    check(given._replace(x=given.x * 1e-20), "l2", target.backend, target.device)
    check(given._replace(x=given.x * 1e18, codebook=given.codebook * 1e-15), "l2", target.backend, target.device)


def test_shapes_and_masks(target: Any) -> None:
    """Any leading dimensions; heads before the elements; a mask over what is looked up."""
    x, codes = torch.randn(2, 3, 4, 5).to(target.device), torch.randn(4, 6, 5).to(target.device)
    mask = torch.tensor([[True, False, True], [True, True, False]]).to(target.device)
    indices, distance = ops.nearest_code(x, codes, mask=mask, backend=target.backend)
    assert indices.shape == distance.shape == (2, 3, 4)
    assert torch.equal((indices >= 0).all(2), mask)
    assert torch.equal(distance.isnan().all(2), ~mask)
    for h in range(4):
        one, far = ops.nearest_code(x[:, :, h], codes[h], mask=mask, backend=target.backend)
        assert torch.equal(one, indices[..., h])
        assert torch.equal(far[mask], distance[..., h][mask])
    single, _ = ops.nearest_code(x[0, 0, 0], codes[0], backend=target.backend)
    assert single.shape == ()
    twisted = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.nearest_code(twisted, codes, mask=mask, backend=target.backend)[0], indices)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_that_are_not_finite_touch_nothing_else(target: Any) -> None:
    n = 5 if target.interpreted else 50
    given = search("apart", n, 1, 20, 6)
    x, codes = given.x.to(target.device), given.codebook.to(target.device)
    right = ops.nearest_code(x, codes, backend=target.backend)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[2, 0, 3] = bad
        indices, distance = ops.nearest_code(spoilt, codes, backend=target.backend)
        others = torch.arange(n) != 2
        assert indices[2] == -1
        assert distance[2].isnan()
        assert torch.equal(indices[others], right[0][others])
        assert torch.equal(distance[others], right[1][others])
    indices, distance = ops.nearest_code(x, codes * torch.nan, backend=target.backend)
    assert (indices == -1).all()
    assert distance.isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.levels
def test_guard_bands(target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("has no launcher")
    for size in [(3, 2, 5, 3)] if target.interpreted else [(3, 2, 5, 3), (97, 1, 70, 17), (13, 3, 33, 1)]:
        for dtype in (torch.float32, torch.float64):
            with guarded("codebook", target.backend) as count:
                check(search("spoilt", *size, dtype), "l2", target.backend, target.device)
            assert next(count) == 1


def test_threads_and_runs_change_no_bit() -> None:
    given, before, found = search("near", 3000, 2, 300, 24), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(ops.nearest_code(given.x, given.codebook, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_memory_law(backend: str) -> None:
    """Far below N x K scores, 256 MB here: at most four times the arguments."""
    grown = script(
        f"""
import resource, torch
from pyseq import ops
x, codes = torch.zeros(16384, 16), torch.randn(4096, 16)
ops.nearest_code(x[:64], codes, backend={backend!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.nearest_code(x, codes, backend={backend!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    )
    assert int(grown) * 1024 < 4 * 4 * (16384 + 4096 * 16) + (2 << 20)


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_compile_export_and_opcheck(backend: Any) -> None:
    torch.compiler.reset()
    given = search("apart", 6, 2, 5, 3)
    torch.library.opcheck(torch.ops.pyseq.nearest_code.default, (*given, False, backend))
    compiled = torch.compile(ops.nearest_code, fullgraph=True, backend="aot_eager")
    for metric in ("l2", "cosine"):
        found = compiled(given.x.requires_grad_(), given.codebook, metric=metric, backend=backend)
        right = ops.nearest_code(given.x, given.codebook, metric=metric, backend=backend)  # type: ignore[arg-type]
        assert all(map(torch.equal, found, right))
        assert not any(t.requires_grad for t in (*found, *right))
    torch.compiler.reset()


X, C = torch.ones(3, 4), torch.ones(5, 4)
BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([1.0], C, {}, TypeError, "x must be a tensor, got list"),
    (X, None, {}, TypeError, "codebook must be a tensor, got NoneType"),
    (X, C[0], {}, ValueError, r"codebook must have shape \(codes, width\) or \(heads, codes, width\), got \(4,\)"),
    (X, C[:, :3], {}, ValueError, r"x must have shape \(..., 3\) beside a codebook of \(5, 3\), got \(3, 4\)"),
    (X, C.expand(2, 5, 4), {}, ValueError, r"x must have shape \(..., 2, 4\) beside a codebook of \(2, 5, 4\)"),
    (X, C[:0], {}, ValueError, "codebook must not be empty along codes"),
    (X.long(), C, {}, TypeError, r"x must be of dtype .*, got torch\.int64"),
    (X, C.long(), {}, TypeError, r"codebook must be of dtype .*, got torch\.int64"),
    (X, C.double(), {}, TypeError, r"codebook is torch\.float64 but x is torch\.float32"),
    (X, C.to("meta"), {}, ValueError, "codebook is on meta but x is on cpu"),
    (X, C, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have the shape \(3,\) of"),
    (X, C, {"mask": torch.ones(3)}, TypeError, r"mask must be of dtype torch\.bool, got torch\.float32"),
    (X, C, {"metric": "l1"}, ValueError, "metric must be 'l2' or 'cosine', got 'l1'"),
    (X, C, {"backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    x, codes, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.nearest_code(x, codes, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [(65536, 1, 1024, 64), (16384, 1, 16384, 8), (4096, 4, 1000, 200)])
def test_large_searches_on_a_gpu(size: tuple[int, int, int, int]) -> None:
    given = search("apart", *size)
    x, codes = given.x.cuda(), given.codebook.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices, distance = ops.nearest_code(x, codes, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right, far = ops.nearest_code(given.x, given.codebook)
    torch.testing.assert_close(distance.cpu(), far, rtol=1e-5, atol=1e-6)
    assert (indices.cpu() != right).float().mean() < 1e-3  # near ties
