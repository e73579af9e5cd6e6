"""Scores that break a scaled recursion: deficits, underflow, overflow, NaN, length; and which branch served them."""

import functools
import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyseq import ops
from pyseq.kernels.chain import NLL, PARTITION, SCORE
from pyseq.testing import assert_within
from pyseq.testing.chain import (
    KINDS,
    NEG_INF,
    ROOM_FOR_ERROR,
    Chain,
    Known,
    chain,
    exact,
    kinds,
    mixed,
    recorded_paths,
    run,
)

pytestmark = pytest.mark.usefixtures("poison")


def check(known: Known, target: Any, wanted: tuple[int, ...]) -> None:
    """Alone, and for C++ also in a batch large enough for one sequence in each vector lane."""
    for here in (known, known.crowd)[: 1 + (target.backend == "cpp")]:
        here.check(here.problem.to(target.device), target.backend, wanted)


def chained(rows: Any, transitions: Any, start: Any = None, end: Any = None, tags: Any = None) -> Chain:
    """One sequence from nested lists; a gold path of zeros unless given."""
    emissions, pairs, first, last = (
        None if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (rows, transitions, start, end)
    )
    assert emissions is not None
    assert pairs is not None
    gold = [0] * len(emissions) if tags is None else tags
    return Chain(emissions.unsqueeze(0), pairs, first, last, torch.tensor([gold]))


FLAT = [[0.0, 0.0], [0.0, 0.0]]
STAY = [[0, NEG_INF], [NEG_INF, 0]]
ALL = chain(3, 5, 5, seed=9)


def regains(down: float, up: float, steps: int) -> Chain:
    """Tag 2 starts `down` nats down, is entered from elsewhere at -300, and regains `up` nats on each step."""
    away = [[0, 0, -300], [0, 0, -300], [-300, -300, 0]]
    return chained([[0, 0, -down], *[[0, 0, up]] * steps], away, start=[math.log(3), math.log(3), 0])


def left_to_right(hop: float, steps: int) -> Chain:
    """Five forced hops of equal score, whose deficits add up. There are C(steps - 1, 5) paths."""
    hops = torch.full((6, 6), NEG_INF).fill_diagonal_(0)
    hops[range(5), range(1, 6)] = hop
    first, last = [0, *[NEG_INF] * 5], [*[NEG_INF] * 5, 0]
    return chained([[0] * 6] * steps, hops, first, last, [0] * (steps - 5) + [1, 2, 3, 4, 5])


def unreachable(steps: int, up: float = 100.0) -> Chain:
    """A tag that no path reaches gains at every step; seen backwards, its weight grows without bound."""
    return chained([[0, up]] * steps, [[0, NEG_INF], [0, 0]], start=[1, NEG_INF])


def valley(times: float) -> Chain:
    """Tag 1 is 150 nats down after step 2 and, seen from the end, before step 5; it gains 310 between."""
    rows = [[0, -150], [0, 0], [0, 155], [0, 155], [0, 0], [0, -150]]
    return chained(times * torch.tensor(rows), times * torch.tensor([[0, -400], [-400, 0]]), tags=[1] * 6)


def faint_product() -> Chain:
    """A state at -54.7 crosses an edge of -45.3: neither is lost in float32, their product keeps five bits."""
    rows = [[20, 20 - 54.7, NEG_INF], [20, NEG_INF, 120], *[[20, NEG_INF, 20]] * 6]
    forced = [[0, NEG_INF, NEG_INF], [NEG_INF, NEG_INF, -45.3], [NEG_INF, NEG_INF, 0]]
    return chained(rows, forced, end=[NEG_INF, NEG_INF, 0], tags=[1] + [2] * 7)


def normalised(time: int) -> Chain:
    """Log-softmax scores: log Z is about 0, so its rounding errors are large beside it."""
    problem = chain(1, time, 9, boundaries=False, scale=3.0, seed=8)
    return problem.replace(emissions=problem.emissions.log_softmax(2), transitions=torch.zeros(9, 9))


def sentinels() -> Chain:
    """What stands for -inf in many programs: finite, and far beyond any score."""
    gone = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    gone.scatter_(2, ALL.tags.unsqueeze(2), False)
    return ALL.replace(emissions=ALL.emissions.masked_fill(gone, -1e30))


