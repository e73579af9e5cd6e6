"""Priors over code grids: causal to the bit, sampled from a cache as without, by the rules and seeds they are given."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy, one_hot
from torch.testing import assert_close as close

from pyseq.models import VQVAE, PixelAttention, PixelCNN, _sampling

pytestmark = pytest.mark.usefixtures("one_thread")
CODES, GRID, CLASSES = 11, (4, 5), 3
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "attention": (PixelAttention, {"num_codes": CODES, "grid": GRID, "width": 16, "heads": 4}),
    "convolutions": (PixelCNN, {"num_codes": CODES, "grid": GRID, "width": 8, "layers": 4}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
labelled = pytest.mark.parametrize("num_classes", [None, CLASSES])
LABELS = torch.tensor([2, 0, 1])


def built(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    make, small = KINDS[kind]
    return make(**small | options)


def example(grid: tuple[int, int] = GRID, step: int = 0) -> Tensor:
    return torch.randint(CODES, (3, *grid), generator=torch.Generator().manual_seed(step))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(prior: Any, step: int = 0) -> Tensor:
    codes = example(step=step)
    return cross_entropy(prior(codes, LABELS if prior.num_classes else None).flatten(0, 2), codes.flatten())


@kinds
@labelled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_to_the_bit_and_without_a_blind_spot(kind: str, num_classes: int | None, dtype: torch.dtype) -> None:
    """A code moves no logit at its position or before it by a bit, and all logits behind it."""
    prior, labels = built(kind, num_classes=num_classes).to(dtype).eval(), LABELS if num_classes else None
    codes = example()
    before = prior(codes, labels)
    for j in range(GRID[0] * GRID[1]):
        other = codes.clone()
        other.view(3, -1)[:, j] = (other.view(3, -1)[:, j] + 3) % CODES
        moved = (prior(other, labels) != before).flatten(1, 2).any(2)
        assert not moved[:, : j + 1].any(), j
        assert dtype != torch.float32 or moved[:, j + 1 :].all(), j


@kinds
def test_gradients_are_causal_too(kind: str) -> None:
    """Exactly zero from a position's logits to the embedding of its own code, where no other position has that code."""
    prior = built(kind, grid=(2, 4)).double()
    codes = torch.arange(8).view(1, 2, 4)
    embedding = prior.tokens.weight if kind == "attention" else prior.codes.weight
    shift = int(kind == "attention")
    for i in range(8):
        (grad,) = torch.autograd.grad(prior(codes).flatten(0, 2)[i].sum(), embedding, retain_graph=True)
        seen = grad[shift : shift + 8].abs().amax(1) > 0
        assert seen.tolist() == [j < i for j in range(8)]


