"""What the conformance suite cannot see of the Triton kernels: paths, blocks, scratch memory and binaries."""

import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyseq import ops
from pyseq.kernels.chain import NLL, PARTITION, SCORE, Gradients, Sampling
from pyseq.testing import Guarded, script
from pyseq.testing.chain import NEG_INF, Chain, Known, chain, recorded_paths

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
kernels: Any = importlib.import_module("pyseq.kernels.chain.triton")
_triton: Any = importlib.import_module("pyseq.kernels.chain._triton")

FAST, WIDE, LOG = kernels.FAST, kernels.WIDE, kernels.LOG


def check(problem: Chain, kind: int = NLL) -> list[int]:
    """Values, gradients and the best path against the oracle; the branch that each sequence took."""
    known = Known(problem)
    with recorded_paths("triton") as paths:
        known.check(problem, "triton", (kind,), ("each",))
    _, path = problem(ops.viterbi, "triton")
    assert path.tolist() == known.truth.path.tolist()
    assert all(torch.equal(other, paths[0]) for other in paths)
    return paths[0].tolist()


def test_every_path_in_one_batch() -> None:
    """Neighbours do not share a fate. In float64 the exp domain keeps what float32 loses."""
    problem = chain(4, 4, 3, seed=3).replace(tags=torch.zeros(4, 4, dtype=torch.int64), start=None, end=None)
    problem.emissions[1] = problem.emissions[1].log_softmax(-1)
    problem.transitions[:] = 0
    problem.emissions[2, 1, 0] = -3000
    problem.emissions[3, :, 0] -= 80
    assert check(problem) == [FAST, WIDE, LOG, WIDE]
    assert check(problem.replace(emissions=problem.emissions[3:], tags=problem.tags[3:]).double()) == [FAST]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Edges streamed in narrow tiles, as where they do not fit in registers; states then go through scratch memory."""
    whole, scratch, rows = kernels.config, kernels._scratch, []

    def poisoned(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        out: Tensor = scratch(like, *shape, dtype=dtype)
        if dtype == torch.float64 and len(shape) == 2 and shape[0] == len(like):
            rows.append(out.fill_(math.nan))
        return out

    small = {"KEEP": False, "KEEP_WIDE": False, "BI": 4, "BW": 2, "BL": 2}
    monkeypatch.setattr(kernels, "config", lambda *sizes: whole(*sizes)._replace(**small))
    monkeypatch.setattr(kernels, "_scratch", poisoned)
    yield
    assert rows
    assert all(row.isfinite().any() for row in rows)


@pytest.mark.parametrize(("dtype", "forbid"), [(torch.float32, True), (torch.float64, False)])
def test_streamed_edges(dtype: torch.dtype, forbid: bool, narrow: None) -> None:
    problem = chain(2, 5, 9, dtype, live="holes", seed=5)
    if forbid:
        gone = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
        problem = problem.replace(transitions=problem.transitions.masked_fill(gone, NEG_INF))
    check(problem)


def test_streamed_slow_paths(narrow: None) -> None:
    problem = chain(2, 4, 9, seed=6).replace(start=None, end=None)
    problem.transitions[:] = 0
    problem.emissions[0] = problem.emissions[0].log_softmax(-1)
    problem.emissions[1] *= 500
    assert check(problem, PARTITION) == [WIDE, LOG]


def test_shares_of_the_transition_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks of steps than slots, several tiles, a slow sequence between fast ones."""
    monkeypatch.setattr(kernels, "PARTS", 12)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "SCAN", 16)
    whole = kernels.config
    monkeypatch.setattr(kernels, "config", lambda *sizes: whole(*sizes)._replace(tile=16))
    problem = chain(3, 17, 17, live="holes", seed=9)
    problem.emissions[1, :, 3] = -3000
    assert check(problem) == [FAST, LOG, FAST]


