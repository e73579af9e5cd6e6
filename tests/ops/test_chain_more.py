"""Partial labels, the n best paths, samples and entropy of linear chains, on every backend that serves them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyseq import explain, ops
from pyseq.kernels.chain import ENTROPY
from pyseq.testing import assert_within, guarded, script, unit
from pyseq.testing.chain import LIVE, NEG_INF, Chain, brute_force, chain, exact

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own, under dynamo
]
CPU = ("reference", "numba", "cpp")
COMPILED = ("numba", "cpp")
on_cpu = pytest.mark.parametrize("backend", CPU)


def call(op: Callable[..., Any], problem: Chain, backend: str, **options: Any) -> Any:
    rest = (problem.start, problem.end, problem.mask)
    tags = {"tags": None} if op is ops.crf_nll else {}
    scores = (problem.emissions, problem.transitions)
    return op(*scores, *tags.values(), *rest, lengths=problem.lengths, backend=backend, **options)


def served(target: Any) -> str:
    """The target's backend, where it has a kernel for the n best."""
    if target.backend == "triton":
        pytest.skip("has no kernel")
    return str(target.backend)


def labels(problem: Chain, share: float = 0.6, seed: int = 0) -> Tensor:
    """Some tags of each step; none at the first live step of sequence 1."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(problem.emissions.shape, generator=generator) < share
    allowed.scatter_(2, problem.tags.unsqueeze(2), True)
    if len(allowed) > 1 and allowed.size(1):
        allowed[1, int(problem.live()[1].int().argmax())] = False
    return allowed


def without(problem: Chain, allowed: Tensor) -> Chain:
    return problem.replace(emissions=problem.emissions.masked_fill(~allowed, NEG_INF))


# partial labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("live", ["all", "holes", "lengths"])
def test_partial_labels(live: str, dtype: torch.dtype, target: Any) -> None:
    """Values, gradients, marginals and paths of what is left; a sequence of which nothing is left harms no other."""
    target.spare(6 if (live, dtype) == ("holes", torch.float32) else 17)
    shape = (2, 3, 3) if target.interpreted else (9, 5, 7)
    problem = chain(*shape, dtype, live, seed=2)
    allowed = labels(problem)
    full, part = exact(problem), exact(without(problem, allowed))
    dead = part.log_z == NEG_INF
    placed, given = problem.to(target.device).leaves(), allowed.to(target.device)
    nll = call(ops.crf_nll, placed, target.backend, allowed=given)
    grads = torch.autograd.grad(nll[~torch.from_numpy(dead)].sum(), placed.scores(), retain_graph=True)
    others = torch.autograd.grad(nll.sum(), placed.scores())
    u = 64 * max(unit(dtype), unit(torch.float32) if dtype != torch.float64 else 0)
    right = np.where(dead, np.inf, full.log_z - np.where(dead, 0, part.log_z))
    assert_within("nll", nll, right, 16 * unit(placed.transitions.dtype) * (full.size_z + part.size_z))
    assert (nll.detach() >= 0).all()
    assert nll.isinf().any() == dead.any()
    for i, (grad, other) in enumerate(zip(grads, others, strict=True)):
        counts = (full.expected[i] - part.expected[i]) * ~dead.reshape(-1, *[1] * (full.expected[i].ndim - 1))
        assert_within("gradient", grad, counts if i == 0 else counts.sum(0), u * (1 + counts.shape[0]))
        assert torch.equal(grad, other)
    bound = 64 * unit(placed.transitions.dtype) * (1 + part.size_z.max(initial=0))
    assert_within("log Z", call(ops.crf_log_partition, placed, target.backend, allowed=given), part.log_z, bound)
    found = call(ops.crf_marginals, placed, target.backend, allowed=given)
    assert_within("marginals", found, part.expected[0], bound)
    score, path = call(ops.viterbi, placed, target.backend, allowed=given)
    assert path.tolist() == part.path.tolist()
    assert (score.cpu().numpy() == NEG_INF).tolist() == dead.tolist()
    assert (path.cpu()[torch.from_numpy(dead)] == -1).all()


@on_cpu
def test_partial_labels_that_say_all_or_nothing(backend: str) -> None:
    """One tag a step is a path, every tag no label; what stands at absent steps is not read."""
    problem = chain(9, 6, 5, live="holes", seed=3)
    single = torch.zeros_like(problem.emissions, dtype=torch.bool).scatter_(2, problem.tags.unsqueeze(2), True)
    nll = call(ops.crf_nll, problem, backend, allowed=single)
    torch.testing.assert_close(nll, problem(ops.crf_nll, backend), rtol=1e-5, atol=1e-5)
    garbage = single | ~problem.live().unsqueeze(2), single & problem.live().unsqueeze(2)
    for other in garbage:
        assert torch.equal(call(ops.crf_nll, problem, backend, allowed=other), nll)
    leaves = problem.leaves()
    nothing = call(ops.crf_nll, leaves, backend, allowed=torch.ones_like(single))
    assert not nothing.any()
    assert not any(x.any() for x in torch.autograd.grad(nothing.sum(), leaves.scores()))
    for reduction in ("sum", "mean"):
        reduced = call(ops.crf_nll, problem, backend, allowed=single, reduction=reduction)
        torch.testing.assert_close(reduced, getattr(nll, reduction)())


@on_cpu
def test_partial_labels_without_a_path_beside_nan(backend: str) -> None:
    """The loss is +inf with zero gradient, first and second, also where log Z is NaN; weights of others differ."""
    problem = chain(4, 4, 3, torch.float64, seed=4)
    allowed = labels(problem)
    problem.emissions[1, 2, ~allowed[1, 2]] = math.nan
    leaves = problem.leaves()
    nll = call(ops.crf_nll, leaves, backend, allowed=allowed)
    assert nll.isinf().tolist() == [False, True, False, False]
    grads = torch.autograd.grad(nll @ nll.new_tensor([1.0, 2.0, 3.0, 4.0]), leaves.scores(), create_graph=True)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][1].any()
    again = torch.autograd.grad(torch.stack([x.square().sum() for x in grads]).sum(), leaves.scores())
    assert all(x.isfinite().all() for x in again)
    keep = torch.tensor([0, 2, 3])
    small = problem.replace(emissions=problem.emissions[keep], tags=problem.tags[keep])

    def loss(*scores: Tensor) -> Tensor:
        names = ("emissions", "transitions", "start", "end")
        moved = small.replace(**dict(zip(names, scores, strict=True)))
        return call(ops.crf_nll, moved, backend, allowed=allowed[keep])  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, small.leaves().scores())
    assert torch.autograd.gradgradcheck(loss, small.leaves().scores())


@on_cpu
def test_what_allowed_and_tags_may_be(backend: str) -> None:
    problem = chain(2, 3, 4)
    allowed = labels(problem)
    for bad, error, message in (
        (allowed[..., :3], ValueError, r"allowed must have shape \(batch, time, tags\) = \(2, 3, 4\), got \(2, 3, 3\)"),
        (allowed.int(), TypeError, r"allowed must be of dtype torch\.bool, got torch\.int32; use allowed\.bool\(\)"),
        (allowed.tolist(), TypeError, "allowed must be a tensor"),
    ):
        for op in (ops.crf_nll, ops.crf_log_partition, ops.crf_marginals, ops.viterbi, ops.crf_sample, ops.crf_entropy):
            with pytest.raises(error, match=message):
                call(op, problem, backend, allowed=bad)
    for tags, some, got in ((None, None, "neither"), (problem.tags, allowed, "both")):
        with pytest.raises(ValueError, match=f"needs either tags or allowed, got {got}"):
            ops.crf_nll(problem.emissions, problem.transitions, tags, allowed=some, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
        torch.vmap(lambda x: ops.crf_log_partition(x, problem.transitions, allowed=allowed))(problem.emissions[None])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiled_partial_labels(backend: str) -> None:
    torch.compiler.reset()
    problem = chain(3, 2, 3, live="holes")
    allowed = labels(problem)

    def loss(emissions: Tensor, transitions: Tensor) -> Tensor:
        moved = problem.replace(emissions=emissions, transitions=transitions)
        return call(ops.crf_nll, moved, backend, allowed=allowed, reduction="none")  # type: ignore[no-any-return]

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        value = function(leaves.emissions, leaves.transitions)
        found.append([value, *torch.autograd.grad(value.sum(), leaves.scores()[:2])])
    assert all(map(torch.equal, *found))


# the n best paths


def best(problem: Chain, n_best: int) -> list[list[float]]:
    """Scores of the n best, from every path at once; float64."""
    problem, live = problem.double(), problem.live()
    out = []
    for b, row in enumerate(live):
        at = row.nonzero().squeeze(1)
        scores = torch.zeros(1, dtype=torch.float64)
        if len(at):
            paths = torch.cartesian_prod(*[torch.arange(problem.emissions.size(2))] * len(at)).view(-1, len(at))
            scores = problem.emissions[b, at, paths].sum(1) + problem.transitions[paths[:, :-1], paths[:, 1:]].sum(1)
            if problem.start is not None:
                scores += problem.start[paths[:, 0]] + problem.end[paths[:, -1]]
        found = scores.sort(descending=True).values[:n_best]
        out.append([*found.tolist(), *[NEG_INF] * (n_best - len(found))])
    return out


def check_paths(problem: Chain, scores: Tensor, tags: Tensor, backend: str) -> None:
    """Best first, distinct, -1 where absent, each with its score; the first is Viterbi's."""
    assert (scores.shape, tags.shape) == (tags.shape[:2], (*scores.shape, problem.emissions.size(1)))
    assert scores.dtype == problem.transitions.dtype
    first = call(ops.viterbi, problem, backend)
    assert torch.equal(scores[:, 0].nan_to_num(7), first[0].nan_to_num(7))
    assert torch.equal(tags[:, 0], first[1])
    assert not (scores[:, 1:] > scores[:, :-1]).any()
    there, live = scores > NEG_INF, problem.live().to(tags.device)
    assert torch.equal(tags >= 0, there.unsqueeze(2) & live.unsqueeze(1))
    for row, some in zip(tags.tolist(), there, strict=True):
        assert len({tuple(path) for path in row[: int(some.sum())]}) == int(some.sum())
    for n in range(tags.size(1)):
        again = problem.replace(tags=tags[:, n].clamp(min=0))(ops.crf_score, backend)
        room = 2 * (live.size(1) + 2) * unit(scores.dtype) * (1 + abs(scores[there]).max().item() if there.any() else 1)
        torch.testing.assert_close(again[there[:, n]], scores[:, n][there[:, n]], rtol=0, atol=4 * room)


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("forbid", [0.0, 0.4])
def test_n_best_of_all_paths(live: str, forbid: float, target: Any) -> None:
    """Whole numbers make many ties and exact sums; there are fewer paths than asked for."""
    backend = served(target)
    for shape, n_best in (((3, 4, 3), 90), ((9, 3, 2), 5), ((3, 3, 1), 2), ((5, 3, 4), 1)):
        problem = chain(*shape, torch.float64, live, boundaries=forbid > 0, seed=n_best)
        gone = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < forbid
        rounded = problem.map(lambda x: x.mul(1.5).round() if x.is_floating_point() else x)
        for dtype, case in ((torch.float64, problem), (torch.float32, rounded)):
            case = case.replace(emissions=case.emissions.masked_fill(gone, NEG_INF))
            placed = (case if dtype == torch.float64 else case.single()).to(target.device)
            scores, tags = call(ops.viterbi, placed, backend, n_best=n_best)
            room = 0 if dtype == torch.float32 else 64 * unit(dtype)
            assert_within("scores", scores, np.array(best(case, n_best)).reshape(scores.shape), room)
            check_paths(placed, scores, tags, backend)