def test_reach_of_convolutions() -> None:
    """So many columns to the left and beside, and rows above, and not one more."""
    for layers, kernel in ((1, 7), (2, 3), (3, 5)):
        prior = built("convolutions", grid=(9, 19), layers=layers, kernel=kernel)
        reach = layers * (kernel // 2)
        assert prior.reach == reach
        codes = example((9, 19))
        before, seen = prior(codes)[:, 8, 9], torch.zeros(9, 19, dtype=torch.bool)
        for j in range(9 * 19):
            other = codes.clone()
            other.view(3, -1)[:, j] = (other.view(3, -1)[:, j] + 1) % CODES
            seen[j // 19, j % 19] = not torch.equal(prior(other)[:, 8, 9], before)
        wanted = torch.zeros_like(seen)
        wanted[max(0, 8 - reach) : 8, 9 - reach : 9 + reach + 1] = True
        wanted[8, 9 - reach : 9] = True
        assert torch.equal(seen & ~wanted, torch.zeros_like(seen))
        assert seen[8].equal(wanted[8])
        assert seen[7].equal(wanted[7])
        assert seen[max(0, 8 - reach)].any()


def by_steps(prior: Any, codes: Tensor, labels: Tensor | None) -> Tensor:
    """Logits from the cache, which holds NaN at first where that may not be read, and codes that are not known yet."""
    cache, known = prior._cache(3, labels), torch.full_like(codes, -(10**6))
    if isinstance(prior, PixelAttention):
        for memory in cache.memory:
            memory.fill_(torch.nan)
    found = torch.empty(*codes.shape, CODES, dtype=next(prior.parameters()).dtype)
    for row in range(codes.size(1)):
        for column in range(codes.size(2)):
            found[:, row, column] = prior._next(cache, known, row, column)
            known[:, row, column] = codes[:, row, column]
    return found


@kinds
@labelled
@pytest.mark.parametrize("grid", [(4, 5), (1, 6), (6, 1), (1, 1), (7, 3)], ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_pass(kind: str, num_classes: int | None, grid: tuple[int, int]) -> None:
    """At every position, to twice the whole pass's own error and a rounding, in float32 and as many bits in float64."""
    prior, codes = built(kind, num_classes=num_classes, grid=grid).eval(), example(grid)
    labels = LABELS if num_classes else None
    exact = copy.deepcopy(prior).double()
    wanted = exact(codes, labels)
    size = wanted.abs().max()
    many = (
        torch.randint(CODES, (60, *grid)),
        LABELS.repeat(20) if num_classes else None,
    )  # for what the largest error is
    budget = 2 * (prior(*many) - exact(*many)).abs().max() + 2**-23 * size
    assert 0 < budget < 1e-5 * size
    assert (by_steps(prior, codes, labels) - wanted).abs().max() <= budget
    assert (by_steps(exact, codes, labels) - wanted).abs().max() <= budget * 2**-29


@kinds
@labelled
def test_samples_do_not_depend_on_the_cache(kind: str, num_classes: int | None) -> None:
    """In float64, where rounding decides no draw."""
    prior = built(kind, num_classes=num_classes).double()
    for rules in ({}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.6}, {"temperature": 0.0}):
        drawn = [
            prior.sample(3, LABELS if num_classes else None, generator=seeded(), cached=cached, **rules)
            for cached in (True, False)
        ]
        assert torch.equal(*drawn)
        assert (drawn[0].shape, drawn[0].dtype) == ((3, *GRID), torch.int64)
        assert (drawn[0] >= 0).all()
        assert (drawn[0] < CODES).all()


@kinds
def test_cached_sampling_takes_one_position_a_step(kind: str) -> None:
    """The forward of the whole grid does not run, and no attention is asked for more than one position."""
    prior, passes = built(kind), []
    prior.register_forward_hook(lambda *_: passes.append(1))
    prior.sample(2)
    assert not passes
    prior.sample(2, cached=False)
    assert len(passes) == GRID[0] * GRID[1]
    widest = []
    module = prior.blocks[0] if kind == "attention" else prior.layers[0].horizontal
    module.register_forward_hook(
        lambda _, args, out: widest.append(out.size(1) if kind == "attention" else out.size(3))
    )
    prior.sample(2)
    assert widest == [1] * (GRID[0] * GRID[1])


@kinds
def test_a_seed_gives_the_same_samples_again(kind: str) -> None:
    prior = built(kind)
    one, again, other = (prior.sample(3, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    one = prior.sample(3)
    torch.manual_seed(3)
    assert torch.equal(prior.sample(3), one)


@kinds
@labelled
def test_greedy_is_the_likeliest_code_each_time(kind: str, num_classes: int | None) -> None:
    """By temperature 0, top_k 1, top_p 0 or a temperature that is next to nothing."""
    prior = built(kind, num_classes=num_classes).double()
    labels = LABELS if num_classes else None
    found = prior.sample(3, labels, temperature=0.0)
    assert torch.equal(prior.eval()(found, labels).argmax(3), found)
    for rules in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9, "temperature": 2.0}, {"temperature": 1e-300}):
        assert torch.equal(prior.sample(3, labels, **rules), found)


def test_rules_of_drawing() -> None:
    """The shares of 100,000 draws are those of the rules, by chi-square at one in a million."""
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    cases: list[tuple[float, int, float, list[float]]] = [
        (1.0, 0, 1.0, [0.05, 0.4, 0.15, 0.3, 0.1]),
        (0.5, 0, 1.0, [0.0025, 0.16, 0.0225, 0.09, 0.01]),
        (1.0, 3, 1.0, [0, 0.4, 0.15, 0.3, 0]),
        (1.0, 9, 1.0, [0.05, 0.4, 0.15, 0.3, 0.1]),
        (1.0, 0, 0.41, [0, 0.4, 0, 0.3, 0]),
        (1.0, 0, 0.39, [0, 0.4, 0, 0, 0]),
        (0.5, 0, 0.8, [0, 0.16, 0, 0.09, 0]),  # the temperature first: of 0.56 and 0.32; at 1 it needs a third
        (1.0, 0, 0.8, [0, 0.4, 0.15, 0.3, 0]),
        (1.0, 2, 0.6, [0, 0.4, 0, 0.3, 0]),  # top-k first: of 0.57 and 0.43
        (1.0, 2, 0.5, [0, 0.4, 0, 0, 0]),
    ]
    for temperature, top_k, top_p, shares in cases:
        logits = probabilities.log().expand(100_000, 5) + 7
        drawn = _sampling.draw(logits, temperature, top_k, top_p, seeded()).bincount(minlength=5)
        wanted = torch.tensor(shares) / sum(shares) * 100_000
        assert torch.equal(drawn > 0, wanted > 0)
        live = wanted > 0
        statistic = ((drawn - wanted)[live].square() / wanted[live]).sum()
        assert statistic < 33.4  # the quantile for four degrees of freedom


def test_ties_and_forbidden_codes() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 3.0]]).expand(3000, 5)
    for rules in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.0)):
        assert (_sampling.draw(logits, *rules, seeded()) == 1).all()
    assert _sampling.draw(logits, 1.0, 2, 1.0, seeded()).unique().tolist() == [1, 2]
    for rules in ((1.0, 0, 1.0), (0.1, 4, 1.0), (1.0, 0, 0.999)):
        assert not (_sampling.draw(logits, *rules, seeded()) == 3).any()
    assert set(_sampling.draw(logits, 1e-300, 0, 1.0, seeded()).tolist()) == {1, 2, 4}  # 0 in float32
    half = _sampling.draw(logits.bfloat16(), 1.0, 0, 1.0, seeded())
    assert torch.equal(half, _sampling.draw(logits, 1.0, 0, 1.0, seeded()))


