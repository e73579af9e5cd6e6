"""Scores that break a scaled recursion: deficits, underflow, overflow, NaN, length; and which branch served them."""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyseq import ops
from pyseq.kernels.chain import NLL, PARTITION
from pyseq.testing import assert_within
from pyseq.testing.chain import (
    KINDS,
    NEG_INF,
    ROOM_FOR_ERROR,
    Chain,
    Exact,
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
    if target.interpreted:
        wanted = tuple(kind for kind in wanted if kind == NLL) or wanted
    for here in (known, known.crowd)[: 1 + (target.backend == "cpp")]:
        here.check(here.problem.to(target.device), target.backend, wanted)


def path_chain(*rows: Any, transitions: Any, start: Any = None, end: Any = None, tags: Any = None) -> Chain:
    """Sequences of one length from nested lists; a gold path of zeros unless given."""
    emissions = torch.tensor(rows, dtype=torch.float32)
    ends = (None if x is None else torch.tensor(x, dtype=torch.float32) for x in (start, end))
    labels = torch.zeros(emissions.shape[:2], dtype=torch.int64) if tags is None else torch.tensor(tags)
    return Chain(emissions, torch.tensor(transitions, dtype=torch.float32), next(ends), next(ends), labels)


def only_legal() -> Chain:
    """A state 100 nats down becomes the only legal one."""
    return path_chain([[0, -100], [0, 0]], transitions=[[0, NEG_INF], [NEG_INF, 0]], end=[NEG_INF, 0], tags=[[1, 1]])


def regains(down: float, up: float, steps: int) -> Chain:
    """Tag 2 starts `down` nats down, is entered from elsewhere at -300, and regains `up` nats on each step."""
    rows = [[0, 0, -down], *[[0, 0, up]] * steps]
    away = [[0, 0, -300], [0, 0, -300], [-300, -300, 0]]
    return path_chain(rows, transitions=away, start=[math.log(3), math.log(3), 0])


def left_to_right() -> Chain:
    """Five forced hops of -30: the deficits add up. There are C(39, 5) paths of -150."""
    hop = torch.full((6, 6), NEG_INF).fill_diagonal_(0)
    hop[range(5), range(1, 6)] = -30
    gold = [[0] * 35 + [1, 2, 3, 4, 5]]
    first, last = [0, *[NEG_INF] * 5], [*[NEG_INF] * 5, 0]
    return path_chain([[0] * 6] * 40, transitions=hop.tolist(), start=first, end=last, tags=gold)


def unreachable(steps: int, up: float = 100.0, batch: int = 1) -> Chain:
    """A tag that no path reaches gains at every step; seen backwards, its weight grows without bound."""
    rows = [[[0, up]] * steps] * batch
    return path_chain(*rows, transitions=[[0, NEG_INF], [0, 0]], start=[1, NEG_INF])


def valley() -> Chain:
    """Tag 1 is 150 nats down after step 2 and, seen from the end, before step 5; it gains 310 between."""
    rows = [[0, -150], [0, 0], [0, 155], [0, 155], [0, 0], [0, -150]]
    return path_chain(rows, transitions=[[0, -400], [-400, 0]], tags=[[1] * 6])


def faint_product() -> Chain:
    """A state at -54.7 crosses an edge of -45.3: neither is lost in float32, their product keeps five bits."""
    rows = [[20, 20 - 54.7, NEG_INF], [20, NEG_INF, 120], *[[20, NEG_INF, 20]] * 6]
    forced = [[0, NEG_INF, NEG_INF], [NEG_INF, NEG_INF, -45.3], [NEG_INF, NEG_INF, 0]]
    return path_chain(rows, transitions=forced, end=[NEG_INF, NEG_INF, 0], tags=[[1] + [2] * 7])


def normalised() -> Chain:
    """Log-softmax scores: log Z is about 0 after 100 steps, so its rounding errors are large beside it."""
    problem = chain(1, 100, 9, boundaries=False, scale=3.0, seed=8)
    return problem.replace(emissions=problem.emissions.log_softmax(2), transitions=torch.zeros(9, 9))


def shifted(by: float, scale: float = 1.0, time: int = 5) -> Chain:
    problem = chain(3, time, 5, seed=9, scale=scale)
    return problem.replace(emissions=problem.emissions + by)


def sentinels() -> Chain:
    """What stands for -inf in many programs: finite, and far beyond any score."""
    problem = chain(3, 5, 5, seed=9)
    assert problem.tags is not None
    gone = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    gone.scatter_(2, problem.tags.unsqueeze(2), False)
    return problem.replace(emissions=problem.emissions.masked_fill(gone, -1e30))


# log Z where facts about it are known, and the branch (of cpp, numba) that must have served: 0 fast, 2 or 1 logs
HOSTILE: dict[str, tuple[Callable[[], Chain], float | None, int, int]] = {
    "only legal": (only_legal, -100.0, 1, 0),
    "95 down": (lambda: regains(95, 25, 4), math.log(math.exp(5) + 96), 1, 0),
    "100 down": (lambda: regains(100, 50, 3), 50 + math.log1p(48 * math.exp(-50)), 1, 0),
    "left to right": (left_to_right, math.log(math.comb(39, 5)) - 150, 1, 0),
    "unreachable": (lambda: unreachable(3), 1.0, 1, 0),
    "unreachable, long": (lambda: unreachable(12), 1.0, 1, 0),
    "valley": (valley, 10 + math.log1p(math.exp(-10)), 1, 0),
    "deep valley": (lambda: valley().map(lambda x: x * 6 if x.is_floating_point() else x), 60.0, 2, 1),
    "faint product": (faint_product, 160.0, 1, 0),
    "normalised": (normalised, 0.0, 1, 0),
    "hundreds of nats": (lambda: shifted(0, 60.0), None, 1, 0),
    "thousands of nats": (lambda: shifted(0, 3000.0), None, 2, 1),
    "beyond 2^10": (lambda: shifted(1500.0), None, 1, 0),
    "beyond 2^19": (lambda: shifted(-6e5), None, 2, 0),
    "finite sentinels": (sentinels, None, 1, 0),
}


@pytest.mark.levels
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scores(name: str, target: Any) -> None:
    _, log_z, cpp_path, numba_path = HOSTILE[name]
    known = hostile(name)
    target.spare(known.problem.emissions[..., 0].numel())
    if log_z is not None:
        bound = 4 * known.u * known.truth.size_z.max()  # start scores and steps are rounded to float32
        assert abs(known.truth.log_z - log_z).max() <= bound + (1e-4 if name == "normalised" else 0)
    wanted = (PARTITION,) if name == "normalised" else kinds(target)
    with contextlib.ExitStack() as stack:
        if target.backend != "reference":
            paths = stack.enter_context(recorded_paths(target.backend))
        check(known, target, wanted)
    expected = {"cpp": cpp_path, "numba": numba_path}.get(target.backend)
    if expected is not None:
        for size in {len(p) for p in paths}:
            assert max(int(p.max()) for p in paths if len(p) == size) == expected
    if not target.interpreted:
        check(hostile(name, wide=True), target, wanted)


@functools.cache
def hostile(name: str, wide: bool = False) -> Known:
    problem = HOSTILE[name][0]()
    return Known(problem.double() if wide else problem)


def deficit(source: str, regain: str, depth: float, steps: int) -> Chain:
    """Tag 2 falls `depth` nats behind at the first step or on its way in, and catches up in `steps`, or at the end."""
    time = steps + 2
    problem = chain(2, time, 3, seed=16)
    assert problem.start is not None
    assert problem.end is not None
    emissions, transitions, start, end = problem.emissions, problem.transitions, problem.start, problem.end
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
    return problem.replace(tags=torch.full((2, time), 2 if source != "transitions" else 0))


@pytest.mark.parametrize("regain", ["emissions", "transitions", "end", "nothing"])
@pytest.mark.parametrize("source", ["emissions", "transitions", "start"])
def test_deficit_and_regain(source: str, regain: str, target: Any) -> None:
    target.spare(6 if (source, regain) == ("start", "end") else 17)
    for depth in (95,) if target.interpreted else (50, 80, 95, 140, 300, 720, 1500):
        for steps in (1,) if target.interpreted else (1, 9):
            known = deficit_known(source, regain, depth, steps)
            check(known, target, (PARTITION,) if depth != 95 else (NLL,))


@functools.cache
def deficit_known(*args: Any) -> Known:
    return Known(deficit(*args))


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


@pytest.mark.parametrize("total", [88.2, 88.6, 88.7, 89.0, 355.0, 708.5, 709.7, 710.3])
def test_unreachable_tag_at_the_edge_of_a_format(total: float, target: Any) -> None:
    """Its weight, seen backwards, comes within a factor of the largest number: no NaN where it meets a weight of 0."""
    steps, batch = (3, 2) if target.interpreted else (11, 9)
    target.spare(6 if total in (88.6, 709.7) else 17)
    problem = unreachable(steps, total / (steps - 1), batch)
    for here in (problem, problem.double()):
        check(Known(here), target, kinds(target))


@functools.cache
def idle_giant(where: str, size: float) -> Known:
    """A score far beyond all others, of a tag that no feasible path takes: nothing leads there, or nothing from it."""
    problem = chain(2, 4, 4, seed=21, scale=2.0)
    assert problem.start is not None
    assert problem.end is not None
    assert problem.tags is not None
    emissions = problem.emissions.clone()
    if where == "emissions":
        emissions[:, 1:, 3] = size
        problem.transitions[:, 3] = NEG_INF
    elif where == "dead end":
        emissions[:, 1:-1, 3] = size
        problem.transitions[3] = NEG_INF
    else:
        emissions[..., 3] = NEG_INF
        getattr(problem, where)[..., 3] = size
    return Known(problem.replace(emissions=emissions, tags=problem.tags.clamp(max=2)))


@pytest.mark.levels
@pytest.mark.parametrize("size", [300.0, 1e5, 1e12, 1e17, 1e30])
@pytest.mark.parametrize("where", ["transitions", "start", "end", "emissions", "dead end"])
def test_giants_that_no_path_takes(where: str, size: float, target: Any) -> None:
    target.spare(6 if (where, size) in (("emissions", 1e17), ("dead end", 1e17)) else 17)
    known = idle_giant(where, size)
    check(known, target, (PARTITION, NLL))
    if target.backend == "reference":
        return  # it takes sums as they are, dead ends and all
    exactly, _ = known.truth.gradients(PARTITION, np.ones(2))
    _, found = run(known.problem.to(target.device), PARTITION, target.backend)
    for x, y in zip(found, exactly, strict=True):
        assert x is not None
        torch.testing.assert_close(x.cpu().double(), torch.from_numpy(y.astype(float)), rtol=0, atol=2e-6)


def test_tiny_scores(target: Any) -> None:
    """A log Z below the roundings of float64 beside 1, or beside the score of a tag that no path takes."""
    rest = [[0, NEG_INF]] * (2 if target.interpreted else 99)
    for size in (1e-6, 1e-30) if target.interpreted else (1e-6, 1e-12, 1e-17, 1e-30):
        problem = path_chain([[size, NEG_INF]], [[-size, NEG_INF]], transitions=[[0, 0], [0, 0]])
        check(Known(problem), target, (PARTITION, NLL))
    for idle in (100,) if target.interpreted else (100, 600):
        long = path_chain([[3e-7, NEG_INF], *rest], transitions=[[0, 0], [0, idle]])
        short = path_chain([[1e-8, NEG_INF]], transitions=[[0, 0], [0, 0]], start=[0, idle], end=[0, idle])
        for problem in (long, short):
            check(Known(problem), target, (PARTITION, NLL))


def test_what_is_normalised_stays_out_of_logs(target: Any) -> None:
    """Where log Z is about 0, the size of its parts says that float64 will do, also behind a forced first tag."""
    if target.backend not in ("cpp", "numba"):
        pytest.skip("sums in logs, or without this rule")
    emissions = chain(4, 50, 9, boundaries=False, scale=3.0, seed=8).emissions.double().log_softmax(2)
    forced = emissions.clone()
    forced[:, 0] = torch.tensor([0, *[NEG_INF] * 8])
    for scores in (emissions, forced):
        with recorded_paths(target.backend) as paths:
            ops.crf_log_partition(scores, torch.zeros(9, 9).double(), backend=target.backend)
        assert all(int(p.max()) < (2 if target.backend == "cpp" else 1) for p in paths)
        assert paths


@pytest.mark.parametrize("where", ["start", "emissions", "end"])
def test_constants_that_every_path_crosses(where: str, target: Any) -> None:
    """Added to all tags of one step they change no posterior, as long as float32 holds what they were added to."""
    if target.backend == "reference":
        pytest.skip("adds the scores as they are")
    target.spare(6 if where == "emissions" else 17)
    near = chain(2, 3, 3, seed=4)
    assert near.start is not None
    assert near.end is not None
    near.emissions[..., 2] = NEG_INF  # a tag that no path takes, whose score brings all sequences to the log domain
    near.transitions[2, 2] = 1e5
    far = {name: x.clone() for name, x in (("start", near.start), ("emissions", near.emissions), ("end", near.end))}
    at = (slice(None), 1, slice(2)) if where == "emissions" else slice(2)
    getattr(near, where)[at] = 0.0
    far[where][at] = 1e14
    wanted = run(near.to(target.device), PARTITION, target.backend)[1]
    with recorded_paths(target.backend) as paths:
        found = run(near.replace(**{where: far[where]}).to(target.device), PARTITION, target.backend)[1]
    assert set(paths[-1].tolist()) == {1 if target.backend == "numba" else 2}
    for x, y in zip(found, wanted, strict=True):
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
    swallowed = path_chain([[v, -7], [v, -3]], transitions=[[0, 1434], [v, v]])
    tied = path_chain([[0, -1e16], [0, 0], [-1e16, 0]], transitions=[[0, -1e16], [-1e16, 0]])
    for here in (swallowed, tied):
        with recorded_paths(target.backend) as paths:
            _, (marginals, counts, _, _) = run(here.to(target.device), PARTITION, target.backend)
        assert set(paths[-1].tolist()) == {1 if target.backend == "numba" else 2}  # logs
        torch.testing.assert_close(marginals.sum(2), torch.ones_like(marginals[..., 0]))
        steps = marginals.size(1) - 1
        assert 0 <= counts.min() <= counts.max() <= steps
        if target.backend != "triton":  # there each count is bounded, but not their sum
            torch.testing.assert_close(float(counts.sum()), float(steps))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", [2, 3, 4, 8])
def test_nan_stays_in_its_sequence(where: int, poison: float, target: Any) -> None:
    """Neighbours in every tier keep their bits; the poisoned sequence says NaN. +inf is no score either."""
    problem = mixed()
    if target.interpreted:
        target.spare(6 if where == 3 and poison != poison else 17)
        problem = problem.replace(
            emissions=problem.emissions[2:5, :3], tags=None if problem.tags is None else problem.tags[2:5, :3]
        )
        where -= 2
    others = torch.arange(len(problem.emissions)) != where
    emissions = problem.emissions.clone()
    emissions[where, 2, 3] = poison
    clean, bad = problem.to(target.device), problem.replace(emissions=emissions).to(target.device)
    for kind in (NLL,) if target.interpreted else (PARTITION, NLL):
        value, grads = run(clean, kind, target.backend, "each")
        again, spoilt = run(bad, kind, target.backend, "each")
        assert grads[0] is not None
        assert spoilt[0] is not None
        assert again[where].isnan()
        assert torch.equal(again.cpu()[others], value.cpu()[others])
        assert torch.equal(spoilt[0].cpu()[others], grads[0].cpu()[others])
    score, path = clean(ops.viterbi, target.backend)
    again, spoilt_path = bad(ops.viterbi, target.backend)
    assert again[where].isnan()
    assert spoilt_path[where].tolist() == [-1] * path.size(1)
    assert torch.equal(again.cpu()[others], score.cpu()[others])
    assert torch.equal(spoilt_path.cpu()[others], path.cpu()[others])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_that_no_path_takes(poison: float, target: Any) -> None:
    """A live score is read, whether or not a path gets there."""
    target.spare(6)
    problem = chain(2, 3, 3, seed=12)
    problem.emissions[1, 1, 2] = poison
    problem.transitions[:, 2] = NEG_INF
    for here in (problem, problem.crowd(8))[: 1 + (target.backend == "cpp")]:
        placed = here.to(target.device)
        value, grads = run(placed, PARTITION, target.backend)
        assert value.isnan().tolist() == [False, True] * (len(value) // 2)
        assert grads[0] is not None
        assert grads[0].isnan().flatten(1).any(1).tolist() == value.isnan().tolist()
        assert placed(ops.viterbi, target.backend)[0].isnan().tolist() == value.isnan().tolist()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_that_nobody_reads(poison: float, target: Any) -> None:
    """Rows of one step read no transition, rows without any read nothing."""
    target.spare(6)
    problem = chain(2, 3, 3, seed=12)
    problem.transitions[1, 1] = poison
    for lengths in (torch.tensor([1, 0]), torch.tensor([0, 0])):
        if not lengths.any():
            assert problem.end is not None
            problem.end[1] = poison
        value, grads = run(problem.replace(lengths=lengths).to(target.device), PARTITION, target.backend)
        assert value.isfinite().all()
        for grad in grads:
            assert grad is not None
            assert grad.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["transitions", "start", "end"])
def test_nan_parameters(where: str, poison: float, target: Any) -> None:
    """Every sequence that reads the parameter says NaN; one of a single step reads no transition."""
    problem = chain(4, 3, 3, seed=11).replace(lengths=torch.tensor([3, 1, 0, 2]))
    target.spare(6)
    getattr(problem, where)[1] = poison
    for times in (1, 7)[: 1 + (target.backend == "cpp")]:  # lanes of unlike length
        placed = problem.crowd(times).to(target.device)
        expected = [True, where != "transitions", False, True] * times
        assert placed(ops.crf_log_partition, target.backend).isnan().tolist() == expected
        assert placed(ops.crf_nll, target.backend).isnan().tolist() == expected
        score, path = placed(ops.viterbi, target.backend)
        assert score.isnan().tolist() == expected
        assert (path[torch.tensor(expected)] == -1).all()


@pytest.mark.parametrize("weight", [math.inf, math.nan])
@pytest.mark.parametrize("batch", [1, 3, 18])
@pytest.mark.parametrize("tags", [5, 40])
def test_no_weight_moves_an_infeasible_sequence(tags: int, batch: int, weight: float, target: Any) -> None:
    """Its gradient is zero whatever the loss makes of its infinity, a square for one."""
    target.spare(3 * batch if tags == 5 else 17)
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


@pytest.mark.parametrize("shape", [(17, 20, 9), (9, 5, 33)])
def test_a_forbidden_path_moves_no_bit_of_others(shape: tuple[int, int, int]) -> None:
    """Sequences are grouped by the batch alone, not by what their neighbours score."""
    problem = chain(*shape, seed=21)
    assert problem.tags is not None
    found = []
    for score in (0.0, NEG_INF, math.nan):
        emissions = problem.emissions.clone()
        emissions[0, 0, problem.tags[0, 0]] = score
        value, grads = run(problem.replace(emissions=emissions), NLL, "cpp")
        assert grads[0] is not None
        found.append((value[1:], grads[0][1:]))
        assert (grads[0][0] == 0).all() == (score == NEG_INF)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_forbidden_path_beside_nan(target: Any) -> None:
    """The loss of a forbidden path is +inf and its gradient 0, whatever else the sequence holds."""
    problem = chain(3, 4, 3, seed=13)
    target.spare(12)
    assert problem.tags is not None
    emissions = problem.emissions.clone()
    emissions[1, 0, problem.tags[1, 0]] = NEG_INF
    emissions[1, 2, problem.tags[1, 2] - 1] = math.nan
    value, grads = run(problem.replace(emissions=emissions).to(target.device), NLL, target.backend)
    others = torch.tensor([0, 2])
    apart = problem.replace(emissions=problem.emissions[others], tags=problem.tags[others])
    alone, without = run(apart.to(target.device), NLL, target.backend)
    assert value[1] == math.inf
    assert torch.equal(value[others], alone)
    assert grads[0] is not None
    assert without[0] is not None
    assert (grads[0][1] == 0).all()
    for grad, same in zip([grads[0][others], *grads[1:]], without, strict=True):
        torch.testing.assert_close(grad, same)


@functools.cache
def long_chain() -> tuple[Chain, Exact, Known]:
    """A hundred thousand steps, and the first thousand of them."""
    problem = chain(1, 100_000, 9, seed=12)
    return problem, exact(problem, np.float64), Known(problem.replace(emissions=problem.emissions[:, :1000], tags=None))


@pytest.mark.parametrize("target_backend", ["numba", "cpp", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_hundred_thousand_steps(target_backend: str) -> None:
    """Errors do not add up over time: the budget of the posterior is that of the first thousand steps."""
    problem, truth, head = long_chain()
    device = "cuda" if target_backend == "triton" else "cpu"
    value, grads = run(problem.to(device), PARTITION, target_backend)
    assert_within("value", value, truth.log_z, (ROOM_FOR_ERROR + 1) * head.u * truth.size_z)
    assert grads[0] is not None
    assert_within("marginals", grads[0], truth.expected[0], head.derived(PARTITION, "sum")[1])
    score, path = problem.to(device)(ops.viterbi, target_backend)
    assert_within("best", score, truth.best, 2 * head.u * abs(truth.best))
    assert (path.cpu().numpy() == truth.path).all()
