"""One suite for every backend of maximum-entropy Markov models."""

import itertools
from typing import Any

import pytest
import torch

from pyseq import ops
from pyseq.ops import _memm
from pyseq.ops._backend import BACKENDS
from pyseq.testing import guarded, pairwise
from pyseq.testing.memm import DTYPES, Problem, check, derived, exact, problem

ROOM = "chain"
SIZES = ((3, 4, 5), (1, 1, 1), (2, 7, 17), (0, 3, 2), (2, 0, 3), (40, 30, 9), (5, 3, 70), (600, 2, 3))
CASES = [(size, kind) for i, size in enumerate(SIZES) for kind in range(i % 2, 30, 7 if size[0] < 40 else 13)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),  # the interpreter's
    pytest.mark.filterwarnings("ignore:.*(torch.jit|should not be instantiated):DeprecationWarning"),  # torch's own
]


@pytest.mark.levels
@pytest.mark.parametrize(("case", "dtype"), pairwise(CASES, DTYPES), ids=str)
def test_values_and_gradients(case: tuple[tuple[int, int, int], int], dtype: torch.dtype, target: Any) -> None:
    (batch, time, num_tags), kind = case
    target.spare(batch * time, 16)
    check(problem(batch, time, num_tags, kind, dtype), target.backend, target.device)


