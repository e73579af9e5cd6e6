"""What the conformance suite cannot see of the Triton kernels: paths, blocks, scratch memory and binaries."""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels.chain import NLL, PARTITION, SCORE, Gradients
from pyseq.testing import Guarded, assert_within
from pyseq.testing.chain import NEG_INF, Chain, chain, exact

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
kernels: Any = importlib.import_module("pyseq.kernels.chain.triton")
_triton: Any = importlib.import_module("pyseq.kernels.chain._triton")

FAST, WIDE, LOG = kernels.FAST, kernels.WIDE, kernels.LOG
NAMES = ("emissions", "transitions", "start", "end")
ROOT = Path(__file__).parents[2]


def launch(
    problem: Chain, kind: int, grads: bool = True, own: Any = torch.clone
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Value, gradients and paths of a launcher called by itself; own: makes each output."""
    emissions, wide = problem.emissions, problem.transitions.dtype
    num_tags = emissions.size(2)
    empty = [(*emissions.shape,), (num_tags, num_tags), (num_tags,), (num_tags,)]
    value, *out = (own(torch.full(shape, math.nan, dtype=wide)) for shape in [(len(emissions),), *empty])
    paths = own(torch.full((len(emissions),), -1, dtype=torch.int32))
    inputs, wanted = problem.inputs(kind != PARTITION), Gradients(*out) if grads else None
    assert kernels.crf(inputs, kind, "none", False, value, wanted, paths=paths) == OK
    return value, out, paths.tolist()


def check(problem: Chain, kind: int = PARTITION) -> tuple[list[int], list[int]]:
    """Value and gradients against the oracle; the paths without and with gradients."""
    truth = exact(problem)
    value, grads, paths = launch(problem, kind)
    alone, _, first = launch(problem, kind, grads=False)
    assert torch.equal(value, alone)
    size = truth.size_z + (truth.size_score if kind == NLL else 0)
    finite = np.nan_to_num(truth.value(kind), posinf=0, neginf=0)
    u = torch.finfo(value.dtype).eps / 2
    assert_within("value", value, truth.value(kind), 8 * u * size + u * abs(finite))
    steps = int(problem.live().sum(1).max())
    right, sizes = truth.gradients(kind, np.ones(len(value)))
    room = u * (2 * steps * (problem.emissions.size(2) + 8) + 8)
    for name, grad, exactly, largest in zip(NAMES, grads, right, sizes, strict=True):
        assert_within(name, grad, exactly, room * largest)
    return first, paths


def one(emissions: Any, transitions: Any, start: Any = None, end: Any = None) -> Chain:
    def tensor(x: Any) -> Tensor | None:
        return None if x is None else torch.as_tensor(x, dtype=torch.float32)

    scores, pairs = torch.as_tensor(emissions, dtype=torch.float32).unsqueeze(0), torch.as_tensor(transitions).float()
    return Chain(scores, pairs, tensor(start), tensor(end), torch.zeros(scores.shape[:2], dtype=torch.int64))


def left_to_right(hop: float) -> Chain:
    steps = torch.full((6, 6), NEG_INF).fill_diagonal_(0.0)
    steps[range(5), range(1, 6)] = hop
    edge = torch.full((2, 6), NEG_INF)
    edge[0, 0] = edge[1, 5] = 0
    return one(torch.zeros(8, 6), steps, edge[0], edge[1])


FLAT = [[0.0, 0.0], [0.0, 0.0]]
HOSTILE = {
    # problem, path of the value, path once gradients are wanted
    "only legal state 100 nats down": (one([[0, -100], [0, 0], [NEG_INF, 0]], [[0, NEG_INF], [NEG_INF, 0]]), WIDE, LOG),
    "regains 25 nats four times": (one([[0, -95]] + [[0, 25]] * 4, [[0, -300], [-300, 0]]), WIDE, LOG),
    "regains 1000 nats": (one([[0, -1000], [0, 1000], [0, 0]], [[0, -3000], [-3000, 0]]), LOG, LOG),
    "forced hops of -30": (left_to_right(-30.0), WIDE, LOG),
    "forced hops of -300": (left_to_right(-300.0), LOG, LOG),
    "unreachable tag with +100": (one([[1, 100]] * 6, [[0, NEG_INF], [0, 0]], [0, NEG_INF]), FAST, FAST),
    "beta of an unreachable tag grows": (one([[5, 100]] * 9, [[0, NEG_INF], [0, 0]], [0, NEG_INF]), FAST, FAST),
    "sentinel among transitions": (one([[4, 5], [5, 4], [4, 4]], [[0, -1e4], [0, 0]]), FAST, FAST),
    "sentinel among emissions": (one([[9, -1e4], [9, 3], [8, 8]], FLAT), LOG, LOG),
    "the one edge into a tag far below its column": (
        one([[0, NEG_INF], [200, 295]], [[0, -300], [-300, 0]]),
        WIDE,
        LOG,
    ),
    "emission beyond the exp domain": (one([[9000, 0], [0, 0]], FLAT), LOG, LOG),
    "transition beyond the exp domain": (one([[0, 0], [0, 0]], [[9000, 9000], [0, 0]]), LOG, LOG),
    "start beyond the exp domain": (one([[0, 0], [0, 0]], FLAT, [9000, 0]), LOG, LOG),
    "end beyond the exp domain": (one([[0, 0], [0, 0]], FLAT, None, [9000, 0]), LOG, LOG),
    "columns beyond the exp domain": (one([[0, 0], [0, 0]], [[-9000, -9000], [-9000, -9001]]), LOG, LOG),
    "every path worth little": (one([[-0.7, -0.7]] * 8, FLAT), WIDE, WIDE),
    "no feasible path": (one([[0, 0], [NEG_INF, NEG_INF], [0, 0]], FLAT), FAST, FAST),
    "backward loses what forward keeps": (
        one([[0, -55], [0, 0], [NEG_INF, 0]], [[0, NEG_INF], [NEG_INF, 0]]),
        FAST,
        LOG,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    problem, alone, with_gradients = HOSTILE[name]
    assert check(problem) == ([alone], [with_gradients])


def test_deep_states_in_float64() -> None:
    """Two states 150 nats down become the only legal ones: their odds must survive, in the exp domain."""
    emissions = [[0, -150, -151.5], [0, 0, 0], [NEG_INF, 0, 0]]
    steps = torch.full((3, 3), NEG_INF).fill_diagonal_(0.0)
    problem = one(emissions, steps)
    assert check(problem) == ([WIDE], [LOG])
    assert check(problem.double()) == ([FAST], [FAST])


def test_every_path_in_one_batch() -> None:
    """Neighbours do not share a fate."""
    problem = chain(4, 5, 3, seed=3).replace(tags=torch.zeros(4, 5, dtype=torch.int64), start=None, end=None)
    problem.emissions[1] = problem.emissions[1].log_softmax(-1)
    problem.transitions[:] = 0
    problem.emissions[2, 1, 0] = -3000
    first, paths = check(problem, NLL)
    assert first == paths == [FAST, WIDE, LOG, FAST]


def test_bio_constraints_stay_fast() -> None:
    """B-x, I-x for four types and O: an I needs its own B or I before it."""
    num_tags = 9
    allowed = torch.ones(num_tags, num_tags, dtype=torch.bool)
    for inside in range(2, num_tags, 2):
        allowed[:, inside] = False
        allowed[inside - 1, inside] = allowed[inside, inside] = True
    problem = chain(2, 4, num_tags, seed=1)
    start = problem.start.index_fill(0, torch.arange(2, num_tags, 2), NEG_INF)  # type: ignore[union-attr]
    problem = problem.replace(transitions=problem.transitions.masked_fill(~allowed, NEG_INF), start=start)
    assert check(problem) == ([FAST] * 2, [FAST] * 2)


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
    check(problem, NLL)
    truth = exact(problem, np.float64)
    scores, path = torch.full((2,), math.nan, dtype=dtype), torch.full((2, 5), 7)
    kernels.viterbi(problem.inputs(), False, scores, path)
    assert path.tolist() == truth.path.tolist()
    assert scores.tolist() == torch.as_tensor(truth.best).to(dtype).tolist()


def test_streamed_slow_paths(narrow: None) -> None:
    problem = chain(2, 4, 9, seed=6).replace(start=None, end=None)
    problem.transitions[:] = 0
    problem.emissions[0] = problem.emissions[0].log_softmax(-1)
    problem.emissions[1] *= 500
    assert check(problem) == ([WIDE, LOG], [WIDE, LOG])


def test_shares_of_the_transition_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks of steps than slots, several tiles, a slow sequence between fast ones."""
    monkeypatch.setattr(kernels, "PARTS", 12)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "SCAN", 16)
    whole = kernels.config
    monkeypatch.setattr(kernels, "config", lambda *sizes: whole(*sizes)._replace(tile=16))
    problem = chain(3, 18, 19, live="holes", seed=9)
    problem.emissions[1, :, 3] = -3000
    assert check(problem, NLL) == ([FAST, LOG, FAST], [FAST, LOG, FAST])