@kinds
def test_mode_comes_back_for_each_module_also_after_an_error(kind: str) -> None:
    prior = built(kind, num_classes=CLASSES, dropout=0.5)
    prior.logits.eval()
    before = [module.training for module in prior.modules()]
    found = prior.sample(3, 1, generator=seeded())
    assert not found.requires_grad
    assert torch.equal(prior.sample(3, 1, generator=seeded()), found)  # without dropout
    prior.classes_ = prior.logits.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prior.sample(3, 1)
    assert [module.training for module in prior.modules()] == before
    assert torch.is_grad_enabled()


@kinds
def test_learns_what_labels_say(kind: str) -> None:
    """Each class a chessboard of its own two codes: samples are such boards, of the label asked for."""
    prior = built(kind, num_classes=CLASSES, grid=(4, 4))
    optimizer = torch.optim.Adam(prior.parameters(), 0.01)
    board = (torch.arange(4).unsqueeze(1) + torch.arange(4)) % 2
    boards = torch.stack([2 * label + board for label in range(CLASSES)])
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(prior(boards, torch.arange(CLASSES)).flatten(0, 2), boards.flatten()).backward()
        optimizer.step()
    found = prior.sample(60, torch.arange(CLASSES).repeat(20), generator=seeded(), temperature=0.5)
    assert (found == boards.repeat(20, 1, 1)).all((1, 2)).double().mean() > 0.9
    assert torch.equal(prior.sample(4, 2, temperature=0.0), boards[2].expand(4, 4, 4))