# log Z where facts about it are known; the branch of cpp and of numba that must have served, 0 fast, the last one logs;
# and of triton without and with gradients, where its interpreter takes the problem
HOSTILE: dict[str, tuple[Chain, float | None, int, int, tuple[int, int] | None]] = {
    "legal tag 100 down": (chained([[0, -100], [0, 0]], STAY, None, [NEG_INF, 0], [1, 1]), -100.0, 1, 0, None),
    "legal at the end": (chained([[0, -100], [0, 0], [NEG_INF, 0]], STAY, tags=[1] * 3), -100.0, 1, 0, (1, 2)),
    "lost by backward alone": (chained([[0, -55], [0, 0], [NEG_INF, 0]], STAY, tags=[1] * 3), -55.0, 1, 0, (0, 2)),
    "two legal states 150 down": (
        chained([[0, -150, -151.5], [0, 0, 0], [NEG_INF, 0, 0]], torch.full((3, 3), NEG_INF).fill_diagonal_(0)),
        -150 + math.log1p(math.exp(-1.5)), 1, 0, None,
    ),
    "95 down": (regains(95, 25, 4), math.log(math.exp(5) + 96), 1, 0, (1, 2)),
    "100 down": (regains(100, 50, 3), 50 + math.log1p(48 * math.exp(-50)), 1, 0, None),
    "1000 down": (chained([[0, -1000], [0, 1000], [0, 0]], [[0, -3000], [-3000, 0]]), math.log(2), 2, 1, (2, 2)),
    "left to right": (left_to_right(-30.0, 40), math.log(math.comb(39, 5)) - 150, 1, 0, None),
    "left to right, short": (left_to_right(-30.0, 8), math.log(math.comb(7, 5)) - 150, 1, 0, (1, 2)),
    "left to right, steep": (left_to_right(-300.0, 8), math.log(math.comb(7, 5)) - 1500, 2, 1, None),
    "unreachable": (unreachable(4), 1.0, 1, 0, (1, 1)),
    "unreachable, long": (unreachable(12), 1.0, 1, 0, None),
    "one edge far below its column": (chained([[0, NEG_INF], [200, 295]], [[0, -300], [-300, 0]]), None, 1, 0, (1, 2)),
    "valley": (valley(1), 10 + math.log1p(math.exp(-10)), 1, 0, None),
    "deep valley": (valley(6), 60.0, 2, 1, None),
    "faint product": (faint_product(), 160.0, 1, 0, None),
    "normalised": (normalised(100), 0.0, 1, 0, None),
    "every path worth little": (chained([[-0.6953125] * 2] * 8, FLAT), 8 * (math.log(2) - 0.6953125), 1, 0, (1, 1)),
    "no feasible path": (chained([[0, 0], [NEG_INF, NEG_INF], [0, 0]], FLAT), NEG_INF, 0, 1, (0, 0)),
    "hundreds of nats": (chain(3, 5, 5, seed=9, scale=60.0), None, 1, 0, None),
    "thousands of nats": (chain(3, 5, 5, seed=9, scale=3000.0), None, 2, 1, None),
    "beyond 2^10": (ALL.replace(emissions=ALL.emissions + 1500), None, 1, 0, None),
    "beyond 2^19": (ALL.replace(emissions=ALL.emissions - 6e5), None, 2, 0, None),
    "beyond 2^13, emissions": (chained([[9000, 0], [0, 0]], FLAT), None, 1, 0, (2, 2)),
    "beyond 2^13, transitions": (chained(FLAT, [[9000, 9000], [0, 0]]), None, 0, 0, (2, 2)),
    "beyond 2^13, columns": (chained(FLAT, [[-9000, -9000], [-9000, -9001]]), None, 0, 0, (2, 2)),
    "beyond 2^13, start": (chained(FLAT, FLAT, [9000, 0]), None, 0, 0, None),
    "beyond 2^13, end": (chained(FLAT, FLAT, None, [9000, 0]), None, 0, 0, None),
    "finite sentinels": (sentinels(), None, 1, 0, None),
    "sentinel of an emission": (chained([[9, -1e4], [9, 3], [8, 8]], FLAT), None, 0, 0, (2, 2)),
    "sentinel of a transition": (chained([[4, 5], [5, 4], [4, 4]], [[0, -1e4], [0, 0]]), None, 0, 0, (0, 0)),
}  # fmt: skip