@pytest.mark.parametrize(("num_tags", "live"), [(33, "holes"), (9, "lengths")])
def test_guard_bands(num_tags: int, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory and outputs lie between bands; tags and lengths are out of range."""
    guard = Guarded()
    scratch = kernels._scratch
    monkeypatch.setattr(kernels, "_scratch", lambda *a, **k: guard(scratch(*a, **k).zero_()))
    problem = chain(3, 4, num_tags, live=live, seed=num_tags)
    problem.emissions[1] *= 500  # one sequence through the log domain
    wild = {"tags": torch.tensor([[-100, 10**12, num_tags, -1]]).expand(3, 4).contiguous()}
    if problem.lengths is not None:
        wild["lengths"] = torch.tensor([-5, 10**12, 3])
    for kind in (PARTITION, NLL, SCORE):
        value, _, _ = launch(problem.replace(**wild).map(guard), kind, own=guard)
        bad = [kind != PARTITION] * 3 if problem.lengths is None else [True, True, kind != PARTITION]
        assert value.isnan().tolist() == bad
        guard.check()
    scores, path = guard(torch.zeros(3)), guard(torch.zeros(3, 4, dtype=torch.int64))
    kernels.viterbi(problem.inputs(), False, scores, path)
    guard.check()


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


def without_interpreter(*command: str) -> "subprocess.CompletedProcess[str]":
    """Triton's decorator reads TRITON_INTERPRET when a module is imported, hence another process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_binaries() -> None:
    done = without_interpreter("tests/aot.py", "chain", "--quick", "--targets", "sm_90")
    assert done.returncode == 0, done.stderr
    rows = [dict(word.split("=") for word in line.split()[1:]) for line in done.stdout.splitlines()]
    kernels = ("chain_edges", "crf_fwd", "crf_bwd", "crf_counts", "viterbi_fwd")
    assert [(row["kernel"], row["K"], row["dtype"]) for row in rows] == [
        (f"{kernel}_kernel", *case) for case in (("9", "bfloat16"), ("128", "float32")) for kernel in kernels
    ]


def test_spills_and_recompilation_are_found() -> None:
    code = """
import sys; sys.path.insert(0, "tests")
import aot, torch
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
    done = without_interpreter("-c", code)
    assert done.returncode == 0, done.stderr
