"""nn.HMM against counting by hand and brute force over all paths."""

import copy
import itertools
import math
import pickle
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyseq
from pyseq.nn import CRF, HMM, crf_parameter_groups, tag_constraints
from pyseq.nn._chain import Reduction

ROOM = "chain"
K, V = 3, 5
LAYOUTS = pytest.mark.parametrize("batch_first", [False, True])
# (B, T) = (5, 4): right and left padding, holes, a masked first step, nothing live
MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
REDUCTIONS: list[Reduction] = ["none", "sum", "mean", "token_mean"]


def batch(mask: Tensor = MASK, symbols: int = V, tags: int = K) -> tuple[Tensor, Tensor]:
    """Observations and tags (B, T), the same at every call, out of range where masked."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randint(n, mask.shape, generator=g) for n in (symbols, tags))
    return x.masked_fill(~mask, -1), y.masked_fill(~mask, -100)


def laid(batch_first: bool, *tensors: Tensor) -> Any:
    return [x if batch_first else x.transpose(0, 1).contiguous() for x in tensors]


def probabilities(hmm: HMM) -> list[Tensor]:
    """Without constraints."""
    logits = hmm.start_logits, hmm.transition_logits, hmm.emission_logits
    return [x.detach().double().softmax(-1) for x in logits]


def joint(p: list[Tensor], x: list[int], y: tuple[int, ...]) -> float:
    """p(x, y)."""
    start, transitions, emissions = p
    product = 1.0
    for k, (symbol, tag) in enumerate(zip(x, y, strict=True)):
        product *= float(start[tag] if k == 0 else transitions[y[k - 1], tag]) * float(emissions[tag, symbol])
    return product


def sequences(mask: Tensor, *tensors: Tensor) -> list[list[list[int]]]:
    return [[x[b, live].tolist() for x in tensors] for b, live in enumerate(mask)]


@LAYOUTS
def test_brute_force(batch_first: bool) -> None:
    hmm, (x, y) = HMM(K, V, batch_first), batch()
    p = probabilities(hmm)
    o, t, m = laid(batch_first, x, y, MASK)
    assert sum(joint(p, list(s), q) for s in itertools.product(range(V), repeat=2) for q in pairs()) == pytest.approx(1)
    scores, path = hmm.viterbi(o, m)
    best, best_paths = hmm.viterbi(o, m, n_best=2)
    marginals = hmm.marginals(o, m)
    assert (path.shape, marginals.shape) == (m.shape, (*m.shape, K))
    path, marginals = laid(batch_first, path, marginals)
    decoded, ranked, losses = hmm.decode(o, m), hmm.decode(o, m, n_best=2), []
    for b, (symbols, gold) in enumerate(sequences(MASK, x, y)):
        everyone = {q: joint(p, symbols, q) for q in itertools.product(range(K), repeat=len(symbols))}
        total = sum(everyone.values())
        losses.append((-math.log(joint(p, symbols, tuple(gold))), -math.log(total)))
        order = sorted(everyone, key=lambda q: -everyone[q])[:2]
        assert tuple(decoded[b]) == tuple(path[b, MASK[b]].tolist()) == order[0]
        assert [tuple(row) for row in ranked[b]] == order
        assert scores[b].item() == best[b, 0].item() == pytest.approx(math.log(everyone[order[0]]), abs=1e-5)
        assert best_paths[b, 0].tolist() == path[b].tolist()
        for step, at in enumerate(MASK[b].nonzero()[:, 0]):
            mu = [sum(v for q, v in everyone.items() if q[step] == tag) / total for tag in range(K)]
            assert marginals[b, at].tolist() == pytest.approx(mu, abs=1e-5)
        assert (marginals[b, ~MASK[b]] == 0).all()
    for given, column in ((t, 0), (None, 1)):
        wanted = torch.tensor([row[column] for row in losses])
        torch.testing.assert_close(hmm.nll(o, given, m, "none"), wanted, rtol=1e-5, atol=1e-5)
        for reduction, divisor in zip(REDUCTIONS[1:], (1, 5, int(MASK.sum())), strict=True):
            torch.testing.assert_close(hmm.nll(o, given, m, reduction), wanted.sum() / divisor, rtol=1e-5, atol=0)
        assert torch.equal(hmm(o, given, m), hmm.nll(o, given, m))
        assert torch.equal(hmm.nll(o, given, m.byte() * 255), hmm.nll(o, given, m, "mean"))
        full = laid(batch_first, *batch(torch.ones(2, 3, dtype=torch.bool)))
        given = None if given is None else full[1]
        for reduction in REDUCTIONS:
            assert torch.equal(
                hmm.nll(full[0], given, None, reduction), hmm.nll(full[0], given, full[0] >= 0, reduction)
            )


def pairs() -> Any:
    return itertools.product(range(K), repeat=2)


@LAYOUTS
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1])
def test_fit_counts(batch_first: bool, smoothing: float) -> None:
    """Whatever the mask; neighbours across a hole count as a pair."""
    mask = torch.rand(40, 6) < 0.8
    (x, y), hmm = batch(mask), HMM(K, V, batch_first)
    o, t, m = laid(batch_first, x, y, mask)
    assert hmm.fit(o.int(), t, m, smoothing) is hmm
    start, transitions, emissions = (Counter[Any]() for _ in range(3))
    for symbols, tags in sequences(mask, x, y):
        start.update(tags[:1])
        transitions.update(itertools.pairwise(tags))
        emissions.update(zip(tags, symbols, strict=True))
    for found, counts, size in ((hmm.transition_logits, transitions, K), (hmm.emission_logits, emissions, V)):
        for i in range(K):
            row = torch.tensor([counts[i, j] + smoothing for j in range(size)])
            torch.testing.assert_close(found[i].exp(), row / row.sum())
    row = torch.tensor([start[i] + smoothing for i in range(K)])
    torch.testing.assert_close(hmm.start_logits.exp(), row / row.sum())
    at = hmm.nll(o, t, m, "sum").item()
    for parameter in hmm.parameters():  # the most likely parameters
        if smoothing == 0:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert hmm.nll(o, t, m, "sum").item() > at


def test_what_fit_has_not_seen() -> None:
    """Tag 2 never, tag 1 never left, symbol 3 never: no NaN; smoothing makes all possible."""
    x, y = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0, 1], [0, 1]])
    hmm = HMM(3, 4, batch_first=True).fit(x, y)
    start, transitions, emissions = (p.exp().tolist() for p in hmm.parameters())
    assert start == [1, 0, 0]
    assert transitions[0] == [0, 1, 0]
    assert transitions[1] == transitions[2] == pytest.approx([1 / 3] * 3)
    assert emissions[:2] == [[1, 0, 0, 0], [0, 0.5, 0.5, 0]]
    assert emissions[2] == pytest.approx([1 / 3] * 3 + [0])
    # what is unknown tells nothing, as if it had not been observed
    unknown = torch.tensor([[0, 3, 1], [3, 3, 3]])
    by_hand = [1 * 1 * (1 / 3 * 1 / 2 + 1 / 3 * 1 / 3), 1.0]
    assert hmm.nll(unknown, reduction="none").exp().reciprocal().tolist() == pytest.approx(by_hand)
    assert hmm.decode(unknown) == [[0, 1, 1], [0, 1, 0]]
    # what tag 0 never emits, first: nothing is feasible
    impossible = torch.tensor([[1, 1]])
    loss = hmm.nll(impossible)
    loss.backward()
    assert loss == hmm.nll(impossible, torch.tensor([[0, 1]])) == torch.inf
    assert all(p.grad is not None and (p.grad == 0).all() for p in hmm.parameters())
    assert hmm.decode(impossible) == [[-1, -1]]
    assert hmm.decode(impossible, n_best=2) == [[]]
    hmm.fit(x, y, smoothing=0.1)
    assert all(p.isfinite().all() for p in hmm.parameters())
    assert hmm.nll(torch.tensor([[3, 1]])).isfinite()


def test_training_without_tags() -> None:
    """By gradients alone: -log p(x) falls, with tags that `fit` left at probability 0 too, and nothing is NaN."""
    mask = torch.rand(20, 6) < 0.9
    x, y = batch(mask)
    given = HMM(K, V, batch_first=True).fit(x, torch.where(y == 2, 1, y), mask)
    for hmm in (HMM(K, V, batch_first=True), given):
        before = hmm.nll(x, mask=mask).item()
        optimizer = torch.optim.Adam(hmm.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            loss = hmm.nll(x, None, mask)
            loss.backward()
            optimizer.step()
        assert loss.item() < before
        assert not any(p.isnan().any() for p in hmm.parameters())
    hmm = HMM(K, V, batch_first=True).double()
    logits = [p.detach().requires_grad_() for p in hmm.parameters()]
    names = [name for name, _ in hmm.named_parameters()]

    def loss_of(*logits: Tensor) -> Any:
        return torch.func.functional_call(hmm, dict(zip(names, logits, strict=True)), (x[:3], None, mask[:3]))

    assert torch.autograd.gradcheck(loss_of, logits)


@LAYOUTS
def test_constraints(batch_first: bool) -> None:
    """Probabilities are those of the allowed, fitted and not; an end takes paths away; a tag may have no follower."""
    start, transitions, end = tag_constraints(["B", "M", "E", "S"], "BMES")
    transitions[3] = False
    hmm = HMM(4, 2, batch_first, constraints=(start, transitions, end))
    x, y, mask = (torch.tensor(a) for a in ([[0, 1, 1], [1, 0, 0]], [[0, 1, 2], [1, 0, 2]], [[True] * 3] * 2))
    o, t, m = laid(batch_first, x, y, mask)
    free = HMM(4, 2, batch_first)
    free.load_state_dict(hmm.state_dict(), strict=True)
    for fitted in (False, True):
        if fitted:
            hmm.fit(o, t, smoothing=0.5)
            assert torch.equal(hmm.start_logits == -torch.inf, ~start)
            assert torch.equal(hmm.transition_logits == -torch.inf, ~transitions)
            counts = torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 0]]) + 0.5 * transitions[:2]  # M-B is not counted
            torch.testing.assert_close(hmm.transition_logits[:2].exp(), counts / counts.sum(1, keepdim=True))
        logits = (p.detach().double() for p in hmm.parameters())
        allowed = start, transitions, torch.ones(4, 2, dtype=torch.bool)
        p = [torch.where(a, z.exp(), 0) for z, a in zip(logits, allowed, strict=True)]
        p = [z / z.sum(-1, keepdim=True).clamp(min=1e-9) for z in p]
        ends = end.tolist()
        paths = [q for q in itertools.product(range(4), repeat=3) if ends[q[-1]]]
        totals = [sum(joint(p, row, q) for q in paths) for row in x.tolist()]
        hmm.zero_grad()
        loss = hmm.nll(o, reduction="none")
        loss.sum().backward()
        assert (-loss).exp().tolist() == pytest.approx(totals, rel=1e-4)
        assert all(z.grad is not None and z.grad.isfinite().all() for z in hmm.parameters())
        assert (hmm.transition_logits.grad[~transitions] == 0).all()  # type: ignore[index]
        assert hmm.nll(o, t, reduction="none").isfinite().tolist() == [True, False]
        assert all(q[-1] in (2, 3) for q in hmm.decode(o))
        assert hmm.decode(o, m) == hmm.decode(o)
    assert "constraints on start, transitions, end, num_symbols=2" in repr(hmm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Only the parameters are rounded."""
    hmm, mask = HMM(K, V, batch_first=True).to(dtype), torch.ones(2, 100, dtype=torch.bool)
    x, y = batch(mask)
    wanted = copy.deepcopy(hmm).double()
    for tags in (y, None):
        loss = hmm.nll(x, tags)
        assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), wanted.nll(x, tags), rtol=1e-6, atol=0)
        loss.backward()
    assert hmm.decode(x.int()) == wanted.decode(x)
    assert all(p.grad is not None and p.grad.dtype == p.dtype == dtype for p in hmm.parameters())
    assert hmm.fit(x, y).emission_logits.dtype == dtype