@pytest.mark.parametrize("kind", range(0, 30, 4))
def test_low_rank(kind: int, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where not all steps are taken at once; the pair's product has the same loss."""
    target.spare(12, 12)
    p = problem(3, 4, 7, kind, rank=2)
    check(p, target.backend, target.device)
    whole = p.nll(target.backend)
    monkeypatch.setattr(_memm, "MOST", 14)
    check(p, target.backend, target.device)
    torch.testing.assert_close(p.nll(target.backend), whole)
    dense = p._replace(transitions=p.transitions[0] @ p.transitions[1].mT)
    torch.testing.assert_close(dense.nll(target.backend), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_low_rank_forms_no_matrix_of_all_tags(backend: str) -> None:
    """Which would have 14 GB here."""
    p = problem(1, 3, 60_000, rank=2)
    value, grads = derived(p, lambda p: p.nll(backend), torch.ones(1))
    assert value.isfinite().all()
    assert [x.shape for x in grads] == [(1, 3, 60_000), (60_000, 2), (60_000, 2)]


def test_forbidden_paths_lost_rows_and_large_scores(target: Any) -> None:
    """+inf without gradient, NaN, and scores of 1e4: each stays in its sequence."""
    p = problem(4, 3, 5, 1)._replace(mask=None, direction="both")
    right, clean = derived(p.to(target.device), lambda p: p.nll(target.backend), torch.ones(4))
    f = p.emissions.clone()
    f[1, 1, p.tags[1, 1]], f[2, 2, 0] = -torch.inf, torch.nan
    f[1, 2, 0] = torch.nan
    f[3, :, 1] = torch.where(p.tags[3] == 1, f[3, :, 1], -torch.inf)
    value, grads = derived(p._replace(emissions=f).to(target.device), lambda p: p.nll(target.backend), torch.ones(4))
    assert value[0] == right[0]
    assert value[1] == torch.inf
    assert value[2].isnan()
    assert value[3].isfinite()
    assert (value[3] < right[3]) or (p.tags[3] == 1).any()
    assert (grads[0][1] == 0).all()
    assert grads[0][2, 2].isnan().all()
    assert torch.equal(grads[0][0], clean[0][0])
    assert (grads[0][3, :, 1][p.tags[3] != 1] == 0).all()
    g = p.transitions.clone()
    g[p.tags[0, 0], p.tags[0, 1]] = -torch.inf
    value, grads = derived(p._replace(transitions=g).to(target.device), lambda p: p.nll(target.backend), torch.ones(4))
    assert value[0] == torch.inf
    assert (grads[0][0] == 0).all()
    assert grads[1].isfinite().all()
    big = p._replace(emissions=p.emissions * 1e4, transitions=p.transitions * 1e4)
    found, own = derived(big.to(target.device), lambda p: p.nll(target.backend), torch.ones(4))
    wanted, theirs = derived(big, exact, torch.ones(4).double())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=0.1)
    for x, y in zip(own, theirs, strict=True):
        torch.testing.assert_close(x.cpu().double(), y.double(), rtol=1e-3, atol=1e-3)


def test_absent_steps_are_not_read(target: Any) -> None:
    p = problem(3, 4, 5, 1)
    assert p.mask is not None
    value, grads = derived(p.to(target.device), lambda p: p.nll(target.backend), torch.ones(3))
    away = ~p.mask
    spoilt = p._replace(
        emissions=p.emissions.masked_fill(away.unsqueeze(2), torch.nan), tags=p.tags.masked_fill(away, -100)
    )
    found, own = derived(spoilt.to(target.device), lambda p: p.nll(target.backend), torch.ones(3))
    assert torch.equal(found, value)
    assert all(map(torch.equal, own, grads))
    assert (own[0][away] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_out_of_range(backend: Any) -> None:
    """They raise in eager mode; in a graph their sequence becomes NaN."""
    p = problem(3, 4, 5)
    bad = p.tags.clone()
    bad[1, 2] = 5
    for given, message in (
        (p._replace(tags=bad), r"tags must lie in \[0, 5\) at live steps, got 5 for sequence 1, step 2"),
        (p._replace(lengths=torch.tensor([4, 5, 0])), r"lengths must lie in \[0, 4\], got 5 for sequence 1"),
    ):
        if backend == "triton":
            continue
        with pytest.raises(ValueError, match=message):
            given.nll(backend)
        torch.compiler.reset()
        value = torch.compile(lambda g: g.nll(backend), fullgraph=True, backend="aot_eager")(given)
        assert value.isnan().tolist() == [False, True, False]


def test_threads_and_runs_change_no_bit() -> None:
    before, found = torch.get_num_threads(), list[Any]()
    problems = [problem(64, 40, 9, 8), problem(700, 2, 3, 0), problem(4, 5, 300, 6, rank=3)]
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        found.append([derived(p, lambda p: p.nll("cpp"), torch.ones(len(p.tags))) for p in problems])
    torch.set_num_threads(before)
    for other in found[1:]:
        for (a, x), (b, y) in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
            assert all(map(torch.equal, x, y))


def test_buffers_are_kept_to(target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("the reference has no launcher")
    for rank in (0, 2):
        p = problem(2, 3, 5, 3, rank=rank).to(target.device)
        with guarded("chain", target.backend) as count:
            value, _ = derived(p, lambda p: p.nll(target.backend), torch.ones(2))
            ops.memm_viterbi(p.emissions, p.transitions, p.mask, lengths=p.lengths, backend=target.backend)
        assert next(count) >= 3
        torch.testing.assert_close(value, p.nll("reference"))


@pytest.mark.parametrize("backend", ["reference", "cpp", "numba"])
def test_derivatives(backend: Any) -> None:
    for kind, rank in ((0, 0), (3, 0), (9, 2)):
        p = problem(2, 3, 3, kind, torch.float64, rank=rank)
        leaves = [x.clone().requires_grad_() for x in p.scores]
        assert torch.autograd.gradcheck(lambda *x: p.of(list(x)).nll(backend), leaves)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda *x: p.of(list(x)).nll(backend), leaves)  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(backend: Any) -> None:
    """opcheck of the raw ops, and one graph of the public ones, with the eager gradients."""
    raw = torch.ops.pyseq
    for rank in (0, 2):
        p = problem(2, 3, 4, 4, rank=rank)
        f, *g = (x.requires_grad_() for x in p.scores)
        left, right = g if rank else (g[0], None)
        rest = p.tags, p.mask, p.lengths, p.weight, p.token_weight, None, True, True, False, 0.1, True, backend
        for call in (raw.memm_nll, raw.memm_nll_and_grad) if backend != "reference" else ():
            torch.library.opcheck(call.default, (f, left, right, *rest), test_utils=("test_schema", "test_faketensor"))
        torch.compiler.reset()
        eager = derived(p, lambda p: p.nll(backend), torch.ones(2))
        run = torch.compile(lambda p: p.nll(backend), fullgraph=True, backend="aot_eager")
        graph = derived(p, run, torch.ones(2))
        torch.testing.assert_close(graph, eager)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda f: ops.memm_nll(f, torch.zeros(4, 4), p.tags, backend=backend))(torch.zeros(2, 2, 3, 4))


@pytest.mark.parametrize("kind", range(6))
def test_decoding_in_one_graph(kind: int) -> None:
    """Compiled and exported: paths, marginals with gradients, and sums over what is allowed."""
    p = problem(3, 5, 4, kind, torch.float64)
    f, g = p.scores
    way: Any = {"lengths": p.lengths, "direction": p.direction, "variant": p.variant}
    allowed = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(kind)) < 0.7
    one_way = way | {"direction": "backward" if p.direction == "both" else p.direction}

    class Everything(torch.nn.Module):
        def forward(self, f: torch.Tensor) -> tuple[torch.Tensor, ...]:
            best = ops.memm_viterbi(f, g, p.mask, **way, n_best=2)
            marginals = ops.memm_marginals(f, g, p.mask, **one_way)
            return *best, marginals, ops.memm_nll(f, g, None, p.mask, **way, allowed=allowed)

    run = Everything()
    right = run(f)
    torch.compiler.reset()
    for call in (torch.compile(run, fullgraph=True, backend="aot_eager"), torch.export.export(run, (f,)).module()):
        torch.testing.assert_close(call(f), right)
    assert (right[3] >= 0).all()
    x = f.clone().requires_grad_()
    grads: list[torch.Tensor] = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        marginals, loss = call(x)[2:]
        finite = torch.where(loss.isfinite(), loss, 0.0).sum()
        grads += torch.autograd.grad((marginals * f).sum() + finite, x)
    torch.testing.assert_close(*grads)