@pytest.mark.levels
@pytest.mark.parametrize("shape", [(17, 7, 9), (33, 4, 16), (9, 6, 17), (5, 3, 33), (3, 2, 129), (40, 20, 5)], ids=str)
def test_n_best_like_the_reference(shape: tuple[int, int, int], target: Any) -> None:
    """Of every layout of the kernels; half scores too."""
    backend = served(target)
    for dtype, live in ((torch.float32, "holes"), (torch.float64, "lengths"), (torch.float16, "all")):
        problem = chain(*shape, dtype, live, seed=5)
        scores, tags = call(ops.viterbi, problem.to(target.device), backend, n_best=6)
        right, _ = call(ops.viterbi, problem, "reference", n_best=6)
        torch.testing.assert_close(scores.cpu(), right, rtol=2 * unit(right.dtype), atol=1e-12)
        check_paths(problem.to(target.device), scores, tags, backend)


@on_cpu
def test_n_best_of_nothing_and_beside_nan(backend: str) -> None:
    for shape in ((0, 3, 4), (2, 0, 4)):
        scores, tags = call(ops.viterbi, chain(*shape), backend, n_best=3)
        assert tags.shape == (shape[0], 3, shape[1])
        assert scores.tolist() == [[0, NEG_INF, NEG_INF]] * shape[0]
    problem = chain(5, 4, 3, seed=6)
    clean = call(ops.viterbi, problem, backend, n_best=4)
    emissions = problem.emissions.clone()
    emissions[1, 2, 0], emissions[2, 1], emissions[3, 0, 1] = math.nan, NEG_INF, math.inf
    scores, tags = call(ops.viterbi, problem.replace(emissions=emissions), backend, n_best=4)
    assert scores[[1, 3]].isnan().all()
    assert (scores[2] == NEG_INF).all()
    assert (tags[1:4] == -1).all()
    assert torch.equal(scores[[0, 4]], clean[0][[0, 4]])
    assert torch.equal(tags[[0, 4]], clean[1][[0, 4]])
    lost = problem.replace(
        transitions=problem.transitions.clone().fill_(math.nan), lengths=torch.tensor([1, 0, 2, 1, 4])
    )
    assert call(ops.viterbi, lost, backend, n_best=2)[0].isnan().any(1).tolist() == [False, False, True, False, True]