@functools.cache
def hostile(name: str, wide: bool = False) -> Known:
    problem = HOSTILE[name][0]
    return Known(problem.double() if wide else problem)


@pytest.mark.levels
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scores(name: str, target: Any) -> None:
    problem, log_z, cpp, numba, triton = HOSTILE[name]
    if target.interpreted and triton is None:
        pytest.skip("too many steps for triton's interpreter")
    known, backend = hostile(name), target.backend
    if log_z is not None:  # start scores and steps are rounded to float32
        bound = 4 * known.u * known.truth.size_z.max() + (1e-4 if name == "normalised" else 0)
        assert known.truth.log_z == log_z or abs(known.truth.log_z - log_z).max() <= bound
    alone = name == "normalised" or (target.interpreted and known.truth.score[0] == NEG_INF)
    wanted = (PARTITION,) if alone else kinds(target)
    if backend == "reference":
        check(known, target, wanted)
    else:
        with recorded_paths(backend) as paths:
            check(known, target, wanted)
            problem.to(target.device)(ops.crf_log_partition, backend)
        slowest = {max(int(q.max()) for q in paths[:-1] if len(q) == len(p)) for p in paths}
        if backend != "triton":
            assert slowest == {{"cpp": cpp, "numba": numba}[backend]}
        elif triton is not None:
            assert (int(paths[-1].max()), *slowest) == triton
    if not target.interpreted:
        check(hostile(name, wide=True), target, wanted)


@functools.cache
def deficit(source: str, regain: str, depth: float, steps: int) -> Known:
    """Tag 2 falls `depth` nats behind at the first step or on its way in, and catches up in `steps`, or at the end."""
    time = steps + 2
    problem = chain(2, time, 3, seed=16)
    emissions, transitions, start, end = problem.scores()
    transitions[:2, 2] = -depth if source == "transitions" else NEG_INF
    if source == "transitions":
        start[2] = NEG_INF
    if source == "start":
        start[2] -= depth
    if source == "emissions":
        emissions[:, 0, 2] -= depth
    if regain == "emissions":
        emissions[:, 2:, 2] += depth / steps
    if regain == "transitions":
        transitions[2, 2] += depth / steps
    if regain == "end":
        end[2] += depth
    return Known(problem.replace(tags=torch.full((2, time), 2 if source != "transitions" else 0)))


@pytest.mark.parametrize("regain", ["emissions", "transitions", "end", "nothing"])
@pytest.mark.parametrize("source", ["emissions", "transitions", "start"])
def test_deficit_and_regain(source: str, regain: str, target: Any) -> None:
    target.spare(6 if (source, regain) == ("start", "end") else 17)
    for depth, steps in ((95, 1),) if target.interpreted else ((50, 9), (80, 1), (95, 9), (140, 1), (300, 9), (720, 1)):
        check(deficit(source, regain, depth, steps), target, (NLL,) if depth == 95 else (PARTITION,))


@functools.cache
def patchwork(seed: int) -> Known:
    """Scores from a short list of hostile ones, in every input, constant over stretches of time."""
    generator = torch.Generator().manual_seed(seed)
    hostile = [20, -20, 45, -70, 95, -95, -150, 350, -710, -760, NEG_INF, NEG_INF]
    levels = torch.tensor([0.0] * 5 + [1, -1, *hostile])
    tags = int(torch.randint(2, 6, (), generator=generator))

    def pick(*shape: int) -> Tensor:
        rare = torch.rand(shape, generator=generator) < (0.15, 0.4, 0.9)[seed % 3]
        return torch.where(rare, levels[torch.randint(len(levels), shape, generator=generator)], 0.0)

    emissions = pick(9, 3, tags).repeat_interleave(1 + seed % 4, 1)
    emissions += 0.1 * torch.randn(emissions.shape, generator=generator)
    labels = torch.randint(tags, emissions.shape[:2], generator=generator)
    return Known(Chain(emissions, pick(tags, tags), pick(tags), pick(tags), labels))


@pytest.mark.levels
@pytest.mark.parametrize("seed", [*range(24), 212])  # 212: a product of two factors underflows, neither does alone
def test_patchwork(seed: int, target: Any) -> None:
    target.spare(17)
    check(patchwork(seed), target, (PARTITION, NLL))