def test_weights_have_no_gradient() -> None:
    f, g, tags, w = torch.zeros(2, 3, 4), torch.zeros(4, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(4)
    with pytest.raises(ValueError, match=r"no gradient for weight, which requires one: pass weight.detach\(\)"):
        ops.memm_nll(f, g, tags, weight=w.requires_grad_())
    with torch.no_grad():
        assert ops.memm_nll(f, g, tags, weight=w).isfinite().all()


@pytest.mark.parametrize(
    ("direction", "variant"), [*itertools.product(("both", "forward", "backward"), ("sum", "mean"))]
)
@pytest.mark.parametrize("backend", ["reference", "cpp", "numba"])
def test_decoding_is_exact(direction: Any, variant: Any, backend: Any) -> None:
    """Against every path: the best has the least loss, with holes in the mask, scores of -inf, and of low rank."""
    random = torch.Generator().manual_seed(0)
    paths = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for trial in range(20):
        f, left, right = (
            2 * torch.randn(*s, generator=random, dtype=torch.float64) for s in ((8, 4, 3), (3, 2), (3, 2))
        )
        g: Any = left @ right.mT
        f[torch.rand(8, 4, 3, generator=random) < 0.1 * (trial % 3)] = -torch.inf
        mask = torch.rand(8, 4, generator=random) < 0.8
        g = (
            (left, right)
            if trial % 4 == 3
            else g.masked_fill(torch.rand(3, 3, generator=random) < 0.1 * (trial % 2), -torch.inf)
        )
        words: dict[str, Any] = {"direction": direction, "variant": variant, "backend": backend}
        scores, tags = ops.memm_viterbi(f, g, mask, **words)
        every = paths.repeat_interleave(8, 0)
        losses = ops.memm_nll(f.repeat(81, 1, 1), g, every, mask.repeat(81, 1), **words).view(81, 8)
        torch.testing.assert_close(-scores, losses.amin(0))
        there = scores > -torch.inf
        assert torch.equal(tags == -1, ~mask | ~there.unsqueeze(1))
        torch.testing.assert_close(ops.memm_nll(f, g, tags.clamp(min=0), mask, **words)[there], -scores[there])


@pytest.mark.levels
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("kind", range(12))
def test_adjusted_emissions(kind: int, scale: float, target: Any) -> None:
    """The kernel beside the definition in torch, also where exponentials vanish, of -inf and of NaN."""
    if target.backend != "cpp":
        pytest.skip("other backends take the definition")
    p = problem(6, 7, (5, 17, 40)[kind % 3], kind, DTYPES[kind % 4])
    f, g = p.emissions * scale, p.transitions * scale
    f[0, 2, 3], f[1, 1], f[2, 3, 1], g[2, 4], g[1] = -torch.inf, -torch.inf, torch.nan, -torch.inf, -torch.inf
    memm = _memm.Memm(f, g, None, p.tags, p.mask, p.lengths)
    words = p.direction != "backward", p.direction != "forward", p.variant == "mean"
    found, right = (_memm.adjusted(memm, p.live(), *words, backend) for backend in ("cpp", "reference"))
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-12, equal_nan=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    other = _memm.adjusted(memm, p.live(), *words, "cpp")
    torch.set_num_threads(threads)
    torch.testing.assert_close(other, found, rtol=0, atol=0, equal_nan=True)


def test_raw_scores_do_not_decode_exactly() -> None:
    """What many people use instead."""
    random = torch.Generator().manual_seed(0)
    f, g = torch.randn(500, 5, 3, generator=random), torch.randn(3, 3, generator=random)
    assert 0.1 < (ops.viterbi(f, g)[1] != ops.memm_viterbi(f, g)[1]).any(1).float().mean() < 0.9


def test_decoding_of_large_scores_and_lost_rows() -> None:
    f, g = 1e4 * torch.randn(3, 4, 5), 1e4 * torch.randn(5, 5)
    f[1, 2, 3] = torch.nan
    scores, tags = ops.memm_viterbi(f, g)
    assert scores[1].isnan()
    assert (tags[1] == -1).all()
    loss = ops.memm_nll(f, g, tags.clamp(min=0))
    torch.testing.assert_close(scores[::2], -loss[::2], rtol=1e-5, atol=0.01)
    assert [x.shape for x in ops.memm_viterbi(f[:, :0], g)] == [(3,), (3, 0)]
    assert [x.shape for x in ops.memm_viterbi(f[:0], g)] == [(0,), (0, 4)]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"emissions": torch.zeros(2, 3)}, ValueError, r"emissions must have shape \(batch, time, tags\), got \(2, 3\)"),
    (
        {"transitions": torch.zeros(4, 5)},
        ValueError,
        r"transitions must have shape \(tags, tags\) = \(4, 4\), got \(4, 5\)",
    ),
    (
        {"transitions": (torch.zeros(4, 2), torch.zeros(4, 3))},
        ValueError,
        r"right must have shape \(tags, rank\) = \(4, 2\)",
    ),
    ({"transitions": [torch.zeros(4, 2)]}, TypeError, "must be a tensor or a pair of them, got a list of Tensor"),
    ({"direction": "forwards"}, ValueError, "direction must be 'both', 'forward' or 'backward', got 'forwards'"),
    ({"variant": "half"}, ValueError, "variant must be 'sum' or 'mean', got 'half'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 1.5"),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(tags,\) = \(4,\), got \(3,\)"),
    (
        {"token_weight": torch.ones(2)},
        ValueError,
        r"token_weight must have shape \(batch, time\) = \(2, 3\), got \(2,\)",
    ),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask must be of dtype torch.bool"),
    ({"mask": torch.ones(2, 3).bool(), "lengths": torch.ones(2).long()}, ValueError, "give one of them, not both"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(case: int) -> None:
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Problem(**(problem(2, 3, 4)._asdict() | changed)).nll()