def test_n_best_words() -> None:
    problem = chain(2, 3, 4)
    for bad, error in ((0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("3", TypeError)):
        with pytest.raises(error, match="n_best must be"):
            call(ops.viterbi, problem, "auto", n_best=bad)
        with pytest.raises(error, match="num_samples must be"):
            call(ops.crf_sample, problem, "auto", num_samples=bad)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int; for a seed"):
        call(ops.crf_sample, problem, "auto", generator=3)
    reason = "there is no triton kernel for n-best"
    with pytest.raises(ValueError, match=reason):
        call(ops.viterbi, problem, "triton", n_best=2)
    for device in ("cpu", "cuda"):
        with torch._subclasses.FakeTensorMode():
            told = explain(ops.viterbi, torch.empty(1, 1, 1, device=device), n_best=2)
        assert told["triton"] == [reason]
        assert told.chosen == ("cpp" if device == "cpu" else "reference")
    with torch._subclasses.FakeTensorMode():
        assert explain(ops.viterbi, torch.empty(1, 1, 1, device="cuda"))["triton"] != [reason]


# samples


@pytest.mark.parametrize("op", [ops.crf_sample, ops.crf_entropy], ids=lambda op: op.__name__)
def test_who_serves_where(op: Callable[..., Any]) -> None:
    pytest.importorskip("triton")
    for device, tags, chosen in (("cpu", 9, "cpp"), ("cuda", 1024, "triton"), ("cuda", 1025, "reference")):
        with torch._subclasses.FakeTensorMode():
            assert explain(op, torch.empty(1, 1, tags, device=device)).chosen == chosen


def sample(problem: Chain, backend: str, count: int, seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensor = call(ops.crf_sample, problem, backend, num_samples=count, generator=generator, **options)
    return drawn


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("live", ["all", "holes"])
def test_samples_follow_the_distribution(live: str, backend: str) -> None:
    """Chi-squared over all 27 paths, at five standard deviations, and the neighbours of a row are independent of it."""
    problem, count = chain(4, 5 if live == "holes" else 3, 3, torch.float64, live, seed=1), 20000
    drawn = sample(problem, backend, count)
    for b, row in enumerate(problem.live()):
        at = row.nonzero().squeeze(1)
        paths = torch.cartesian_prod(*[torch.arange(3)] * len(at)).view(-1, len(at))
        spread = torch.full((len(paths), row.numel()), 0).index_put((torch.arange(len(paths))[:, None], at), paths)
        one = problem.replace(emissions=problem.emissions[b : b + 1].expand(len(paths), -1, -1), tags=spread)
        one = one if problem.mask is None else one.replace(mask=row.expand(len(paths), -1))
        right = one(ops.crf_score, "reference").softmax(0) * count
        code = (drawn[b][:, at] * 3 ** torch.arange(len(at)).flip(0)).sum(1)
        found = code.bincount(minlength=len(paths))
        freedom = len(paths) - 1
        assert ((found - right).square() / right).sum() < freedom + 5 * math.sqrt(2 * freedom)
        assert (drawn[b][:, ~row] == -1).all()
    twins = problem.replace(emissions=problem.emissions[:1].expand(4, -1, -1), mask=None)
    assert len({tuple(x.flatten().tolist()) for x in sample(twins, backend, 50)}) == 4


@pytest.mark.levels
@pytest.mark.parametrize("shape", [(5, 6, 3), (9, 11, 9), (3, 5, 16), (3, 4, 17), (2, 3, 65), (2, 3, 300)], ids=str)
def test_samples_are_the_same_everywhere(shape: tuple[int, int, int], target: Any) -> None:
    """Of plain scores, forbidden ones, scores of 1e4, one far from all others, NaN; in every dtype and mask."""
    target.spare(shape[1])
    shape = (2, *shape[1:]) if target.interpreted else shape
    for seed, live in enumerate(LIVE[:4:3] if shape[2] == 300 else LIVE[:4] if target.interpreted else LIVE):
        problem = chain(*shape, (torch.float32, torch.float64, torch.bfloat16)[seed % 3], live, seed=seed)
        emissions, transitions = problem.emissions.clone(), problem.transitions.clone()
        if seed % 4 == 1:
            emissions, transitions = 1e4 * emissions, 1e3 * transitions
        elif seed % 4 == 2:
            transitions[:, ::2] = NEG_INF
            emissions[0, :, 1] = NEG_INF
        elif seed % 4 == 3:
            emissions[:, 1:3, -1] -= 800
            emissions[:, 2:, 0] += 800
            emissions[0, 0, 1] = math.nan
        problem = problem.replace(emissions=emissions, transitions=transitions)
        drawn = sample(problem.to(target.device), target.backend, 13).cpu()
        assert torch.equal(drawn, sample(problem, "reference", 13))
        truth = exact(problem.double())
        feasible = torch.from_numpy(np.isfinite(truth.log_z))
        assert torch.equal(drawn >= 0, (problem.live() & feasible.unsqueeze(1)).unsqueeze(1).expand_as(drawn))
        for n in range(3):  # a sample is a feasible path
            assert (
                problem.replace(tags=drawn[:, n].clamp(min=0))(ops.crf_score, "reference")[feasible] > NEG_INF
            ).all()


def test_samples_keep_to_marginals_and_labels(target: Any) -> None:
    problem, count = chain(3, 5, 17, live="lengths", seed=2), 100 if target.interpreted else 2000
    allowed = labels(problem)
    drawn = sample(problem.to(target.device), target.backend, count, allowed=allowed.to(target.device)).cpu()
    assert (drawn[1] == -1).all()
    kept = drawn >= 0
    assert (
        allowed.unsqueeze(1).expand(-1, count, -1, -1).gather(3, drawn.clamp(min=0).unsqueeze(3)).squeeze(3)[kept].all()
    )
    share = torch.nn.functional.one_hot(drawn.clamp(min=0), 17).mul(kept.unsqueeze(3)).double().mean(1)
    right = call(ops.crf_marginals, problem, "auto", allowed=allowed).double()
    assert (abs(share - right) <= 5 * (right * (1 - right) / count).sqrt() + 1e-5).all()


def test_samples_can_be_drawn_again(target: Any) -> None:
    """From a generator, torch's own, and whatever stands at absent steps; more samples begin like fewer."""
    backend, shape = target.backend, (2, 4, 3) if target.interpreted else (4, 9, 5)
    problem = chain(*shape, live="holes", seed=3)
    generator, placed = torch.Generator().manual_seed(5), problem.to(target.device)
    first, second = (call(ops.crf_sample, placed, backend, num_samples=7, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(sample(placed, backend, 7, seed=5), first)
    assert torch.equal(sample(placed, backend, 20, seed=5)[:, :7], first)
    torch.manual_seed(5)
    default = call(ops.crf_sample, placed, backend, num_samples=7)
    assert torch.equal(default, first) == (target.device == "cpu")  # whose own generator it was
    assert not torch.equal(call(ops.crf_sample, placed, backend, num_samples=7), default)
    garbage = problem.replace(emissions=problem.emissions.masked_fill(~problem.live().unsqueeze(2), math.nan))
    assert torch.equal(sample(garbage.to(target.device), backend, 7, seed=5), first)
    compact = sample(placed.compact(), backend, 7, seed=5)
    order = placed.live().to(target.device).logical_not().long().argsort(dim=1, stable=True)
    assert torch.equal(first.gather(2, order.unsqueeze(1).expand_as(first)), compact)
    for shape in ((0, 3, 4), (2, 0, 4)):
        assert sample(chain(*shape).to(target.device), backend, 3).shape == (shape[0], 3, shape[1])


# what all raw ops keep to


@pytest.mark.parametrize("shape", [(41, 40, 9), (19, 30, 40)], ids=str)
def test_threads_change_no_path(shape: tuple[int, int, int]) -> None:
    problem = chain(*shape, live="holes", seed=7)
    problem.emissions[3::7] *= 1e4
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            paths = [*call(ops.viterbi, problem, "cpp", n_best=4), sample(problem, "cpp", 30)]
            found.append([*paths, *entropy_and_grads(problem, "cpp")])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.levels
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 6, 7), (3, 9, 16), (5, 4, 33), (2, 3, 260)], ids=str)
def test_guard_bands_of_paths(shape: tuple[int, int, int], target: Any) -> None:
    backend = target.backend
    if backend == "reference":
        pytest.skip("has no launcher")
    target.spare(shape[1], most=4)
    if target.interpreted and shape[2] > 64:
        pytest.skip("many blocks are too slow for triton's interpreter")

    def run(problem: Chain, count: int) -> list[Tensor]:
        found = [sample(problem, backend, count), *entropy_and_grads(problem, backend)]
        return found if backend == "triton" else [*found, *call(ops.viterbi, problem, backend, n_best=count)]

    for live, count in (("holes", 3), ("lengths", 8), ("all", 1))[: 1 if target.interpreted else 3]:
        problem = chain(*shape, live=live, seed=8)
        problem.emissions[-1] *= 1e4
        problem = problem.to(target.device)
        right = run(problem, count)
        with guarded("chain", backend) as calls:
            found = run(problem, count)
        assert next(calls) == (2 if backend == "triton" else 3)
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("backend", [*COMPILED, "triton", "auto"])
def test_opcheck_of_paths(backend: str) -> None:
    problem = chain(*((1, 2, 3) if backend == "triton" else (3, 4, 3)), live="holes")
    if backend == "triton" and explain(ops.crf_sample, problem.emissions)[backend]:
        pytest.skip("needs TRITON_INTERPRET=1")
    scores, mask = (problem.emissions, problem.transitions, problem.start, problem.end), problem.mask
    tools = ("test_schema", "test_autograd_registration", "test_faketensor")
    raw = torch.ops.pyseq
    if backend != "triton":
        torch.library.opcheck(
            raw.viterbi_n_best.default, (*scores, None, mask, None, None, 3, True, backend), test_utils=tools
        )
    seed = torch.tensor([7])
    torch.library.opcheck(raw.crf_sample.default, (*scores, mask, None, seed, 3, True, backend), test_utils=tools)
    for op in (raw.crf_value, raw.crf_value_and_grad):
        given = (*scores, None, mask, None, None, ENTROPY, "none", True, backend)
        torch.library.opcheck(op.default, given, test_utils=tools)


@pytest.mark.parametrize("backend", [*CPU, "triton", "auto"])
def test_compiled_paths(backend: str) -> None:
    torch.compiler.reset()
    problem = chain(3, 2, 3, live="holes")
    if backend == "triton" and explain(ops.crf_sample, problem.emissions)[backend]:
        pytest.skip("needs TRITON_INTERPRET=1")

    def both(emissions: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        moved = problem.replace(emissions=emissions, mask=mask)
        drawn = call(ops.crf_sample, moved, backend, num_samples=3)
        entropy = call(ops.crf_entropy, moved, backend)
        return *call(ops.viterbi, moved, "auto" if backend == "triton" else backend, n_best=3), drawn, entropy

    torch.manual_seed(1)
    right = both(problem.emissions, problem.mask)
    torch.manual_seed(1)
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(problem.emissions, problem.mask)
    assert all(map(torch.allclose, found, right))


@pytest.mark.parametrize("backend", CPU)
def test_lengths_out_of_range(backend: str) -> None:
    problem = chain(3, 4, 3).replace(lengths=torch.tensor([2, 5, -1]))
    for op, option in ((ops.viterbi, {"n_best": 2}), (ops.crf_sample, {}), (ops.crf_entropy, {})):
        with pytest.raises(ValueError, match=r"lengths must lie in \[0, 4\], got 5 for sequence 1"):
            call(op, problem, backend, **option)
    torch.compiler.reset()

    def both(emissions: Tensor) -> tuple[Tensor, ...]:
        moved = problem.replace(emissions=emissions)
        drawn, entropy = call(ops.crf_sample, moved, backend), call(ops.crf_entropy, moved, backend)
        return *call(ops.viterbi, moved, backend, n_best=2), drawn, entropy

    scores, tags, drawn, entropy = torch.compile(both, fullgraph=True, backend="aot_eager")(problem.emissions)
    assert scores.isnan().all(1).tolist() == entropy.isnan().tolist() == [False, True, True]
    assert (tags[1:] == -1).all()
    assert (drawn[1:] == -1).all()
    assert (drawn[0, :, :2] >= 0).all()


# entropy


def entropy_and_grads(problem: Chain, backend: str, weights: Tensor | None = None) -> list[Tensor]:
    """Value, and gradients of its sum, or of that with weights."""
    leaves = problem.leaves()
    value = call(ops.crf_entropy, leaves, backend)
    weights = torch.ones_like(value) if weights is None else weights.to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves.scores(), weights, materialize_grads=True)]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("forbid", [0.0, 0.4])
