"""One suite for every backend of the lazy_adam room: numbers, rounding, rows, memory, errors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyseq import ops
from pyseq.ops import _lazy_adam
from pyseq.reference.lazy_adam import random_bits, rounded
from pyseq.testing import guarded, pairwise
from pyseq.testing.lazy_adam import DTYPES, SIZES, WAYS, Way, call, check, copied, tables

CASES = [(size, way) for i, size in enumerate(SIZES) for j, way in enumerate(WAYS) if (i + j) % 2 == 0 or i == 1]
HALF = [dtypes for dtypes in DTYPES if torch.bfloat16 in dtypes]


def shown(x: Any) -> str:
    if isinstance(x, tuple) and isinstance(x[0], torch.dtype):
        return "-".join(str(d)[6:] for d in x)
    size, way = x
    return "-".join(map(str, size)) + "-" + "".join(str(int(bool(flag))) for flag in way)


def serves(target: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if target.backend == "numba" and torch.bfloat16 in dtypes:
        pytest.skip("numba serves float32 and float64")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.levels
@pytest.mark.parametrize(("case", "dtypes"), pairwise(CASES, DTYPES, every=4), ids=shown)
def test_a_step(case: tuple[Any, Way], dtypes: tuple[torch.dtype, ...], target: Any) -> None:
    (rows, width, count), way = case
    target.spare(rows + count, 60)
    serves(target, dtypes)
    check(tables((rows, width, count), dtypes, way), way, target.backend, target.device)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("dtypes", HALF, ids=shown)
def test_bfloat16_is_rounded_as_by_the_reference(dtypes: tuple[torch.dtype, ...], target: Any) -> None:
    """Where float32 arithmetic gives the same bits, of which nearly all do, the hash gives the same rounding."""
    serves(target, dtypes)
    size = (7, 5, 9) if target.interpreted else (200, 33, 900)
    given = tables(size, dtypes, Way(decay=True))
    found, right = copied(given, target.device), copied(given)
    call(found, Way(decay=True), target.backend)
    call(right, Way(decay=True), "reference")
    for x, y in zip(found.params + found.exp_avg, right.params + right.exp_avg, strict=True):
        assert x.dtype == torch.float32 or (x.cpu() != y).float().mean() <= 0.002


def test_random_rounding() -> None:
    """Without bias, to one of both neighbours, exact numbers kept, and nothing finite made infinite."""
    bits = random_bits(3, 1, 0, torch.arange(40_000))
    assert bits.unique().numel() > 39_900
    x = torch.full((40_000,), 1.001)
    up = rounded(x, bits).float()
    assert set(up.unique().tolist()) == {1.0, 1.0078125}
    assert abs(float(up.double().mean()) - 1.001) < 1e-4
    special = torch.tensor([0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan, 3.3895e38, -3.4e38])
    for seed in range(20):
        found = rounded(special, random_bits(seed, 1, 0, torch.arange(8)))
        assert torch.equal(found[:5].float(), special[:5])
        assert found[5].isnan()
        assert found[6:].isfinite().all()
    few = torch.arange(9)
    for key in ((4, 1, 0, few), (3, 2, 0, few), (3, 1, 1, few), (3, 1, 0, few + (1 << 32))):
        assert (random_bits(*key) != bits[:9]).all()


def test_many_tables_in_one_call(target: Any) -> None:
    """Of one call each is as alone."""
    sizes = SIZES[:1] * 2 if target.interpreted else SIZES
    each = [tables(size, DTYPES[0], Way(decay=True), step=5 + i, seed=i) for i, size in enumerate(sizes)]
    alone = [copied(given, target.device) for given in each]
    for given in alone:
        call(given, Way(decay=True), target.backend)
    whole = [copied(given, target.device) for given in each]
    joined = [[x[i][0] for x in whole] for i in range(3)]
    grads = [
        torch.sparse_coo_tensor(
            x.indices[0].unsqueeze(0), x.values[0], x.params[0].shape, check_invariants=True, device=target.device
        )
        for x in whole
    ]
    ops.lazy_adam_update_(
        joined[0], grads, joined[1], joined[2], [x.steps[0] for x in whole], lr=0.01, last=[x.last[0] for x in whole],
        backend=target.backend,
    )  # fmt: skip
    for x, y in zip(whole, alone, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(x[:3], y[:3], strict=True))
        assert torch.equal(x.last[0], y.last[0])


@pytest.mark.levels
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_guard_bands(target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("has no launcher")
    for size, dtypes in itertools.product(SIZES[:1] if target.interpreted else SIZES, (DTYPES[0], DTYPES[3])):
        if target.backend != "numba" or torch.bfloat16 not in dtypes:
            given = tables(size, dtypes, Way(decay=True, row_bias=True, amsgrad=True))
            with guarded("lazy_adam", target.backend) as count:
                call(copied(given, target.device), Way(decay=True, row_bias=True, amsgrad=True), target.backend)
            assert next(count) == 1


def test_threads_and_runs_change_no_bit() -> None:
    given, before, found = tables((3000, 40, 9000), DTYPES[2], Way()), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(copied(given))
            call(found[-1], Way(), "cpp")
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x[0], y[0]) for x, y in zip(found[0][:3], other[:3], strict=True))


@pytest.mark.parametrize("backend", ["reference", "numba", "cpp"])
def test_a_row_out_of_range_changes_nothing(backend: Any) -> None:
    for row in (-1, 7):
        given = tables((7, 5, 9), DTYPES[0], Way())
        given.indices[0][4] = row
        found = copied(given)
        with pytest.raises(ValueError, match=rf"params\[0\] has rows 0 to 6, and a gradient for row {row}"):
            _lazy_adam.update(found, False, False, False, False, backend)
        assert all(torch.equal(x[0], y[0]) for x, y in zip(found[:3], given[:3], strict=True))


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_mutation_is_known_to_autograd_and_compile(backend: Any) -> None:
    given = tables((7, 5, 9), DTYPES[0], Way())
    versions = [x._version for x in (given.params[0], given.exp_avg[0])]
    call(given, Way(), backend)
    assert [x._version for x in (given.params[0], given.exp_avg[0])] == [v + 1 for v in versions]
    arguments = (*copied(given), False, False, False, False, True, backend)
    torch.library.opcheck(torch.ops.pyseq.lazy_adam_update_.default, arguments)


def sparse(rows: int = 4, width: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, width, dtype=dtype), (rows, width), check_invariants=True
    )


P = torch.zeros(4, 2)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grads": [[1.0]]}, TypeError, r"grads\[0\] must be a dense or a sparse COO tensor, got list"),
    ({"grads": [sparse(5)]}, ValueError, r"grads\[0\] must have the shape \(4, 2\) of params\[0\], got \(5, 2\)"),
    ({"grads": [P.to_sparse(2)]}, ValueError, r"grads\[0\] must have one sparse dimension, the rows, got 2"),
    ({"grads": []}, ValueError, "grads must be as many as params, got 0 and 1"),
    ({"grads": [sparse(), P]}, ValueError, r"all sparse or all dense; grads\[0\] and grads\[1\] differ"),
    ({"exp_avg": [P[:3]]}, ValueError, r"exp_avg\[0\] must have shape \(4, 2\) beside params\[0\], got \(3, 2\)"),
    ({"exp_avg": [P.double()]}, TypeError, r"exp_avg\[0\] must be of dtype torch.float32 or torch.bfloat16"),
    ({"exp_avg_sq": [P.bfloat16()]}, TypeError, r"exp_avg_sq\[0\] must be of dtype torch.float32, got torch.bfloat16"),
    ({"steps": []}, ValueError, "steps must be 1 tensors for 1 params, got 0"),
    ({"steps": [torch.tensor(1)]}, TypeError, r"steps\[0\] must be of dtype torch.float32, got torch.int64"),
    ({"last": [P[:, 0]]}, TypeError, r"last\[0\] must be of dtype torch.int32, got torch.float32"),
    ({"row_bias": True}, ValueError, "touches must be 1 tensors for 1 params, got 0"),
    ({"params": [P.half()], "grads": [sparse(dtype=torch.float16)]}, TypeError, r"params\[0\] must be of dtype"),
    ({"params": [P.bfloat16()], "grads": [sparse(dtype=torch.bfloat16)]}, ValueError, "seeds must be given"),
    ({"params": [torch.zeros(2, 4).t()]}, ValueError, "params and averages must be contiguous"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    changed, error, message = BAD[case]
    given: dict[str, Any] = {
        "params": [P.clone()], "grads": [sparse()], "exp_avg": [P.clone()], "exp_avg_sq": [P.clone()],
        "steps": [torch.ones(())], "lr": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.lazy_adam_update_(**given | changed)