@pytest.mark.parametrize(("K", "live"), [(33, "holes"), (9, "lengths")])
def test_guard_bands(K: int, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory and outputs lie between bands; tags and lengths are out of range."""
    guard = Guarded()
    scratch = kernels._scratch
    monkeypatch.setattr(kernels, "_scratch", lambda *a, **k: guard(scratch(*a, **k).zero_()))
    problem = chain(3, 4, K, live=live, seed=K)
    problem.emissions[1] *= 500  # one sequence through the log domain
    wild = {"tags": torch.tensor([[-100, 10**12, K, -1]]).expand(3, 4).contiguous()}
    if problem.lengths is not None:
        wild["lengths"] = torch.tensor([-5, 10**12, 3])
    problem = problem.replace(**wild).map(guard)
    for kind in (PARTITION, NLL, SCORE):
        value, *grads = (guard(torch.zeros(shape)) for shape in ((3,), problem.emissions.shape, (K, K), (K,), (K,)))
        kernels.crf(problem.inputs(kind != PARTITION), kind, "none", False, value, Gradients(*grads))
        bad = [kind != PARTITION] * 3 if problem.lengths is None else [True, True, kind != PARTITION]
        assert value.isnan().tolist() == bad
        guard.check()
    kernels.entropy(problem.inputs(), False, value, Gradients(*grads))
    assert value.isnan().tolist() == [problem.lengths is not None] * 2 + [False]
    guard.check()
    scores, path = guard(torch.zeros(3)), guard(torch.zeros(3, 4, dtype=torch.int64))
    kernels.viterbi(problem.inputs(), False, scores, path)
    guard.check()
    paths, given = guard(torch.zeros(3, 5, 4, dtype=torch.int64)), problem.inputs()
    kernels.sample(Sampling(*given[:4], given.mask, given.lengths, torch.tensor([9])), False, paths)
    guard.check()
    drawn = problem.live() if problem.lengths is None else torch.tensor([[False], [False], [True]]) & problem.live()
    assert torch.equal(paths >= 0, drawn.unsqueeze(1).expand_as(paths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_is_exp(dtype: torch.dtype) -> None:
    import triton.language as tl

    @triton.jit
    def split_kernel(p_x, p_p, p_n, N: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.arange(0, N)
        b_p, b_n = _triton.split(tl.load(p_x + o))
        tl.store(p_p + o, b_p)
        tl.store(p_n + o, b_n)

    x = torch.cat([torch.linspace(-8192, 8192, 2045, dtype=dtype), torch.tensor([0.0, -0.0, 1e-30], dtype=dtype)])
    x[7] = NEG_INF
    p, n = torch.empty_like(x), torch.empty(2048, dtype=torch.int32)
    split_kernel[(1,)](x, p, n, N=2048)
    assert p[7] == 0
    p[7], n[7], x[7] = 1, 0, 0
    assert ((p > 0.7) & (p < 1.5)).all()
    right = np.exp(x.numpy().astype(np.longdouble))
    got = np.ldexp(p.numpy().astype(np.longdouble), n.numpy())
    assert float(abs(got / right - 1).max()) < 2.5 * torch.finfo(dtype).eps / 2 + (
        5e-17 if dtype == torch.float64 else 0
    )


# Triton's decorator reads TRITON_INTERPRET when a module is imported, hence another process
AOT = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import aot"


def test_binaries() -> None:
    out = script(f"{AOT}; aot.main(['chain', '--quick', '--targets', 'sm_90'])")
    rows = [dict(word.split("=") for word in line.split()[1:]) for line in out.splitlines()]
    paths = ("entropy_fwd", "entropy_bwd", "entropy_counts", "path_filter", "path_draw")
    kernels = ("chain_edges", "crf_fwd", "crf_bwd", "crf_counts", "viterbi_fwd", *paths)
    assert [(row["kernel"], row["K"], row["dtype"]) for row in rows] == [
        *((f"{kernel}_kernel", *case) for case in (("9", "bfloat16"), ("128", "float32")) for kernel in kernels),
        ("local_steps_kernel", "9", "bfloat16"),
        ("local_steps_kernel", "5000", "float32"),
    ]


def test_spills_and_recompilation_are_found() -> None:
    script(
        AOT
        + """
import torch
from pyseq.kernels.chain import NLL, triton as kernels
from pyseq.testing.aot import record, recompiled_by
from pyseq.testing.chain import triton_call

only = ["kernel=crf_bwd_kernel", "dtype=float32"]
try:
    aot.main(["chain", "--quick", "--targets", "sm_90", "--num-warps", "2", "--only", *only])
except SystemExit as error:
    assert "spills" in str(error), error
else:
    raise AssertionError("nothing was over the limits")
for tags in (9, 128):
    first = record(kernels, triton_call(NLL, torch.float32, tags, 1, 1))
    for batch, time in ((2, 16), (16, 33), (5, 1024)):
        for a, b in zip(first, record(kernels, triton_call(NLL, torch.float32, tags, batch, time)), strict=True):
            assert not recompiled_by(a, b), (a.kernel, recompiled_by(a, b))
forward = [record(kernels, triton_call(NLL, torch.float32, tags))[1] for tags in (9, 10)]
assert recompiled_by(*forward) == ["K"]
"""
    )