def test_entropy_of_all_paths(live: str, forbid: float, target: Any) -> None:
    """Values and gradients of p log p over every path."""
    problem = chain(*((2, 3, 3) if target.interpreted else (4, 4, 3)), torch.float64, live, seed=9)
    gone = torch.rand(problem.emissions.shape, generator=torch.Generator().manual_seed(3)) < forbid
    gone[1] = forbid > 0  # no path
    problem = problem.replace(emissions=problem.emissions.masked_fill(gone, NEG_INF)).leaves()
    total = []
    for b, row in enumerate(problem.live()):
        at = row.nonzero().squeeze(1)
        if len(at) == 0 or brute_force(problem.map(Tensor.detach)).log_z[b] == NEG_INF:
            total.append(0 * problem.transitions.sum())
            continue
        paths = torch.cartesian_prod(*[torch.arange(3)] * len(at)).view(-1, len(at))
        paths = paths[(problem.emissions[b, at, paths] > NEG_INF).all(1)]
        scores = problem.emissions[b, at, paths].sum(1) + problem.start[paths[:, 0]] + problem.end[paths[:, -1]]
        log_p = (scores + problem.transitions[paths[:, :-1], paths[:, 1:]].sum(1)).log_softmax(0)
        total.append(-(log_p.exp() * log_p).sum())
    right = torch.stack(total)
    found, *grads = entropy_and_grads(problem.to(target.device), target.backend)
    torch.testing.assert_close(found.cpu(), right.detach())
    assert (found >= 0).all()
    for mine, other in zip(
        grads, torch.autograd.grad(right.sum(), problem.scores(), materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), other)