def test_backends() -> None:
    hmm, (x, y) = HMM(K, V, batch_first=True), batch()
    results = []
    for backend in ("reference", "auto"):
        with pyseq.use_backend(backend):  # type: ignore[arg-type]
            results.append((hmm.nll(x, None, MASK), hmm.nll(x, y, MASK), hmm.viterbi(x, MASK), hmm.marginals(x, MASK)))
    torch.testing.assert_close(*results)


# torch's own warning, about itself, when dynamo traces an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_fullgraph() -> None:
    torch._dynamo.reset()
    hmm, (x, y) = HMM(K, V, batch_first=True, constraints=(None, torch.rand(K, K) < 0.8, None)), batch()

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hmm.nll(x, None, MASK, "none"), hmm.nll(x, y, MASK), hmm.viterbi(x, MASK)[1]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    bad = x.clone()
    bad[1, 3] = V
    assert compiled(bad)[0].isnan().tolist() == [False, True, False, False, False]


def test_copies_checkpoints_and_groups() -> None:
    hmm, (x, y) = HMM(K, V, batch_first=True, constraints=(None, torch.eye(K).bool(), None)), batch()
    shapes = {name: tuple(p.shape) for name, p in hmm.state_dict().items()}
    assert shapes == {"start_logits": (K,), "transition_logits": (K, K), "emission_logits": (K, V)}
    assert repr(HMM(K, V)) == "HMM(num_tags=3, num_symbols=5)"
    fresh = HMM(K, V, batch_first=True, constraints=(None, torch.eye(K).bool(), None))
    fresh.load_state_dict(hmm.fit(x, y, MASK).state_dict())
    for twin in (fresh, copy.deepcopy(hmm), pickle.loads(pickle.dumps(hmm))):
        assert torch.equal(twin.nll(x, None, MASK), hmm.nll(x, None, MASK))
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "hmm": hmm, "crf": CRF(2)})
    rest, heads = crf_parameter_groups(model, lr=1.0, multiplier=2.0)
    assert (len(rest["params"]), len(heads["params"]), heads["lr"]) == (2, 6, 2.0)


