"""One suite for every backend of the chain room: numbers, masks, constraints, layouts, determinism.

Hostile scores are in test_chain_hostile.py, what is not a number in test_chain_contract.py.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyseq import ops
from pyseq.kernels.chain import PARTITION
from pyseq.testing import assert_within, guarded, pairwise, unit
from pyseq.testing.chain import (
    KINDS,
    LIVE,
    NEG_INF,
    Chain,
    Known,
    brute_force,
    chain,
    exact,
    kinds,
    mixed,
    recorded_paths,
    run,
)

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INF = math.inf


def shown(x: Any) -> str:
    return str(x)[6:] if isinstance(x, torch.dtype) else "-".join(map(str, x)) if isinstance(x, tuple) else str(x)


@functools.cache
def known_chain(*args: Any, **kwargs: Any) -> Known:
    return Known(chain(*args, **kwargs))


SHAPES = (
    (0, 2, 3), (3, 0, 2), (1, 1, 1), (3, 7, 1), (1, 2, 2), (3, 5, 3), (17, 7, 9), (33, 4, 16), (9, 6, 17), (5, 3, 33),
    (17, 3, 63), (3, 9, 64), (4, 5, 129),
)  # fmt: skip
CASES = [
    (*shape, live) for i, (shape, live) in enumerate(itertools.product(SHAPES, LIVE)) if i % 3 == 0 or shape[0] == 17
]
EDGES = ((17, 7, 9), (9, 6, 17), (5, 3, 33), (4, 5, 129))  # ragged groups and tiles of every layout


def at_edges(params: dict[str, Any]) -> bool:
    return params["case"][:3] in EDGES and params["case"][3] in ("holes", "lengths", "all", "left")


@pytest.mark.levels(where=at_edges)
@pytest.mark.parametrize(("case", "dtype"), pairwise(CASES, DTYPES), ids=shown)
def test_values_and_gradients(case: tuple[int, int, int, str], dtype: torch.dtype, target: Any) -> None:
    batch, time, tags, live = case
    target.spare(batch * time, 6 if dtype == torch.float32 else 2)
    known = known_chain(batch, time, tags, dtype, live, boundaries=(batch + len(live)) % 2 == 0)
    known.check(known.problem.to(target.device), target.backend, kinds(target))


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("forbid", [0.0, 0.3])
def test_brute_force(live: str, forbid: float, target: Any) -> None:
    """Every path, one by one: log Z, marginals, pairs, score and Viterbi. Whole numbers make many ties."""
    target.spare(6 if live == "holes" else 17)
    problem = chain(3, 4, 3, torch.float64, live, seed=len(live))
    problem = problem.map(lambda x: x.mul(1.5).round() if x.is_floating_point() else x)
    gone = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(1)) < forbid
    problem = problem.replace(emissions=problem.emissions.masked_fill(gone, NEG_INF))
    if forbid:
        problem = problem.replace(transitions=problem.transitions.clone().fill_diagonal_(NEG_INF))
    truth = brute_force(problem)
    for here in (problem, problem.single()):
        u = 16 * unit(here.transitions.dtype)
        placed = here.to(target.device).leaves()
        log_z = placed(ops.crf_log_partition, target.backend)
        assert_within("log_z", log_z, truth.log_z, u * 20)
        assert_within("score", placed(ops.crf_score, target.backend), truth.score, u * 20)
        pairs, first, last = torch.autograd.grad(log_z.sum(), placed.scores()[1:])
        assert_within("pairs", pairs, truth.expected[1].sum(0), u * 20)
        assert_within("first", first, truth.expected[2].sum(0), u * 20)
        assert_within("last", last, truth.expected[3].sum(0), u * 20)
        assert_within("marginals", placed(ops.crf_marginals, target.backend), truth.expected[0], u * 20)
        score, path = placed(ops.viterbi, target.backend)
        assert_within("best", score, truth.best, 0)
        assert path.tolist() == truth.path.tolist()


@pytest.mark.levels(where=at_edges)
@pytest.mark.parametrize(("case", "dtype"), pairwise([c for c in CASES if c[2] < 64 and c[0] != 33], DTYPES), ids=shown)
def test_viterbi(case: tuple[int, int, int, str], dtype: torch.dtype, target: Any) -> None:
    batch, time, tags, live = case
    target.spare(batch * time, 6 if dtype == torch.float32 else 2)
    for problem in (
        chain(batch, time, tags, dtype, live, seed=2),
        chain(batch, time, tags, dtype, live, seed=3).map(lambda x: x.round() if x.is_floating_point() else x),
    ):
        truth = exact(problem)
        placed = problem.to(target.device)
        score, path = placed(ops.viterbi, target.backend)
        assert (score.dtype, path.dtype) == (problem.transitions.dtype, torch.int64)
        summed = 2 * (time + 1) * unit(torch.float64) * (truth.size_z + abs(truth.best))
        rounded = summed + unit(score.dtype) * abs(truth.best)
        assert_within("score", score, truth.best, rounded)
        assert path.tolist() == truth.path.tolist()
        again = placed.replace(tags=path)(ops.crf_score, target.backend)
        assert_within("score of the path", again, truth.best, rounded * (time if target.backend == "reference" else 1))


def with_garbage(problem: Chain, what: float, tag: int) -> Chain:
    live = problem.live()
    return problem.replace(
        emissions=problem.emissions.masked_fill(~live.unsqueeze(2), what), tags=problem.tags.masked_fill(~live, tag)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("live", ["holes", "left", "right", "rows"])
def test_absent_steps(live: str, dtype: torch.dtype, target: Any) -> None:
    """A masked copy equals the compacted sequence, and garbage at absent steps changes nothing, bit for bit."""
    batch, time = (2, 3) if target.interpreted else (19, 11)
    target.spare(6 if (live, dtype) == ("holes", torch.float32) else 17)
    problem = chain(batch, time, 5, dtype, live, seed=4)
    here = problem.live()
    compact, order = problem.compact(), here.logical_not().long().argsort(dim=1, stable=True)
    garbage = [with_garbage(problem, *rubbish) for rubbish in ((math.nan, -100), (INF, 999), (NEG_INF, -1))]
    for kind in kinds(target):
        value, grads = run(compact.to(target.device), kind, target.backend, "each")
        first, *others = (run(p.to(target.device), kind, target.backend, "each") for p in garbage)
        if target.backend != "reference" or kind == PARTITION:  # torch.sum over time groups its terms by position
            assert torch.equal(first[0], value)
        moved = first[1][0].cpu().gather(1, order.unsqueeze(2).expand_as(problem.emissions))
        assert torch.equal(moved, grads[0].cpu())
        assert not first[1][0][~here.to(target.device)].any()
        for other in others:
            assert torch.equal(other[0], first[0])
            assert all(map(torch.equal, other[1], first[1]))
    score, path = compact.to(target.device)(ops.viterbi, target.backend)
    marginals = compact.to(target.device)(ops.crf_marginals, target.backend).cpu()
    for p in garbage:
        again, masked = p.to(target.device)(ops.viterbi, target.backend)
        assert torch.equal(again, score)
        assert torch.equal(masked.cpu().gather(1, order), path.cpu())
        scattered = p.to(target.device)(ops.crf_marginals, target.backend).cpu()
        assert torch.equal(scattered.gather(1, order.unsqueeze(2).expand_as(scattered)), marginals)


# input and place of -inf; "scattered" leaves sequences 0 and 1 their gold path
FORBIDDEN: dict[str, tuple[str, Any]] = {
    "scattered": ("emissions", ...),
    "transitions": ("transitions", ([0, 1, 1, 2], [1, 1, 3, 0])),
    "transitions, all": ("transitions", ...),
    "start": ("start", [0, 2]),
    "start, all": ("start", ...),
    "end": ("end", slice(1, None)),
    "end, all": ("end", ...),
    "a step": ("emissions", (1, 2)),
    "first step": ("emissions", (2, 0)),
    "last step": ("emissions", (3, 4)),
    "sequence": ("emissions", 4),
}


def forbidden(where: str) -> Chain:
    problem, (name, at) = chain(6, 5, 4, seed=6), FORBIDDEN[where]
    if where == "scattered":
        at = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(2)) < 0.4
        at[:2].scatter_(2, problem.tags[:2].unsqueeze(2), False)
    getattr(problem, name)[at] = NEG_INF
    return problem


@pytest.mark.levels
@pytest.mark.parametrize("where", FORBIDDEN)
def test_minus_infinity(where: str, target: Any) -> None:
    target.spare(6 if where in ("scattered", "transitions") else 17)
    problem = forbidden(where)
    if target.interpreted:
        problem = problem.replace(emissions=problem.emissions[1:4, :3], tags=problem.tags[1:4, :3])
    known = Known(problem)
    known.check(problem.to(target.device), target.backend, kinds(target))
    _, path = problem.to(target.device)(ops.viterbi, target.backend)
    assert path.tolist() == known.truth.path.tolist()
    dead = torch.from_numpy(known.truth.log_z == NEG_INF)
    assert bool(dead.all()) == where.endswith(", all")
    value, grads = run(problem.to(target.device), PARTITION, target.backend)
    assert not grads[0].cpu()[dead].any()
    if dead.any() and not dead.all():  # an infeasible neighbour changes no bit
        cured = problem.replace(emissions=torch.where(dead.view(-1, 1, 1), 0.0, problem.emissions))
        kept, others = run(cured.to(target.device), PARTITION, target.backend)
        assert torch.equal(kept.cpu()[~dead], value.cpu()[~dead])
        assert torch.equal(others[0].cpu()[~dead], grads[0].cpu()[~dead])


def test_bio_constraints_stay_on_the_fast_path(target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("has one path")
    problem = chain(2, 4, 9, seed=7) if target.interpreted else chain(20, 12, 9, seed=7)
    tag = torch.arange(9)  # O is 0, B are 1, 3, 5, 7, I are 2, 4, 6, 8
    inside, entity = (tag > 0) & (tag % 2 == 0), (tag + 1) // 2
    legal = ~inside | (entity.unsqueeze(1) == entity)
    problem = problem.replace(
        transitions=problem.transitions.masked_fill(~legal, NEG_INF), start=torch.where(inside, NEG_INF, 0.0)
    )
    with recorded_paths(target.backend) as paths:
        Known(problem).check(problem.to(target.device), target.backend, (PARTITION,))
    assert paths
    assert not torch.cat(paths).any()


def sliced(x: Tensor) -> Tensor:
    """From the middle of a tensor of NaN."""
    batch, time, tags = x.shape
    return x.new_full((2 * batch, time + 3, tags + 2), math.nan)[::2, 1 : time + 1, 1:-1].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "tags first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": sliced,
    "every other tag": lambda x: x.new_full((*x.shape, 2), math.nan)[..., 1].copy_(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "windows", "windows, few tags"])
def test_layouts(layout: str, dtype: torch.dtype, target: Any) -> None:
    """Values and gradients keep the bits of the contiguous problem; inputs keep theirs, and their version."""
    batch, time, tags = (2, 3, 5) if target.interpreted else (9, 6, 11)
    target.spare(6 if (layout, dtype) in (("sliced", torch.float32), ("windows", torch.bfloat16)) else 17)
    problem = chain(batch, time, tags, dtype, "holes", seed=13).to(target.device)
    if layout == "expanded":
        emissions = problem.emissions[:1].expand(batch, time, tags)
    elif layout == "windows":  # neighbouring steps overlap, and both strides are 1
        emissions = torch.randn(batch, time + tags - 1).to(problem.emissions).unfold(1, tags, 1)
    elif layout == "windows, few tags":
        emissions = torch.randn(batch, time + 1).to(problem.emissions).unfold(1, 2, 1)
        problem = chain(batch, time, 2, dtype, "holes", seed=13).to(target.device)
    else:
        emissions = LAYOUTS[layout](problem.emissions)
    problem = problem.replace(emissions=emissions)
    plain = problem.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    twisted = problem.replace(
        transitions=problem.transitions.t().contiguous().t(),
        start=problem.start.repeat(2, 1).t().contiguous()[:, 1],
        mask=problem.mask.t().contiguous().t(),
        tags=problem.tags.int().t().contiguous().t(),
    )
    given: list[Tensor] = [x for x in vars(twisted).values() if x is not None]
    before = [(x, x.clone(), x._version, x.requires_grad) for x in given]
    known = Known(plain.to("cpu"))
    for kind in kinds(target):
        value, grads = run(plain, kind, target.backend, "each")
        again, others = run(twisted, kind, target.backend, "each")
        if target.backend == "reference":  # torch's own reductions follow strides
            known.check(twisted, "reference", (kind,))
            continue
        assert torch.equal(again, value)
        assert all(map(torch.equal, grads, others))
    assert all(map(torch.equal, twisted(ops.viterbi, target.backend), plain(ops.viterbi, target.backend)))
    for x, bits, version, grad in before:
        assert torch.equal(x, bits)
        assert (x._version, x.requires_grad) == (version, grad)


def test_any_byte_of_a_mask_is_true(target: Any) -> None:
    """A view of other bytes as bool, as NumPy and C++ code hands out."""
    problem = (chain(2, 3, 3, live="left") if target.interpreted else chain(19, 11, 5, live="holes")).to(target.device)
    odd = problem.replace(mask=(problem.mask.to(torch.uint8) * 254).view(torch.bool))
    for kind in kinds(target):
        (value, grads), (right, right_grads) = (run(p, kind, target.backend, "each") for p in (odd, problem))
        assert torch.equal(value, right)
        assert all(map(torch.equal, grads, right_grads))
    assert all(map(torch.equal, odd(ops.viterbi, target.backend), problem(ops.viterbi, target.backend)))


@pytest.mark.levels
@pytest.mark.parametrize("live", ["all", "holes", "lengths"])
def test_guard_bands(live: str, target: Any) -> None:
    """Every buffer of a launch lies between NaNs: none is read into a result, none is written."""
    if target.backend == "reference":
        pytest.skip("has no launcher")
    cases = [(2, 3, 3)] if target.interpreted else [(1, 1, 1), (9, 6, 7), (17, 5, 17), (3, 4, 33), (2, 3, 65)]
    for i, shape in enumerate(cases):
        known = Known(chain(*shape, (torch.float32, torch.float64)[(i + (live == "holes")) % 2], live, seed=15))
        placed = known.problem.to(target.device)
        with guarded("chain", target.backend) as count:
            known.check(placed, target.backend, kinds(target))
            _, path = placed(ops.viterbi, target.backend)
        assert path.tolist() == known.truth.path.tolist()
        assert next(count) > 2
    if not target.interpreted:
        with guarded("chain", target.backend):
            known = Known(mixed())
            known.check(known.problem.to(target.device), target.backend)
            leaves = known.problem.to(target.device).leaves()
            args = (leaves.emissions, leaves.transitions, leaves.tags, leaves.start, leaves.end, leaves.mask)
            ops.crf_nll(*args, reduction="mean", backend=target.backend).backward()  # type: ignore[arg-type]


def test_same_bits_twice(target: Any) -> None:
    problem = (chain(2, 3, 5, live="holes") if target.interpreted else chain(37, 40, 9, live="holes")).to(target.device)
    for kind in kinds(target):
        value, grads = run(problem, kind, target.backend, "each")
        again, others = run(problem, kind, target.backend, "each")
        assert torch.equal(value, again)
        assert all(map(torch.equal, grads, others))
    assert all(map(torch.equal, problem(ops.viterbi, target.backend), problem(ops.viterbi, target.backend)))


@pytest.mark.parametrize("shape", [(67, 60, 17), (37, 30, 64)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, int, int]) -> None:
    """Enough work for a second thread, groups of 8 with a ragged last one, every tier."""
    problem = chain(*shape, live="holes", seed=14)
    emissions = problem.emissions.clone()
    emissions[5::11] *= 1e6  # logs
    steps = problem.live().sum(1).clamp(min=1)
    share = torch.as_tensor(exact(problem, np.float64).log_z) / steps
    emissions[3::7] -= share[3::7, None, None]  # log Z near 0 takes the float64 sweep
    problem = problem.replace(emissions=emissions)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with recorded_paths("cpp") as paths:
                results: list[Any] = list(problem(ops.viterbi, "cpp"))
                for kind, name in itertools.product(KINDS, ("sum", "each")):
                    value, grads = run(problem, kind, "cpp", name)
                    results += [value, *grads]
            assert {int(p) for call in paths for p in call} == {0, 1, 2}
            found.append(results)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


problems = st.builds(
    chain,
    batch=st.integers(1, 9),
    time=st.integers(0, 6),
    tags=st.integers(1, 10),
    dtype=st.sampled_from(DTYPES),
    live=st.sampled_from(LIVE),
    boundaries=st.booleans(),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("backend", ["reference", "numba", "cpp"])
@settings(max_examples=40, deadline=None, derandomize=True)
@example(problem=chain(9, 6, 1))  # with one tag a loss is rounding alone
@example(problem=chain(9, 6, 1, torch.float64))
@given(problem=problems)
def test_any_problem(backend: str, problem: Chain) -> None:
    """Of all small sizes and scales: what the ops say, and that they say the same."""
    known = Known(problem)
    known.check(problem, backend)
    assert torch.equal(problem(ops.crf_marginals, backend), run(known.yardstick, PARTITION, backend)[1][0])
    assert problem(ops.viterbi, backend)[1].tolist() == known.truth.path.tolist()
    assert (problem(ops.crf_nll, backend) >= 0).all()