def test_attention_is_the_posts() -> None:
    """Start token, code + 1, embeddings of row and column, norm, causal heads, dense with relu, residual; its size."""
    prior = built("attention", layers=1).double()
    codes, block = example(), prior.blocks[0]
    tokens = torch.cat((torch.zeros(3, 1, dtype=torch.int64), codes.flatten(1)[:, :-1] + 1), 1)
    at = torch.arange(20)
    x = prior.tokens.weight[tokens] + prior.rows.weight[at // 5] + prior.columns.weight[at % 5]
    x = block.norm(x)
    q, k, v = (part.view(3, 20, 4, 4).transpose(1, 2) for part in (x @ block.qkv.weight.T).chunk(3, 2))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    seen = (scores.softmax(3) @ v).transpose(1, 2).reshape(3, 20, 16)
    wanted = prior.logits(prior.norm(x + (seen @ block.dense.weight.T + block.dense.bias).relu()))
    close(prior(codes), wanted.view(3, *GRID, CODES))
    full = PixelAttention(64, (32, 32))
    parts = 65 * 256 + 2 * 32 * 256 + 4 * (3 * 256**2 + 256**2 + 256 + 512) + 512 + 64 * 257
    assert sum(p.numel() for p in full.parameters()) == parts


def test_gated_convolutions_are_masked_ones() -> None:
    """The first two layers, by full kernels whose later half is zero."""
    prior = built("convolutions", layers=2, num_classes=CLASSES, kernel=3).double()
    codes = example()
    above = left = one_hot(codes, CODES).double().movedim(3, 1)
    above = left = torch.einsum("bkhw,kc->bchw", left, prior.codes.weight)
    for layer in prior.layers:
        first = layer.first
        down, right = torch.zeros(16, 8, 3, 3).double(), torch.zeros(16, 8, 1, 3).double()
        down[:, :, : 2 - first] = layer.vertical.weight
        right[:, :, :, : 2 - first] = layer.horizontal.weight
        bias = layer.classes.weight[LABELS][:, :, None, None]
        v = torch.conv2d(above, down, layer.vertical.bias, padding=(1, 1))
        h = torch.conv2d(left, right, layer.horizontal.bias, padding=(0, 1)) + layer.link(v) + bias[:, 16:]
        v = v + bias[:, :16]
        above = v[:, :8].tanh() * v[:, 8:].sigmoid()
        left = layer.out(h[:, :8].tanh() * h[:, 8:].sigmoid()) + (0 if first else left)
    close(prior(codes, LABELS), prior.logits(left).movedim(1, 3))


@kinds
def test_compiled_whole(kind: str) -> None:
    torch.compiler.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    prior = built(kind, num_classes=CLASSES)
    eager = copy.deepcopy(prior)
    fast: Any = torch.compile(prior, backend=counter, fullgraph=True)
    for step in range(2):
        found, wanted = fast(example(step=step), LABELS), eager(example(step=step), LABELS)
        close(found, wanted)
        weight = torch.linspace(-1, 1, found.numel()).view(found.shape)
        close(
            *(torch.autograd.grad((x * weight).sum(), [*m.parameters()]) for x, m in ((found, prior), (wanted, eager)))
        )
    fast.eval()
    close(fast(example(), LABELS), eager.eval()(example(), LABELS))
    assert counter.frame_count == 2
    torch.compiler.reset()


@kinds
def test_half_precision(kind: str) -> None:
    """By autocast, with a loss near that of float32 and samples; and by a cast."""
    prior = built(kind, num_classes=CLASSES)
    wanted = loss(prior)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(prior)
        assert prior.sample(2, 1).shape == (2, *GRID)
        assert prior.sample(2, 1, cached=False).shape == (2, *GRID)
    close(found, wanted, rtol=0.02, atol=0)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())
    assert prior.bfloat16().sample(2, 1).shape == (2, *GRID)


