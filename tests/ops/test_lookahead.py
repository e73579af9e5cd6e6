"""One suite for every backend of the lookahead room: numbers, layouts, what is written, errors, compile."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyseq import ops
from pyseq.kernels import OK
from pyseq.kernels.lookahead import Pairs
from pyseq.ops._backend import launcher
from pyseq.testing import cpu_level, guarded, statuses
from pyseq.testing.lookahead import DTYPES, HALF, check, pairs

ALPHAS = (0.0, 0.3, 0.5, 0.8, 1.0)
Dtypes = tuple[torch.dtype, torch.dtype]
of_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: " ".join(str(x)[6:] for x in pair))
compiled_on_cpu = pytest.mark.parametrize("backend", ["numba", "cpp"])


def serves(target: Any, dtypes: Dtypes) -> None:
    if target.backend == "numba" and dtypes[0] in HALF:
        pytest.skip("numba serves float32 and float64")


def clones(given: Pairs, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    return tuple([x.clone().to(device) for x in each] for each in given)  # type: ignore[return-value]


@pytest.mark.levels
@of_dtypes
@pytest.mark.parametrize("alpha", ALPHAS)
def test_numbers(dtypes: Dtypes, alpha: float, target: Any) -> None:
    serves(target, dtypes)
    check(pairs(*dtypes), alpha, target.backend, target.device, target.interpreted)


@of_dtypes
def test_both_ends_are_exact(dtypes: Dtypes, target: Any) -> None:
    serves(target, dtypes)
    for alpha in (0.0, 1.0):
        given = pairs(*dtypes, seed=1)
        fast, slow = clones(given, target.device)
        ops.lookahead_update_(fast, slow, alpha, backend=target.backend)
        for x, y, a, b in zip(*given, fast, slow, strict=True):
            assert torch.equal(b.cpu(), y if alpha == 0 else x.to(y.dtype))
            if not (target.interpreted and x.dtype == torch.bfloat16):  # which cuts off, where it should round
                assert torch.equal(a, b.to(a.dtype))


def test_half_precision_rounds_as_torch_does() -> None:
    """Every number there is, to and fro; ties to even, subnormal, infinite and NaN."""
    for dtype in HALF:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        fast, slow = [every.clone()], [torch.zeros(2**16)]
        ops.lookahead_update_(fast, slow, 1.0, backend="cpp")
        finite = every.isfinite()  # the interpolation of an infinity is NaN
        assert torch.equal(slow[0][finite], every.float()[finite])
        between = torch.cat([every.float() * (1 + shift * 2.0**-12) for shift in (0, 1, 2, 3, 4, 7, 8, 9)])
        between = torch.cat([between, torch.tensor([65519.9, 65520.0, 1e30, -1e30, 2**-25, 1.5 * 2**-25, math.nan])])
        fast, slow = [torch.zeros(len(between)).to(dtype)], [between.clone()]
        ops.lookahead_update_(fast, slow, 0.0, backend="cpp")
        right = slow[0].to(dtype)
        assert torch.equal(fast[0].isnan(), right.isnan())
        assert torch.equal(fast[0][~right.isnan()], right[~right.isnan()])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, below Triton's interpreter
def test_infinity_and_nan_stay_in_their_element(target: Any) -> None:
    given = pairs(torch.float32, torch.float32, ((9,), (70,)))
    given.fast[0][4], given.slow[1][3] = math.inf, math.nan
    fast, slow = clones(given, target.device)
    ops.lookahead_update_(fast, slow, 0.5, backend=target.backend)
    assert [(~x.isfinite()).nonzero().flatten().tolist() for x in (*fast, *slow)] == [[4], [3]] * 2


def test_layouts(target: Any) -> None:
    """Dense ones of any order, gaps, overlaps of strides: the numbers of contiguous ones, and nothing beside them."""
    base = pairs(torch.float32, torch.float32, ((4, 6), (4, 6), (2, 3, 4, 5), (4, 6), (4, 6)))
    apart: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.t().contiguous().t(),
        lambda x: x.new_full((8, 6), math.nan)[::2].copy_(x),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.new_full((4, 12), math.nan)[:, 1::2].copy_(x),
        lambda x: x.clone(),
    ]
    fast, slow = ([f(x.to(target.device)) for f, x in zip(apart, each, strict=True)] for each in base)
    slow[4] = slow[4].t().contiguous().t()  # lies otherwise than fast
    strides = [x.stride() for x in (*fast, *slow)]
    right, other = clones(base, target.device)
    ops.lookahead_update_(right, other, 0.3, backend=target.backend)
    ops.lookahead_update_(fast, slow, 0.3, backend=target.backend)
    assert [x.stride() for x in (*fast, *slow)] == strides
    for x, y in zip((*fast, *slow), (*right, *other), strict=True):
        torch.testing.assert_close(x, y, rtol=2**-22, atol=0)
    assert fast[1]._base is not None
    assert fast[1]._base[1::2].isnan().all()


@pytest.mark.levels
def test_guard_bands(target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("has no launcher")
    for dtypes in DTYPES:
        if not (target.backend == "numba" and dtypes[0] in HALF):
            with guarded("lookahead", target.backend) as count:
                given = pairs(*dtypes, ((), (1,), (3, 5), (67,)))
                ops.lookahead_update_(*clones(given, target.device), 0.4, backend=target.backend)
            assert next(count) == 1


def test_one_launch_and_no_check_where_cpp_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyseq.ops import _lookahead

    monkeypatch.setattr(_lookahead, "check", lambda pairs: pytest.fail("the long way"))
    fast, slow = pairs(torch.bfloat16, torch.float32)
    with statuses("lookahead", "cpp") as found:
        ops.lookahead_update_(fast, slow, 0.5)
    assert found == [OK]


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
def test_triton_takes_one_launch_for_a_dtype_and_keeps_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = launcher("lookahead", "triton")
    grids: list[Any] = []

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    kernel = kernels.lookahead_kernel
    monkeypatch.setattr(kernels, "lookahead_kernel", Counting())
    given = clones(pairs(torch.float32, torch.float32)), clones(pairs(torch.bfloat16, torch.float32))
    fast, slow = (given[0][i] + given[1][i] for i in range(2))
    kernels._tables.clear()
    for _ in range(2):
        ops.lookahead_update_(fast, slow, 0.5, backend="triton")
    assert len(grids) == 4  # a launch for each of two dtypes, twice
    assert len(kernels._tables) == 2


@of_dtypes
def test_threads_and_instructions_change_no_bit(dtypes: Dtypes) -> None:
    given = pairs(*dtypes, ((70_001,), (3,), (150_000,), ()))
    before, found = torch.get_num_threads(), []
    try:
        for threads, level in ((1, 0), (2, 0), (3, 2)):
            torch.set_num_threads(threads)
            fast, slow = clones(given)
            with cpu_level(level):
                ops.lookahead_update_(fast, slow, 0.3, backend="cpp")
            found.append([*fast, *slow])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_host_synchronisation_on_a_gpu() -> None:
    """Nor where the table of addresses is made."""
    fast, slow = clones(pairs(torch.bfloat16, torch.float32, ((1000, 1001), (7,))), "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            ops.lookahead_update_(fast, slow, 0.5, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_written_parameters_are_known_to_autograd(target: Any) -> None:
    """Outside of autograd, and a graph that saved one raises."""
    weight = nn.Parameter(torch.full((3,), 4.0, device=target.device))
    loss, version = (weight * weight).sum(), weight._version
    ops.lookahead_update_([weight], [torch.zeros(3, device=target.device)], 0.5, backend=target.backend)
    assert weight.tolist() == [2.0] * 3
    assert weight.grad_fn is None
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled_on_cpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_and_opcheck(backend: Any) -> None:
    torch.compiler.reset()
    given = pairs(torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.pyseq.lookahead_update_.default, (*clones(given), 0.5, backend))
    compiled = torch.compile(ops.lookahead_update_, fullgraph=True, backend="aot_eager")
    found, right = clones(given), clones(given)
    compiled(*found, 0.3, backend=backend)
    ops.lookahead_update_(*right, 0.3, backend=backend)
    for got, wanted in zip(found, right, strict=True):
        assert all(map(torch.equal, got, wanted))
    torch.compiler.reset()


ONE = torch.ones(2)
BAD: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([ONE], [], 0.5, ValueError, "fast and slow must be equally many, got 1 and 0"),
    ([ONE], [torch.ones(3)], 0.5, ValueError, r"fast\[0\] and slow\[0\] must have one shape, got \(2,\) and \(3,\)"),
    ([torch.ones(2, 3)], [torch.ones(3, 2)], 0.5, ValueError, r"one shape, got \(2, 3\) and \(3, 2\)"),
    ([ONE, 3], [ONE.clone(), ONE.clone()], 0.5, TypeError, r"fast\[1\] must be a dense tensor, got int"),
    ([ONE.numpy()], [ONE], 0.5, TypeError, r"fast\[0\] must be a dense tensor, got ndarray"),
    ([ONE.to_sparse()], [ONE.to_sparse()], 0.5, TypeError, "got one of layout torch.sparse_coo"),
    ([ONE.long()], [ONE.long()], 0.5, TypeError, r"fast\[0\] must be of a float dtype, got torch.int64"),
    ([ONE + 0j], [ONE + 0j], 0.5, TypeError, r"must be of a float dtype, got torch.complex64"),
    ([ONE.double()], [ONE], 0.5, TypeError, r"slow\[0\] must be of dtype torch.float64 beside fast\[0\], got"),
    ([ONE.half()], [ONE.bfloat16()], 0.5, TypeError, "must be of dtype torch.float16 or torch.float32"),
    ([ONE, ONE.to("meta")], [ONE.clone(), ONE.to("meta")], 0.5, ValueError, "must be on one device, got .* cpu, meta"),
    ([ONE], [ONE.clone()], 1.5, ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
    ([ONE], [ONE.clone()], math.nan, ValueError, r"alpha must lie in \[0, 1\], got nan"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "numba", "cpp"])
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int, backend: Any) -> None:
    """Whoever serves, with these words, and nothing is written."""
    fast, slow, alpha, error, message = BAD[case]
    if backend == "numba" and case in (9,):
        pytest.skip("numba says first that it does not serve half precision")
    with pytest.raises(error, match=message):
        ops.lookahead_update_(fast, slow, alpha, backend=backend)
    assert ONE.tolist() == [1, 1]


def test_nothing_to_do() -> None:
    ops.lookahead_update_([], [], 0.5)
    ops.lookahead_update_(iter([torch.ones(0)]), iter([torch.ones(0)]), 0.5)