@pytest.mark.parametrize("total", [88.2, 88.7, 355.0, 708.5, 709.7, 710.3])
def test_unreachable_tag_at_the_edge_of_a_format(total: float, target: Any) -> None:
    """Its weight, seen backwards, comes within a factor of the largest number: no NaN where it meets a weight of 0."""
    target.spare(17)
    problem = unreachable(11, total / 10).crowd(9)
    for here in (problem, problem.double()):
        check(Known(here), target, kinds(target))


@functools.cache
def idle_giant(where: str, size: float) -> Known:
    """A score far beyond all others, of a tag that no feasible path takes: nothing leads there, or nothing from it."""
    problem = chain(2, 4, 4, seed=21, scale=2.0)
    emissions = problem.emissions
    if where == "emissions":
        emissions[:, 1:, 3] = size
        problem.transitions[:, 3] = NEG_INF
    elif where == "dead end":
        emissions[:, 1:-1, 3] = size
        problem.transitions[3] = NEG_INF
    else:
        emissions[..., 3] = NEG_INF
        getattr(problem, where)[..., 3] = size
    return Known(problem.replace(tags=problem.tags.clamp(max=2)))


@pytest.mark.parametrize("size", [300.0, 1e5, 1e17, 1e30])
@pytest.mark.parametrize("where", ["transitions", "start", "end", "emissions", "dead end"])
def test_giants_that_no_path_takes(where: str, size: float, target: Any) -> None:
    target.spare(6 if (where, size) == ("emissions", 1e17) else 17)
    known = idle_giant(where, size)
    check(known, target, kinds(target))
    if target.backend == "reference":
        return  # it takes sums as they are, dead ends and all
    exactly, _ = known.truth.gradients(PARTITION, np.ones(2))
    _, found = run(known.problem.to(target.device), PARTITION, target.backend)
    for x, y in zip(found, exactly, strict=True):
        torch.testing.assert_close(x.cpu().double(), torch.from_numpy(y.astype(float)), rtol=0, atol=2e-6)


def test_tiny_scores(target: Any) -> None:
    """A log Z below the roundings of float64 beside 1, or beside the score of a tag that no path takes."""
    problems = [chained([[size, NEG_INF]], FLAT) for size in (1e-6, 1e-12, 1e-17, 1e-30)]
    for idle in (100, 600):
        problems.append(chained([[3e-7, NEG_INF], *[[0, NEG_INF]] * 99], [[0, 0], [0, idle]]))
        problems.append(chained([[1e-8, NEG_INF]], FLAT, start=[0, idle], end=[0, idle]))
    for problem in (problems[2], problems[5]) if target.interpreted else problems:
        check(Known(problem), target, kinds(target))


@pytest.mark.parametrize("where", ["start", "emissions", "end"])
def test_constants_that_every_path_crosses(where: str, target: Any) -> None:
    """Added to all tags of one step they change no posterior, as long as float32 holds what they were added to."""
    if target.backend == "reference":
        pytest.skip("adds the scores as they are")
    target.spare(6 if where == "emissions" else 17)
    near = chain(2, 3, 3, seed=4)
    near.emissions[..., 2] = NEG_INF  # a tag that no path takes, whose score brings all sequences to the log domain
    near.transitions[2, 2] = 1e5
    at = (slice(None), 1, slice(2)) if where == "emissions" else slice(2)
    found = []
    for constant in (0.0, 1e14):
        getattr(near, where)[at] = constant
        with recorded_paths(target.backend) as paths:
            found.append(run(near.map(torch.clone).to(target.device), PARTITION, target.backend)[1])
    assert set(paths[-1].tolist()) == {1 if target.backend == "numba" else 2}
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.levels
def test_mixed_tiers(target: Any) -> None:
    known = Known(mixed())
    target.spare(66)
    if target.backend == "reference":
        pytest.skip("has one tier")
    with recorded_paths(target.backend) as paths:
        known.check(known.problem.to(target.device), target.backend)
    ran = {int(p) for call in paths for p in call}
    assert ran == ({0, 1} if target.backend == "numba" else {0, 1, 2})