@pytest.mark.levels
@pytest.mark.parametrize("shape", [(17, 6, 9), (5, 4, 16), (9, 6, 17), (3, 3, 33), (2, 2, 260)], ids=str)
def test_entropy_like_the_reference(shape: tuple[int, int, int], target: Any) -> None:
    """In every layout, dtype and mask, each sequence with a weight; of scores of 1e3, forbidden ones, and steps whose
    likeliest predecessors are unlikely by themselves."""
    if target.backend == "reference":
        pytest.skip("is the yardstick")
    if target.interpreted:
        shape = (2, min(shape[1], 3), min(shape[2], 65))
    few = target.interpreted or shape[2] == 260
    for seed, live in list(enumerate(LIVE))[:: 3 if few else 1]:
        dtype = (torch.float32, torch.float64, torch.bfloat16)[(seed + shape[2]) % 3]
        problem = chain(*shape, dtype, live, seed=seed, scale=1000.0 if seed % 4 == 1 else 1.0)
        if seed % 4 == 2:
            problem.transitions[:, ::2] = NEG_INF
            problem.emissions[0, :, 1] = NEG_INF
        elif seed % 4 == 3:
            problem.emissions[:, 1, ::2] -= 900
            problem.transitions[1::2, 0] -= 800
        weights = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights = weights.to(problem.transitions.dtype)
        found = entropy_and_grads(problem.to(target.device), target.backend, weights)
        right = entropy_and_grads(problem.double(), "reference", weights)
        names = ("value", "emissions", "transitions", "start", "end")
        size = max(float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0 for x in problem.scores())
        for name, mine, other in zip(names, found, right, strict=True):
            room = 2 * unit(mine.dtype) * other.abs() + 64 * unit(torch.float64) * (1 + size) * shape[0] * shape[1]
            assert_within(name, mine, other.numpy(), room.numpy())