def test_hooks_see_every_method_but_fit() -> None:
    hmm, (x, y), seen = type("Mine", (HMM,), {})(K, V, batch_first=True), batch(), []
    hmm.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    hmm.fit(x, y, MASK)
    assert seen == []
    for method in ("nll", "marginals", "viterbi", "decode"):
        getattr(hmm, method)(x, mask=MASK)
    assert seen == [Tensor, Tensor, tuple, list]

    class Other(HMM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.marginals(x)

    assert torch.equal(Other(1, 1)(torch.zeros(2, 3, dtype=torch.long)), torch.ones(2, 3, 1))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_nothing_live_at_all(shape: tuple[int, int]) -> None:
    x, hmm = torch.zeros(shape, dtype=torch.long), HMM(K, V, batch_first=True)
    for tags in (x, None):
        assert (hmm.nll(x, tags, reduction="none") == 0).all()
        assert hmm.nll(x, tags, reduction="token_mean") == 0
        assert hmm.nll(x, tags).isnan() == (shape[0] == 0)
    assert hmm.decode(x) == [[]] * shape[0]
    with pytest.raises(ValueError, match="nothing to count: the mask leaves no live step"):
        hmm.fit(x, x)


X, Y = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.tensor([[0, 1], [2, 0], [1, 1]])
LIVE = torch.ones(3, 2, dtype=torch.bool)
MATCH = "the shapes of observations and"
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("both", {"observations": X[0]}, ValueError, "observations must have dimension of 2, got 1"),
    ("both", {"observations": X.tolist()}, TypeError, "observations must be a tensor, got list"),
    (
        "both",
        {"observations": X.float()},
        TypeError,
        "observations must be of dtype torch.int64 or torch.int32, got ",
    ),
    (
        "both",
        {"observations": X + 1},
        ValueError,
        "observations must lie in [0, 5) at live steps, got 5 for sequence 2",
    ),
    ("both", {"observations": X - 1}, ValueError, "got -1 for sequence 0, step 0; mask the step out if it is padding"),
    (
        "both",
        {"observations": X.to("meta")},
        ValueError,
        "observations is on meta but the model is on cpu; move one",
    ),
    ("both", {"tags": Y[1:]}, ValueError, f"{MATCH} tags must match, got (3, 2) and (2, 2)"),
    ("both", {"tags": Y.float()}, TypeError, "tags must be of dtype torch.int64 or torch.int32, got torch.float32"),
    ("both", {"tags": Y + 1}, ValueError, "tags must lie in [0, 3) at live steps, got 3 for sequence 1, step 0"),
    ("both", {"mask": LIVE[1:]}, ValueError, f"{MATCH} mask must match, got (3, 2) and (2, 2)"),
    ("both", {"mask": LIVE.float()}, TypeError, "mask must be of dtype torch.bool or torch.uint8, got torch.float32"),
    ("nll", {"reduction": "total"}, ValueError, "invalid reduction: total"),
    ("call", {"compute": "loss"}, ValueError, "compute must be 'nll', 'viterbi', 'decode' or 'marginals', got 'loss'"),
    ("call", {"compute": "viterbi"}, TypeError, "compute='viterbi' takes no tags; give None for them, then the mask"),
    ("fit", {"smoothing": -1.0}, ValueError, "smoothing must be at least 0 and finite, got -1.0"),
    ("fit", {"smoothing": math.nan}, ValueError, "smoothing must be at least 0 and finite, got nan"),
    ("fit", {"smoothing": "1"}, TypeError, "smoothing must be a number, got '1'"),
    ("fit", {"smoothing": True}, TypeError, "smoothing must be a number, got True"),
    ("fit", {"tags": None}, TypeError, "tags must be a tensor, got NoneType"),
]


@pytest.mark.parametrize(("method", "bad", "error", "message"), BAD)
def test_bad_arguments(method: str, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    hmm = HMM(K, V, batch_first=True)
    calls: dict[str, Any] = {"nll": hmm.nll, "call": hmm, "fit": hmm.fit}
    for name in ("nll", "fit") if method == "both" else (method,):
        with pytest.raises(error, match=re.escape(message)):
            calls[name](**{"observations": X, "tags": Y, **bad})
    if "observations" in bad:
        with pytest.raises(error, match=re.escape(message)):
            hmm.decode(**bad)


@pytest.mark.parametrize(("sizes", "error", "message"), [
    ((0, 2), ValueError, "invalid number of tags: 0"), ((2, 0), ValueError, "invalid number of symbols: 0"),
    ((2.0, 2), TypeError, "num_tags must be an integer, got 2.0"),
    ((2, True), TypeError, "num_symbols must be an integer, got True"),
])  # fmt: skip
def test_sizes(sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        HMM(*sizes)