def test_scores_that_swallow_all_digits(target: Any) -> None:
    """Sentinels that every path must cross: what a step adds for all tags alike does not show in the gradients, and
    probabilities stay probabilities."""
    if target.backend == "reference":
        pytest.skip("adds the scores as they are")
    problem = chain(2, 3, 3, seed=4)
    near, far = problem.emissions.clone(), problem.emissions.clone()
    near[:, 1], far[:, 1] = 0, -1e17
    for wide in (False,) if target.interpreted else (False, True):
        grads = []
        for emissions in (near, far):
            here = problem.replace(emissions=emissions).to(target.device)
            with recorded_paths(target.backend) as paths:
                grads.append(run(here.double() if wide else here, PARTITION, target.backend)[1])
        assert set(paths[-1].tolist()) == {0 if target.backend == "numba" else 2}  # numba scales every step anyway
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-14 if wide else 1e-6)
    v = -1e30
    swallowed = chained([[v, -7], [v, -3]], [[0, 1434], [v, v]])
    tied = chained([[0, -1e16], [0, 0], [-1e16, 0]], [[0, -1e16], [-1e16, 0]])
    for here in (swallowed, tied):
        with recorded_paths(target.backend) as paths:
            _, (marginals, counts, _, _) = run(here.to(target.device), PARTITION, target.backend)
        assert set(paths[-1].tolist()) == {1 if target.backend == "numba" else 2}  # logs
        torch.testing.assert_close(marginals.sum(2), torch.ones_like(marginals[..., 0]))
        steps = marginals.size(1) - 1
        assert 0 <= counts.min() <= counts.max() <= steps
        if target.backend != "triton":  # there each count is bounded, but not their sum
            torch.testing.assert_close(float(counts.sum()), float(steps))


@pytest.mark.parametrize(
    ("where", "poison"), [(2, math.nan), (3, math.nan), (4, math.nan), (8, math.nan), (3, math.inf)]
)
def test_nan_stays_in_its_sequence(where: int, poison: float, target: Any) -> None:
    """Neighbours in every tier keep their bits; the poisoned sequence says NaN. +inf is no score either."""
    problem = mixed()
    if target.interpreted:
        target.spare(6 if (where, poison) == (3, math.inf) else 17)
        problem, where = problem.replace(emissions=problem.emissions[2:5, :3], tags=problem.tags[2:5, :3]), where - 2
    others = torch.arange(len(problem.emissions)) != where
    emissions = problem.emissions.clone()
    emissions[where, 2, 3] = poison
    found = []
    for here in (problem.to(target.device), problem.replace(emissions=emissions).to(target.device)):
        swept = [run(here, kind, target.backend, "each") for kind in kinds(target) if kind != SCORE]
        score, path = here(ops.viterbi, target.backend)
        found.append([score, *(value for value, _ in swept), path, *(grads[0] for _, grads in swept)])
    assert all(torch.equal(x.cpu()[others], y.cpu()[others]) for x, y in zip(*found, strict=True))
    assert all(value[where].isnan() for value in found[1][: 1 + len(swept)])
    assert (found[1][1 + len(swept)][where] == -1).all()


def poisoned(where: str, at: tuple[int, ...], poison: float, **changes: Any) -> Chain:
    problem = chain(4, 3, 3, seed=11).replace(**{"lengths": torch.tensor([3, 1, 0, 2]), **changes})
    getattr(problem, where)[at] = poison
    return problem


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_who_reads_a_score_says_nan(poison: float, target: Any) -> None:
    """Whether or not a path gets there. A sequence of one step reads no transition, one without steps nothing."""
    unreached = torch.zeros(3, 3).index_fill_(1, torch.tensor(2), NEG_INF)
    rows = [
        (poisoned("transitions", (1, 1), poison), [True, False, False, True]),
        (poisoned("start", (1,), poison), [True, True, False, True]),
        (poisoned("end", (1,), poison), [True, True, False, True]),
        (poisoned("end", (1,), poison, lengths=torch.zeros(4, dtype=torch.int64)), [False] * 4),
        (poisoned("emissions", (3, 1, 2), poison, transitions=unreached), [False, False, False, True]),
        (poisoned("emissions", (3, 2, 2), poison), [False] * 4),
    ]
    for problem, expected in rows[4:5] if target.interpreted else rows:
        for times in (1, 7)[: 1 + (target.backend == "cpp")]:  # lanes of unlike length
            placed, flags = problem.crowd(times).to(target.device), torch.tensor(expected * times)
            value, grads = run(placed, PARTITION, target.backend)
            assert torch.equal(value.cpu().isnan(), flags)
            assert torch.equal(grads[0].cpu().isnan().flatten(1).any(1), flags)
            assert flags.any() or all(grad.isfinite().all() for grad in grads)
            assert torch.equal(placed(ops.crf_nll, target.backend).cpu().isnan(), flags)
            score, path = placed(ops.viterbi, target.backend)
            assert torch.equal(score.cpu().isnan(), flags)
            assert (path.cpu()[flags] == -1).all()