@pytest.mark.parametrize("backend", [*CPU, "triton"])
def test_derivatives_of_the_entropy(backend: str) -> None:
    small = backend == "triton"
    problem = chain(*((1, 2, 2) if small else (2, 3, 3)), torch.float64, "all" if small else "holes", seed=1)
    if small and explain(ops.crf_entropy, problem.emissions)[backend]:
        pytest.skip("needs TRITON_INTERPRET=1")
    sound = problem.leaves().scores()
    problem.emissions[0, :, 1] = NEG_INF

    def entropy(*scores: Tensor) -> Tensor:
        names = ("emissions", "transitions", "start", "end")
        return call(ops.crf_entropy, problem.replace(**dict(zip(names, scores, strict=True))), backend)  # type: ignore[no-any-return]

    leaves = problem.leaves()
    value = entropy(*leaves.scores()).sum()
    first = torch.autograd.grad(value, leaves.scores(), create_graph=True)
    second = torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), leaves.scores())
    assert all(x.isfinite().all() for x in (*first, *second))
    assert torch.autograd.gradcheck(entropy, sound)
    assert small or torch.autograd.gradgradcheck(entropy, sound)


def test_small_and_empty_entropies(target: Any) -> None:
    """The terms' digits are kept where log Z less an expected score would have none, also in gradients; NaN stays in
    its sequence."""
    backend, device, time = target.backend, target.device, 4 if target.interpreted else 50
    p = math.exp(-40)
    steps = torch.zeros(3, time, 2)
    steps[:, :, 0] = 40.0
    problem = Chain(steps, torch.zeros(2, 2)).to(device)
    found, by_emissions, _ = entropy_and_grads(problem, backend)
    torch.testing.assert_close(found.cpu().double(), torch.full((3,), time * p * 41).double(), rtol=1e-6, atol=0)
    slope = 40 * p * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    lost = 1e-15 if backend == "reference" else 0.0  # autograd subtracts there
    torch.testing.assert_close(by_emissions.cpu().double(), slope.expand(3, time, 2), rtol=1e-6, atol=lost)
    steps[1, 3, 1] = math.nan
    mixture = problem.replace(emissions=steps.to(device), lengths=torch.tensor([0, time, time], device=device))
    mixed, gradient, *_ = entropy_and_grads(mixture, backend)
    assert mixed[0] == 0
    assert mixed[1].isnan()
    assert mixed[2] == found[2]
    assert gradient[1].isnan().any()
    assert not gradient[0].any()
    assert torch.equal(gradient[2], by_emissions[2])
    for dtype in (torch.bfloat16, torch.float16):
        half = mixture.replace(emissions=steps.to(device, dtype))
        assert call(ops.crf_entropy, half, backend).dtype == torch.float32
    for shape in ((0, 3, 4), (2, 0, 4)):
        value, *grads = entropy_and_grads(chain(*shape).to(device), backend)
        assert value.tolist() == [0] * shape[0]
        assert not any(x.any() for x in grads)


