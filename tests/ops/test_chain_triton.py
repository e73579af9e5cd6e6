"""What the conformance suite cannot see of the Triton kernels: paths, blocks, scratch memory and binaries."""

import importlib
import itertools
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

from pyseq.kernels.common import NLL, PARTITION, SCORE
from pyseq.testing import Guarded, assert_within
from pyseq.testing.chain import NEG_INF, Chain, chain, exact

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
kernels: Any = importlib.import_module("pyseq.kernels.chain.triton")
_triton: Any = importlib.import_module("pyseq.kernels.chain._triton")

FAST, WIDE, LOG = kernels.FAST, kernels.WIDE, kernels.LOG
NAMES = ("emissions", "transitions", "start", "end")
DTYPES = ("float32", "bfloat16")
TARGETS = ("sm_90", "gfx942")
ROOT = Path(__file__).parents[2]


def launch(
    problem: Chain, kind: int, grads: bool = True, own: Any = torch.clone
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Value, gradients and paths of a launcher called by itself; own: makes each output."""
    chosen = [x for x in vars(problem).values()]
    if kind == PARTITION:
        chosen[4] = None
    emissions, wide = problem.emissions, problem.transitions.dtype
    num_tags = emissions.size(2)
    empty = [(*emissions.shape,), (num_tags, num_tags), (num_tags,), (num_tags,)]
    value, *out = (own(torch.full(shape, math.nan, dtype=wide)) for shape in [(len(emissions),), *empty])
    paths = own(torch.full((len(emissions),), -1, dtype=torch.int32))
    status = kernels.crf(*chosen, None, kind, "none", False, value, out if grads else None, paths=paths)
    assert status == 0
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
    "regains 50 nats three times": (one([[0, -100]] + [[0, 50]] * 3, [[0, -300], [-300, 0]]), WIDE, LOG),
    "regains 1000 nats": (one([[0, -1000], [0, 1000], [0, 0]], [[0, -3000], [-3000, 0]]), LOG, LOG),
    "forced hops of -30": (left_to_right(-30.0), WIDE, LOG),
    "forced hops of -300": (left_to_right(-300.0), LOG, LOG),
    "unreachable tag with +100": (one([[1, 100]] * 6, [[0, NEG_INF], [0, 0]], [0, NEG_INF]), FAST, FAST),
    "beta of an unreachable tag grows": (one([[5, 100]] * 30, [[0, NEG_INF], [0, 0]], [0, NEG_INF]), FAST, FAST),
    "sentinel among transitions": (one([[4, 5], [5, 4], [4, 4]], [[0, -1e4], [0, 0]]), FAST, FAST),
    "sentinel among emissions": (one([[9, -1e4], [9, 3], [8, 8]], FLAT), LOG, LOG),
    "scores of thousands": (one([[2900, -5500], [7000, 20], [1, 2]], [[300, -200], [100, 900]]), LOG, LOG),
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
    "every path worth little": (one([[-0.7, -0.7]] * 20, FLAT), WIDE, WIDE),
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
    """Neighbours do not share a fate, and a NaN stays in its sequence."""
    problem = chain(4, 5, 3, seed=3).replace(tags=torch.zeros(4, 5, dtype=torch.int64), start=None, end=None)
    problem.emissions[1] = problem.emissions[1].log_softmax(-1)
    problem.transitions[:] = 0
    problem.emissions[2, 1, 0] = -3000
    first, paths = check(problem, NLL)
    assert first == paths == [FAST, WIDE, LOG, FAST]
    before, grads, _ = launch(problem, NLL)
    problem.emissions[2, 3, 1] = math.nan
    after, spoilt, _ = launch(problem, NLL)
    keep = [0, 1, 3]
    assert torch.equal(before[keep], after[keep])
    assert torch.equal(grads[0][keep], spoilt[0][keep])
    assert after[2].isnan()
    assert spoilt[0][2].isnan().all()


def test_bio_constraints_stay_fast() -> None:
    """B-x, I-x for four types and O: an I needs its own B or I before it."""
    num_tags = 9
    allowed = torch.ones(num_tags, num_tags, dtype=torch.bool)
    for inside in range(2, num_tags, 2):
        allowed[:, inside] = False
        allowed[inside - 1, inside] = allowed[inside, inside] = True
    problem = chain(3, 6, num_tags, seed=1)
    start = problem.start.index_fill(0, torch.arange(2, num_tags, 2), NEG_INF)  # type: ignore[union-attr]
    problem = problem.replace(transitions=problem.transitions.masked_fill(~allowed, NEG_INF), start=start)
    assert check(problem) == ([FAST] * 3, [FAST] * 3)
    assert check(problem, NLL)[1] == [FAST] * 3


def test_law_at_every_scale() -> None:
    """Random chains from tiny to huge: the law holds whatever the certificate says, and every path is taken."""
    taken: set[int] = set()
    for seed, scale in enumerate((0.01, 0.3, 3.0, 30.0, 100.0, 1000.0)):
        problem = chain(2, 6, (2, 5)[seed % 2], live=("all", "holes")[seed % 2], scale=scale, seed=seed)
        first, paths = check(problem)
        assert all(a <= b for a, b in zip(first, paths, strict=True))
        taken |= set(first)
    assert taken == {FAST, WIDE, LOG}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forbid", [False, True])
def test_streamed_edges(dtype: torch.dtype, forbid: bool, narrow: None) -> None:
    problem = chain(2, 5, 9, dtype, live="holes", seed=5)
    if forbid:
        gone = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
        problem = problem.replace(transitions=problem.transitions.masked_fill(gone, NEG_INF))
    check(problem, NLL)
    truth = exact(problem, np.float64)
    scores, path = torch.full((2,), math.nan, dtype=dtype), torch.full((2, 5), 7)
    rest = (problem.start, problem.end, None, problem.mask, None, False)
    kernels.viterbi(problem.emissions, problem.transitions, *rest, scores, path)
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
    problem = chain(3, 21, 19, live="holes", seed=9)
    problem.emissions[1, :, 3] = -3000
    assert check(problem, NLL) == ([FAST, LOG, FAST], [FAST, LOG, FAST])


@pytest.mark.parametrize("num_tags", [2, 9, 33])
@pytest.mark.parametrize("live", ["holes", "lengths"])
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
    rest = (problem.start, problem.end, None, problem.mask, problem.lengths, False)
    kernels.viterbi(problem.emissions, problem.transitions, *rest, scores, path)
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


def aot(*args: str) -> "subprocess.CompletedProcess[str]":
    """Triton's decorator reads TRITON_INTERPRET when a module is imported, hence another process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), "--quick", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_binaries() -> None:
    done = aot()
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    served = {
        "crf_fwd": DTYPES,
        "crf_bwd": DTYPES,
        "viterbi_fwd": DTYPES,
        "chain_edges": DTYPES[:1],
        "crf_counts": DTYPES[:1],
    }
    wanted = {
        (f"{kernel}_kernel", dtype, num_tags, target)
        for kernel, dtypes in served.items()
        for dtype, num_tags, target in itertools.product(dtypes, ("9", "128"), TARGETS)
    }
    assert {(r[0], r[2], r[3], r[4]) for r in rows} == wanted


def test_binaries_over_the_limits_are_found() -> None:
    done = aot("--sizes", "128", "--targets", "sm_90", "--dtypes", "float32", "--kernel", "crf_bwd", "--num-warps", "2")
    assert done.returncode == 1
    assert "spills" in done.stderr


def test_no_recompilation() -> None:
    code = """
import sys; sys.path.insert(0, "tests")
import aot, torch
from pyseq.testing.aot import recompiled_by
for num_tags in (9, 128):
    first = aot.launches(torch.float32, num_tags, aot.NLL, 1, 1)
    for batch, time in ((2, 16), (16, 33), (5, 1024)):
        for a, b in zip(first, aot.launches(torch.float32, num_tags, aot.NLL, batch, time), strict=True):
            assert not recompiled_by(a, b), (a.kernel, recompiled_by(a, b))
assert recompiled_by(*[aot.launches(torch.float32, n, aot.NLL)[1] for n in (9, 10)]) == ["K"]
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