@pytest.mark.parametrize(("tags", "batch", "weight"), [(5, 1, math.inf), (5, 18, math.nan), (40, 3, math.inf)])
def test_no_weight_moves_an_infeasible_sequence(tags: int, batch: int, weight: float, target: Any) -> None:
    """Its gradient is zero whatever the loss makes of its infinity, a square for one."""
    target.spare(3 * batch)
    if batch == 1 and target.device != "cpu":
        pytest.skip("one weight for all is multiplied where it lies")
    problem = chain(batch, 3, tags, seed=13)
    problem.emissions[batch // 2, 1] = NEG_INF
    for kind in kinds(target):
        placed = problem.to(target.device).leaves()
        value = placed(KINDS[kind], target.backend)
        upstream = torch.ones_like(value)
        wanted = torch.autograd.grad(value, placed.scores(), upstream, retain_graph=True)
        upstream[batch // 2] = weight
        found = torch.autograd.grad(value, placed.scores(), upstream)
        assert not found[0][batch // 2].any()
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("tags", [3, 12, 13, 24, 25])
def test_few_tags_put_sequences_in_lanes(tags: int, dtype: torch.dtype, target: Any) -> None:
    """In the float64 tier too, where log Z near 0 sends every other sequence; their numbers are this suite's matter."""
    if target.backend != "cpp":
        pytest.skip("has no lanes")
    level = target.level or importlib.import_module("pyseq._C").cpu_level()
    problem = chain(48, 6, tags, dtype, seed=22)
    problem.emissions[::2] -= torch.as_tensor(exact(problem, np.float64).log_z)[::2, None, None] / 6
    with recorded_paths("cpp", mask=7) as paths:
        run(problem, PARTITION, "cpp")
    tiers = {0, 1} if dtype == torch.float32 else {0}
    lanes = 4 if tags <= (24 if level == 4 else 12) else 0
    assert set(paths[0].tolist()) == {tier + lanes for tier in tiers}


def test_a_forbidden_path_moves_no_bit_of_others(target: Any) -> None:
    """Sequences are grouped by the batch alone, not by what their neighbours score. The loss of a forbidden path is
    +inf and its gradient 0, whatever else the sequence holds."""
    for shape in ((3, 3, 3),) if target.interpreted else ((17, 20, 9), (9, 5, 33)):
        problem, found = chain(*shape, seed=21), []
        for score, other in ((0.0, 0.0), (NEG_INF, 0.0), (NEG_INF, math.nan), (math.nan, 0.0)):
            emissions = problem.emissions.clone()
            emissions[0, 0, problem.tags[0, 0]] = score
            emissions[0, 2, problem.tags[0, 2] - 1] += other
            value, grads = run(problem.replace(emissions=emissions).to(target.device), NLL, target.backend)
            found.append((value[1:], grads[0][1:]))
            assert (value[0] == math.inf) == (score == NEG_INF)
            assert (not grads[0][0].any()) == (score == NEG_INF)
        for others in found[1:]:
            assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("backend", ["numba", "cpp", pytest.param("triton", marks=pytest.mark.gpu)])
def test_errors_do_not_add_up_over_time(backend: str) -> None:
    """At 20,000 steps the budget of the posterior is that of the first thousand."""
    problem = chain(1, 20_000, 9, seed=12)
    truth, head = exact(problem, np.float64), Known(problem.replace(emissions=problem.emissions[:, :1000], tags=None))
    placed = problem.to("cuda" if backend == "triton" else "cpu")
    value, grads = run(placed, PARTITION, backend)
    assert_within("value", value, truth.log_z, (ROOM_FOR_ERROR + 1) * head.u * truth.size_z)
    assert_within("marginals", grads[0], truth.expected[0], head.derived(PARTITION, "sum")[1])
    score, path = placed(ops.viterbi, backend)
    assert_within("best", score, truth.best, 2 * head.u * abs(truth.best))
    assert (path.cpu().numpy() == truth.path).all()