@kinds
@labelled
def test_resumes_to_the_bit_from_a_plain_checkpoint(kind: str, num_classes: int | None) -> None:
    def steps(prior: Any, optimizer: Any, *numbers: int) -> None:
        for step in numbers:
            optimizer.zero_grad()
            loss(prior, step).backward()
            optimizer.step()

    prior = built(kind, num_classes=num_classes)
    optimizer = torch.optim.Adam(prior.parameters(), 0.01)
    steps(prior, optimizer, 0, 1)
    file = io.BytesIO()
    torch.save({"model": prior.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(prior, optimizer, 2, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(x, Tensor) for x in saved["model"].values())
    again = built(kind, num_classes=num_classes)
    for p in again.parameters():
        torch.nn.init.zeros_(p)
    again.load_state_dict(saved["model"])
    other = torch.optim.Adam(again.parameters(), 0.01)
    other.load_state_dict(saved["optimizer"])
    steps(again, other, 2, 3)
    close(again.state_dict(), prior.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("attention", {"heads": 2}), ("attention", {"grid": (5, 4)}), ("attention", {"num_classes": 2}),
        ("attention", {"layers": 3}), ("convolutions", {"grid": (5, 4)}), ("convolutions", {"kernel": 3}),
    ],
)  # fmt: skip
def test_refuses_a_checkpoint_of_another_configuration(kind: str, options: Any) -> None:
    """Also where every shape fits; without its configuration a prior by convolutions takes a state of any grid."""
    with pytest.raises(
        ValueError, match=r"the state is of a Pixel\w+ with .*, this one has .*; build it as that one was"
    ):
        built(kind, **options).load_state_dict(built(kind).state_dict())
    if "grid" in options and kind == "convolutions":
        prior = built(kind, **options)
        state = built(kind).state_dict()
        del state["configuration"]
        prior.load_state_dict(state, strict=False)
        assert prior.state_dict()["configuration"].tolist()[2:4] == [5, 4]


@kinds
def test_what_is_refused(kind: str) -> None:
    plain, prior, codes = built(kind), built(kind, num_classes=CLASSES), example()
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: plain(codes + 1), ValueError, r"codes must be from 0 to 10, got 1 to 11; an autoencoder must have"),
        (lambda: plain(codes - 1), ValueError, "codes must be from 0 to 10, got -1 to 9"),
        (lambda: plain(codes.float()), TypeError, r"codes must be .* got torch.float32; codes.long\(\) is one"),
        (lambda: plain(codes[:, :3]), ValueError, r"codes must have shape \(B, rows=4, columns=5\), got \(3, 3, 5\)"),
        (lambda: plain(codes[0]), ValueError, r"got \(4, 5\); a prior is built for one grid"),
        (lambda: plain(codes, LABELS), ValueError, "labels must be None for a prior without classes; build it with"),
        (lambda: plain.sample(3, 1), ValueError, "labels must be None for a prior without classes"),
        (lambda: prior(codes), ValueError, "labels must be given, from 0 to 2, for a prior with num_classes, got None"),
        (lambda: prior.sample(3), ValueError, "labels must be given, from 0 to 2"),
        (lambda: prior(codes, LABELS + 1), ValueError, "labels must be from 0 to 2, got 1 to 3; build the prior with"),
        (lambda: prior.sample(3, 3), ValueError, "labels must be from 0 to 2, got 3 to 3"),
        (lambda: prior(codes, LABELS[:2]), ValueError, r"labels must have shape \(3,\), one a grid, got \(2,\)"),
        (lambda: prior(codes, LABELS.float()), TypeError, "labels must be a tensor .* got torch.float32"),
        (lambda: plain.sample(0), ValueError, "n must be at least 1, got 0"),
        (lambda: plain.sample(1, temperature=-1.0), ValueError, r"from 0 \(greedy\), got -1"),
        (lambda: plain.sample(1, temperature=float("nan")), ValueError, "temperature must be a finite .* got nan"),
        (lambda: plain.sample(1, top_k=-1), ValueError, r"top_k must be a whole number from 0 \(all codes\), got -1"),
        (lambda: plain.sample(1, top_k=1.5), ValueError, r"top_k must be a whole number .* got 1\.5"),
        (lambda: plain.sample(1, top_p=1.1), ValueError, r"top_p must be from 0 to 1 \(all codes\), got 1\.1"),
        (lambda: built(kind, grid=5), ValueError, r"grid must be \(rows, columns\), got 5"),
        (lambda: built(kind, grid=(4, 0)), ValueError, "columns must be at least 1, got 0"),
        (lambda: built(kind, num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: built(kind, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1"),
        (lambda: built(kind, layers=0), ValueError, "layers must be at least 1, got 0"),
        (lambda: built("attention", heads=3), ValueError, "heads must divide width, got 3 and 16"),
        (lambda: built("convolutions", kernel=4), ValueError, "kernel must be odd and at least 3, got 4"),
    ]  # fmt: skip
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()


def test_progress_shows_where_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar on a terminal, after two seconds; steps without one where tqdm is missing."""
    tqdm, seen = pytest.importorskip("tqdm", reason="bars are tqdm's: pip install tqdm"), {}
    monkeypatch.setattr(tqdm, "tqdm", lambda steps, **options: seen.update(options) or steps)
    assert list(_sampling.progress(3)) == [0, 1, 2]
    assert (seen["delay"], seen["disable"]) == (2, None)
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert list(_sampling.progress(3)) == [0, 1, 2]


@kinds
def test_a_prior_that_does_not_fit(kind: str) -> None:
    model = VQVAE(width=8, num_codes=11, levels=2)
    built(kind, grid=(4, 6)).check(model, (32, 48))
    built(kind, grid=(8, 12)).check(model, (32, 48), level=1)
    with pytest.raises(ValueError, match="as many codes as the autoencoder, got 10 and 11; build it with the latter"):
        built(kind, num_codes=10, grid=(4, 6)).check(model, (32, 48))
    with pytest.raises(ValueError, match=r"grid must be the one that images of 32 x 48 have, \(4, 6\), got \(6, 4\)"):
        built(kind, grid=(6, 4)).check(model, (32, 48))
    with pytest.raises(ValueError, match="got an autoencoder with heads=2"):
        built(kind, grid=(4, 6)).check(VQVAE(width=8, num_codes=11, quantizer={"heads": 2}), (32, 48))
    with pytest.raises(ValueError, match="multiples of 8"):
        built(kind, grid=(4, 6)).check(model, (36, 48))


@pytest.mark.parametrize("kind", [PixelCNN, PixelAttention])
def test_words_of_errors(kind: Any) -> None:
    prior = kind(16, (2, 3), width=8, layers=1, num_classes=4)
    another: Any = PixelCNN if kind is PixelAttention else PixelAttention
    other = another(16, (2, 3), width=8, layers=1, num_classes=4)
    assert prior.sample(2, numpy.int64(3)).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=f"another kind of model, this one is a {kind.__name__}"):
        prior.load_state_dict(other.state_dict())
    codes = torch.zeros(2, 2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="got -1 to -1; they count from 0"):
        prior(codes, torch.full((2,), -1))
    with pytest.raises(ValueError, match="it marks vectors that were not finite"):
        prior(codes - 1, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="got tuple; of two levels take one"):
        prior((codes, codes), torch.zeros(2, dtype=torch.int64))
    own = VQVAE(width=8, num_codes=16, blocks=1)
    with pytest.raises(ValueError, match=r"level must be from 0 \(top\) to 0, got 1"):
        prior.check(own, (8, 12), 1)
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        prior.check(own, 8)
    torch.nn.init.constant_([*prior.parameters()][-1], float("nan"))
    for rules in ({"temperature": 0}, {"top_k": 1}, {}):
        with pytest.raises(ValueError, match="logits at row 0, column 0 are NaN: it has diverged"):
            prior.sample(2, 0, **rules)