@pytest.mark.parametrize("backend", [*CPU, "triton", "auto"])
def test_compiled_gradient_of_the_entropy(backend: str) -> None:
    torch.compiler.reset()
    problem = chain(3, 2, 3, live="holes")
    if backend == "triton" and explain(ops.crf_entropy, problem.emissions)[backend]:
        pytest.skip("needs TRITON_INTERPRET=1")
    leaves, weights = problem.leaves(), torch.tensor([1.0, -2.0, 0.5])

    def loss(emissions: Tensor, transitions: Tensor) -> Tensor:
        moved = leaves.replace(emissions=emissions, transitions=transitions)
        return call(ops.crf_entropy, moved, backend) @ weights  # type: ignore[no-any-return]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, right = (
        torch.autograd.grad(f(leaves.emissions, leaves.transitions), leaves.scores()) for f in (compiled, loss)
    )
    assert all(map(torch.allclose, found, right))


@pytest.mark.parametrize("backend", COMPILED)
def test_memory_of_the_entropy(backend: str) -> None:
    """Forward and backward at (8, 512, 128) stay far below the B T K K shares, 537 MB."""
    out = script(
        f"""
import resource, torch
from pyseq import ops

def step(batch, time, tags):
    emissions, transitions = torch.randn(batch, time, tags, requires_grad=True), torch.randn(tags, tags)
    ops.crf_entropy(emissions, transitions.requires_grad_(), backend={backend!r}).sum().backward()

step(2, 3, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8, 512, 128)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    )
    assert int(out) < 40_000


problems = st.builds(
    chain,
    batch=st.integers(1, 9),
    time=st.integers(0, 6),
    tags=st.integers(1, 10),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    live=st.sampled_from(LIVE),
    boundaries=st.booleans(),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("backend", COMPILED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems, count=st.integers(1, 9))
def test_any_problem(backend: str, problem: Chain, count: int) -> None:
    scores, tags = call(ops.viterbi, problem, backend, n_best=count)
    check_paths(problem, scores, tags, backend)
    right, _ = call(ops.viterbi, problem, "reference", n_best=count)
    torch.testing.assert_close(scores, right, rtol=2 * unit(scores.dtype), atol=1e-9)
    assert torch.equal(sample(problem, backend, count), sample(problem, "reference", count))
    entropy = call(ops.crf_entropy, problem, backend)
    most = problem.live().sum(1) * math.log(problem.emissions.size(2))
    assert ((entropy >= 0) & (entropy <= most * 1.0001 + 1e-6)).all()
    allowed = labels(problem)
    assert (call(ops.crf_nll, problem, backend, allowed=allowed) >= 0).all()


def test_export_of_paths() -> None:
    class Decoder(torch.nn.Module):
        def forward(self, emissions: Tensor, transitions: Tensor) -> tuple[Tensor, ...]:
            return ops.viterbi(emissions, transitions, n_best=2)

    problem = chain(3, 5, 4)
    args = problem.emissions, problem.transitions
    sizes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=64)}, None)
    program = torch.export.export(Decoder(), args, dynamic_shapes=sizes)
    other = chain(4, 7, 4)
    for case in (problem, other):
        given = case.emissions, case.transitions
        assert all(map(torch.equal, program.module()(*given), Decoder()(*given)))
