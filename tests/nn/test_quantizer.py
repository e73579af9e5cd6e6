"""The quantiser as a layer: what it returns, how its codebook learns, and that nothing disturbs it."""

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize, one_hot
from torch.testing import assert_close as close
from torch.utils.checkpoint import checkpoint

import pyseq
from pyseq import nn, ops
from pyseq.nn import _codebook

ROOM = "codebook"
DIM, CODES = 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"decay": 0.5, "gamma": 2.0, "dead_code_threshold": 0.9},
    "gradient": {"decay": None, "beta": 0.5, "loss_reduction": "vector"},
    "plain gradient": {"decay": None, "dead_code_threshold": 0, "estimator": "rotation"},
    "cosine": {"metric": "cosine", "decay": 0.8},
    "cosine gradient": {"metric": "cosine", "decay": None, "loss_reduction": "sum", "heads": 2},
    "heads": {"heads": 2, "channel_dim": 1, "estimator": "rotation"},
    "projected": {"heads": 2, "codebook_dim": 3, "channel_dim": -2},
    "projected gradient": {"codebook_dim": 9, "decay": None},
    "k-means": {"kmeans_init": True, "heads": 4, "decay": 0.5, "accumulation_steps": 2, "dead_code_threshold": 0.9},
    "accumulated gradient": {"accumulation_steps": 3, "decay": None, "kmeans_init": True, "metric": "cosine"},
}
STATE = ("codebook", "ema_counts", "ema_sums", "pending_counts", "pending_sums")
exactly = partial(close, rtol=0, atol=0)
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def built(dim: int = DIM, num_codes: int = CODES, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.VectorQuantizer(dim, num_codes, **options)


def example(step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Input (6, 8, 8), which is of size 8 along every channel_dim above, and a mask."""
    generator = torch.Generator().manual_seed(step)
    mask = torch.rand(6, DIM, generator=generator) < 0.7
    return torch.randn(6, DIM, DIM, generator=generator).to(dtype).requires_grad_(), mask


def put(quantizer: Any, codes: Tensor) -> None:
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
        quantizer._start(_codebook.Averages(codes, torch.ones(codes.shape[:2]), codes))


def steps(quantizer: Any, *numbers: int) -> Any:
    for step in numbers:
        quantizer(*example(step))
    return quantizer


def state(module: Any, *without: str) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items() if name not in without}


def backward(out: Any, *inputs: Tensor) -> Any:
    weight = torch.linspace(-1, 1, out.quantized.numel()).view(out.quantized.shape)
    return torch.autograd.grad((out.quantized * weight).sum() + 3 * out.loss, inputs)


@every
def test_what_is_returned_is_the_op_before_the_update(options: Any) -> None:
    """Values and gradients, in training and eval; and what the layer says of usage is that of its indices."""
    quantizer, (x, mask) = steps(built(**options), 1), example()
    given: Any = {k: options[k] for k in ("metric", "beta", "gamma", "estimator", "loss_reduction") if k in options}
    given |= {} if isinstance(quantizer.codebook, torch.nn.Parameter) else {"beta": 0.0}
    for training in (True, False):
        quantizer.train(training)
        codes = quantizer.codebook.detach().clone().requires_grad_()
        inner = quantizer.project_in(x.movedim(quantizer.channel_dim, -1))
        op = ops.quantize(inner.view(6, DIM, *codes.shape[::2]), codes, mask=mask, **given)
        wanted = torch.where(mask.unsqueeze(2), quantizer.project_out(op.quantized.flatten(2)), 0.0)
        wanted = wanted.movedim(-1, quantizer.channel_dim)
        inputs = [p for p in quantizer.parameters() if p is not quantizer.codebook]
        grads = backward(
            op._replace(quantized=wanted), x, *inputs, *([] if "beta" in given and not given["beta"] else [codes])
        )
        out = quantizer(x, mask)
        assert isinstance(out, nn.VectorQuantizerOutput)
        exactly(out.indices, op.indices)
        (close if "codebook_dim" in options else exactly)((out.quantized, out.loss), (wanted, op.loss))
        share = op.counts / op.counts.sum(1, keepdim=True)
        each = torch.special.entr(share).sum(1).exp()
        close((out.perplexity, out.usage), (each.mean(), (share > 0).float().mean()))
        close(backward(out, x, *inputs, *(p for p in quantizer.parameters() if p is quantizer.codebook)), grads)


@every
def test_codes_to_vectors_is_quantized(options: Any) -> None:
    quantizer = steps(built(**options), *range(5)).eval()
    out, heads = quantizer(*example(9)), quantizer.heads
    exactly(quantizer.codes_to_vectors(out.indices), out.quantized)
    exactly(quantizer.codes_to_vectors(out.indices.int()), out.quantized)
    vectors = quantizer.codes_to_vectors(torch.full((2, 3, heads), -1)).movedim(quantizer.channel_dim, -1)
    exactly(vectors, torch.zeros(2, 3, DIM))
    assert vectors.requires_grad == any(True for _ in quantizer.parameters())
    for bad in (-2, CODES):
        with pytest.raises(ValueError, match=f"indices must be -1, or from 0 to 15, got {bad}"):
            quantizer.codes_to_vectors(torch.full((1, heads), bad))
    for wrong, message in (
        (torch.zeros(3, 9).long(), "must have shape"),
        (torch.zeros(3, heads), "must be a tensor of"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"indices {message} .* got .*(3, 9|float32)"):
            quantizer.codes_to_vectors(wrong)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_moving_averages_by_hand(metric: Any, parts: int) -> None:
    """In float64. Averages start with each code counted once, so that the first step leaves unused codes alone; and
    nothing moves before the last of accumulated forwards."""
    quantizer = built(metric=metric, decay=0.9, dead_code_threshold=0, accumulation_steps=parts).double()
    first = quantizer.codebook[0].clone()
    n, m = torch.ones(CODES, dtype=torch.float64), first.clone()
    for step in range(4):
        x, mask = example(step, torch.float64)
        rows, codes = x.detach()[mask], quantizer.codebook[0].clone()
        rows = normalize(rows) if metric == "cosine" else rows
        hot = one_hot(torch.cdist(rows, codes).argmin(1), CODES).double()
        n, m = 0.9 * n + 0.1 * hot.sum(0), 0.9 * m + 0.1 * hot.T @ rows
        smooth = n.sum() * (n + 1e-5) / (n.sum() + CODES * 1e-5)
        for part in zip(x.chunk(parts), mask.chunk(parts), strict=True):
            exactly(quantizer.codebook[0], codes)
            quantizer(*part)
        found = quantizer.codebook[0], quantizer.ema_counts[0], quantizer.ema_sums[0]
        wanted = m / smooth[:, None] if metric == "l2" else normalize(m)
        close(found, (wanted, n, m), rtol=1e-12, atol=1e-12)
        if step == 0:
            unused = hot.sum(0) == 0
            assert 0 < unused.sum() < CODES
            close(quantizer.codebook[0][unused], first[unused], rtol=1e-4, atol=0)
    assert quantizer.steps == 4 * parts
    assert parts == 1 or quantizer.pending_counts.sum() == quantizer.pending_sums.abs().sum() == 0


def test_unused_codes_do_not_drift() -> None:
    """Smoothing would carry them to the origin within 1500 steps; one that is used again follows at once."""
    quantizer = built(dim=2, num_codes=4, dead_code_threshold=0)
    codes, rows = torch.tensor([[[0.0, 0.0], [5.0, 5.0], [-7.0, 3.0], [4.0, -9.0]]]), torch.randn(40, 2) / 10
    put(quantizer, codes)
    for _ in range(2000):
        quantizer(rows)
    close(quantizer.codebook[:, 1:], codes[:, 1:], rtol=0.02, atol=0)
    quantizer(torch.tensor([[5.5, 5.5]] * 20))
    close(quantizer.codebook[0, 1], torch.tensor([5.5, 5.5]), rtol=1e-4, atol=0)


REVIVED: list[tuple[dict[str, Any], int]] = [
    ({}, CODES), ({"heads": 2}, 20), ({"decay": None}, 200), ({"metric": "cosine"}, CODES), ({"codebook_dim": 3}, 50)
]  # fmt: skip


@pytest.mark.parametrize(("options", "count"), REVIVED, ids=str)
def test_dead_codes_become_rows_and_stay(options: Any, count: int) -> None:
    """Collapse is provoked: all codes but one are far. They all become valid rows of one batch, no two the same, and
    are used from then on; with a threshold of 0 they stay where they are."""
    quantizer, after = built(**{"decay": 0.9, **options}), 0
    far = torch.full_like(quantizer.codebook, -50.0)
    far[:, 0] = 2.0
    maybe_unit = partial(normalize, dim=2) if "metric" in options else lambda x: x
    put(quantizer, maybe_unit(far))
    alone = copy.deepcopy(quantizer)
    alone.dead_code_threshold = 0
    while after < 10 and quantizer.steps < 100:
        x, mask = torch.randn(count + 2, DIM) + 2, torch.arange(count + 2) != 3
        x[1], x[3] = torch.nan, 1e6
        quantizer(x, mask)
        alone(x, mask)
        codes = quantizer.codebook[:, 1:]
        gone = ((codes - maybe_unit(far)[:, 1:]).abs() > 0.1).any(2)
        if gone.any() and not after:
            rows = quantizer.project_in(x[mask & x.isfinite().all(1)]).view(count, quantizer.heads, -1)
            same = (codes.unsqueeze(2) - maybe_unit(rows.transpose(0, 1)).unsqueeze(1)).abs().amax(3) < 1e-6
            assert same.any(2).all()
            assert all(len(chosen.unique()) == CODES - 1 for chosen in same.int().argmax(2))
            assert (quantizer.ema_counts[:, 1:] > 0.3 * quantizer.ema_counts.mean(1, keepdim=True)).all()
            if quantizer.ema_sums is not None:
                close(quantizer.ema_sums[:, 1:], quantizer.ema_counts[:, 1:].unsqueeze(2) * codes)
        after += bool(gone.any())
        assert (codes[gone].abs() < 10).all()
    assert (after, bool(gone.all())) == (10, True)
    x = torch.randn(1000, DIM) + 2
    assert quantizer.eval()(x).usage > 0.8
    assert alone.eval()(x).usage == 1 / CODES


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_k_means_is_lloyd_from_rows(metric: Any) -> None:
    """Ten rounds by hand from the same start give the same codes; the first output is by them."""
    quantizer = built(kmeans_init=True, metric=metric, dead_code_threshold=0)
    rows = torch.randn(300, DIM) + 4 * torch.randn(CODES, DIM).repeat(20, 1)[:300]
    rows = normalize(rows) if metric == "cosine" else rows
    everywhere = torch.ones(300, 1, dtype=torch.bool)
    starts = [_codebook.draw(rows.unsqueeze(1), everywhere, CODES, torch.tensor(step))[0] for step in range(30)]
    start, places = starts[0], [int((rows == each[0, 0]).all(1).nonzero()) for each in starts]
    assert max(places) - min(places) > 200  # a code is not bound to a part of the batch
    assert (rows.unsqueeze(1) == start).all(2).any(0).all()
    codes, inertia = start[0], []
    for _ in range(10):
        distance, nearest = torch.cdist(rows, codes).min(1)
        inertia.append(distance.square().sum().item())
        means = [rows[nearest == k].mean(0) if (nearest == k).any() else codes[k] for k in range(CODES)]
        codes = normalize(torch.stack(means)) if metric == "cosine" else torch.stack(means)
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[-1] < 0.9 * inertia[0]
    found = quantizer(rows)
    close(found.quantized, codes[found.indices[:, 0]], rtol=1e-4, atol=1e-5)
    assert quantizer.initialized
    close(quantizer.ema_counts[0], nearest.bincount(minlength=CODES).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"decay": None}, {"heads": 2}], ids=str)
@pytest.mark.parametrize("rows", [1, 5, CODES])
def test_k_means_of_few_rows(rows: int, options: Any) -> None:
    """Each row has a code, and each code is by a row, apart from the others; before, random codes serve in eval."""
    quantizer, x = built(kmeans_init=True, dead_code_threshold=0, **options), torch.randn(rows, DIM) * 3
    before = state(quantizer)
    assert quantizer.eval()(x).usage > 0
    assert (quantizer.codebook != 0).any(2).all()
    exactly(state(quantizer), before)
    quantizer.train()(x)
    given = x.view(rows, quantizer.heads, -1).transpose(0, 1)
    given = normalize(given, dim=2) if "metric" in options else given
    distance = torch.cdist(quantizer.codebook.detach(), given)
    assert max(distance.amin(2).max(), distance.amin(1).max()) < 0.05
    assert all(len(codes.unique(dim=0)) == CODES for codes in quantizer.codebook.detach())


@every
def test_rows_that_are_masked_or_not_finite(options: Any) -> None:
    """Whatever they hold, outputs, gradients and state are those of the batch without them. Those that are not masked
    are counted, in training alone."""
    options = {k: v for k, v in options.items() if k not in ("channel_dim", "heads")}
    hostile, masked, packed = (built(**options) for _ in range(3))
    for step, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x, mask = example(step)
        rows = mask.nonzero()[[0, 5]].unbind(1)
        without = mask.clone()
        without[rows] = False
        y = torch.where(mask.unsqueeze(2), x, torch.tensor([1e30, torch.nan, torch.inf, -5.0]).repeat(2)).detach()
        y[rows[0], rows[1], step] = bad
        y.requires_grad_()
        found, wanted, part = hostile(y, mask), masked(x, without), packed(x.detach()[without])
        exactly(found, wanted)
        exactly((found.quantized[without], found.indices[without]), part[:2])
        close(found[2:], part[2:])
        assert ((found.indices[~without] == -1) & (found.quantized[~without] == 0).all(1, keepdim=True)).all()
        grads = [backward(o, i, *m.parameters()) for o, i, m in ((found, y, hostile), (wanted, x, masked))]
        exactly(*grads)
        assert (grads[0][0][~without] == 0).all()
        exactly(state(hostile, "quarantined"), state(masked, "quarantined"))
        close(state(packed), state(masked))
    hostile.eval()(y, mask)
    assert (hostile.quarantined, masked.quarantined) == (6, 0)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"decay": 0.0}], ids=[*OPTIONS, "no memory"])
def test_padding_alone_and_no_rows(options: Any) -> None:
    """Loss and gradients are 0, and the codebook stays."""
    quantizer = steps(built(**options), *range(6))
    before = quantizer.codebook.detach().clone()
    for size in (6, 0):
        x = torch.randn(size, DIM, DIM, requires_grad=True)
        out = quantizer(x, torch.zeros(size, DIM, dtype=torch.bool))
        assert (out.loss, out.usage, out.perplexity) == (0, 0, 1)
        assert (out.indices == -1).all()
        assert (out.quantized == 0).all()
        assert (torch.autograd.grad(out.loss + out.quantized.sum(), x)[0] == 0).all()
    close(quantizer.codebook.detach(), before, rtol=1e-3, atol=1e-6)
    assert all(x.isfinite().all() for x in state(steps(quantizer, 7)).values())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(options: Any, dtype: torch.dtype) -> None:
    """Half inputs give the state that float32 inputs of these values give; casts and autocast leave it float32."""
    model, wanted = built(**options), built(**options)
    for step in range(3 if "codebook_dim" not in options else 0):
        x, mask = example(step, dtype)
        out, right = model(x, mask), wanted(x.float(), mask)
        exactly(out, right._replace(quantized=right.quantized.to(dtype)))
        exactly(state(model), state(wanted))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.autocast("cpu", torch.bfloat16):
        model(*example(5))
    out = model.to(dtype)(*example(6, dtype))
    assert out.quantized.dtype == dtype
    kept = [x for name in STATE if (x := getattr(model, name)) is not None]
    assert {y.dtype for x in kept for y in (x, x.grad) if y is not None} == {torch.float32}
    out = model.eval()(*example(1, dtype))
    exactly(model.codes_to_vectors(out.indices).to(dtype), out.quantized)


def test_float64_rows_beside_a_float32_codebook() -> None:
    first, second = steps(built(), 0), built()
    second(*example(0, torch.float64))
    exactly(state(second), state(first))


def test_hooks_see_both_methods() -> None:
    quantizer, seen = built(), []
    quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    quantizer.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    out = quantizer(*example())
    quantizer.codes_to_vectors(out.indices)
    assert seen == [(6, 8, 8), nn.VectorQuantizerOutput, (6, 8, 1), Tensor]
    quantizer.register_forward_hook(lambda module, args, output: "changed")
    assert quantizer.codes_to_vectors(out.indices) == "changed"


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(options: Any, reentrant: bool) -> None:
    """One update a step, and the gradients of training without it."""
    layers = built(**options), built(**options)
    for step in range(4):
        grads = []
        for layer in layers:
            x, mask = example(step)

            def call(x: Tensor, mask: Tensor, layer: Any = layer) -> tuple[Tensor, ...]:
                return tuple(layer(x * 1.0, mask))

            out: Any = call(x, mask) if layer is layers[0] else checkpoint(call, x, mask, use_reentrant=reentrant)
            layer.zero_grad()
            (out[0].square().sum() + 3 * out[2]).backward()
            grads.append([g for g in (x.grad, *(p.grad for p in layer.parameters())) if g is not None])
        exactly(*grads)
        exactly(state(layers[1]), state(layers[0]))


@pytest.mark.parametrize("options", [{}, {"decay": None}, {"kmeans_init": True, "accumulation_steps": 2}], ids=str)
def test_backward_twice_and_no_graph_kept(options: Any) -> None:
    """After the update, too; no tensor outlives a step."""
    quantizer, counts = built(**options), []
    x, mask = example()
    out = quantizer(x, mask)
    total = out.quantized.square().sum() + out.loss
    once = torch.autograd.grad(total, x, retain_graph=True)
    exactly(torch.autograd.grad(total, x), once)
    saved = [weakref.ref(x), weakref.ref(out.quantized)]
    del out, total, x
    assert [ref() for ref in saved] == [None, None]
    for step in range(100):
        quantizer(*example(step))
        if step in (20, 99):
            gc.collect()
            counts.append(sum(type(o) is Tensor for o in gc.get_objects()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("reduction", ["mean", "vector", "sum"])
def test_losses_by_hand_and_a_codebook_trained_by_sgd(reduction: Any) -> None:
    """beta moves codes alone, gamma vectors alone."""
    quantizer, last = built(decay=None, beta=0.7, gamma=0.3, loss_reduction=reduction), torch.inf
    optimizer, (x, mask) = torch.optim.SGD([quantizer.codebook], lr=0.01), example()
    rows = x.detach()[mask]
    size = {"mean": rows.numel(), "vector": len(rows), "sum": 1}[reduction]
    for _ in range(5):
        x.grad = quantizer.codebook.grad = None
        codes, (_, indices, loss, *_) = quantizer.codebook[0].detach().clone(), quantizer(x, mask)
        loss.backward()
        hot = one_hot(indices[mask][:, 0], CODES).float()
        apart = (rows - hot @ codes) / size
        close((loss, x.grad[mask]), (apart.square().sum() * size, 0.6 * apart))  # type: ignore[index]
        close(quantizer.codebook.grad[0], -1.4 * hot.T @ apart)
        optimizer.step()
        close(quantizer.codebook[0].detach(), codes + 0.014 * hot.T @ apart)
        assert loss < last
        last = loss.item()


def test_shapes_of_any_rank() -> None:
    """(B, C, H, W) with channel_dim=1 is the permuted input with channel_dim=-1; a lone vector is one, too."""
    for options in ({}, {"heads": 2, "codebook_dim": 3}):
        images, last = built(channel_dim=1, **options), built(**options)
        x, mask = torch.randn(2, DIM, 3, 5), torch.rand(2, 3, 5) < 0.5
        one, other = images(x, mask), last(x.permute(0, 2, 3, 1), mask)
        assert one.quantized.shape == x.shape
        close(one._replace(quantized=one.quantized.permute(0, 2, 3, 1)), other)
        exactly(state(images), state(last))
        lone = last(torch.randn(DIM))
        assert (lone.quantized.shape, lone.indices.shape) == ((DIM,), (last.heads,))


CURVES: list[dict[str, Any]] = [{"decay": 0.9, "kmeans_init": True}, {"decay": None, "loss_reduction": "vector"}]


@pytest.mark.parametrize("options", CURVES, ids=str)
def test_an_autoencoder_learns_a_mixture(options: Any) -> None:
    """Its loss falls far below the variance, on the same curve with and without kernels."""
    curves = torch.zeros(2, 120)
    for backend, curve in zip(("auto", "reference"), curves, strict=True):
        torch.manual_seed(0)
        centers = 2 * torch.randn(8, 12)
        model = torch.nn.ModuleList([torch.nn.Linear(12, DIM), built(**options), torch.nn.Linear(DIM, 12)])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        with pyseq.use_backend(backend):  # type: ignore[arg-type]
            for step in range(120):
                x = centers[torch.randint(8, (64,))] + 0.1 * torch.randn(64, 12)
                out = model[1](model[0](x))
                loss = (model[2](out.quantized) - x).square().mean() + out.loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve[step] = loss.detach()
    close(curves[0, :60], curves[1, :60], rtol=1e-3, atol=0)
    end = curves[:, -10:].mean(1)
    close(end[0], end[1], rtol=0.1, atol=0)
    assert end[0] < 0.25 * curves[0, 0]


@every
@pytest.mark.parametrize("before", [0, 3])
def test_saved_copied_and_resumed(options: Any, before: int) -> None:
    """A loaded layer in eval is the saved one, before and after initialisation, and training goes on to the bit."""
    quantizer, file = steps(built(**options), *range(before)), io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded, emptied = nn.VectorQuantizer(DIM, CODES, **options), built(**options).to("meta").to_empty(device="cpu")
    with torch.device("meta"):
        assigned = nn.VectorQuantizer(DIM, CODES, **options)
    for other in (loaded, emptied, assigned):
        other.load_state_dict(saved, assign=other is assigned)
    copies = [loaded, emptied, assigned, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))]
    wanted = quantizer.eval()(*example(7))
    steps(quantizer.train(), *range(before, before + 3))
    for other in copies:
        exactly(other.eval()(*example(7)), wanted)
        exactly(state(steps(other.train(), *range(before, before + 3))), state(quantizer))


@every
def test_eval_and_frozen_change_nothing(options: Any) -> None:
    quantizer = steps(built(**options), 0, 1)
    before, trained = state(quantizer), copy.deepcopy(quantizer)(*example(2))
    exactly(state(steps(quantizer.eval(), 2, 3)), before)
    assert quantizer.train().freeze() is quantizer
    exactly(quantizer(*example(2)).indices, trained.indices)
    assert not quantizer.codebook.requires_grad
    exactly(state(quantizer), before)
    assert steps(quantizer.freeze(False), 2).steps == 3
    assert quantizer.codebook.requires_grad == isinstance(quantizer.codebook, torch.nn.Parameter)


@pytest.mark.parametrize("name", ["k-means", "projected gradient"])
def test_compiled_whole(name: str) -> None:
    """In one graph, in training and eval; k-means costs one more, the first batch's."""
    torch.compiler.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    quantizer, eager = built(**OPTIONS[name]), built(**OPTIONS[name])
    fast: Any = torch.compile(quantizer, backend=counter, fullgraph=True)
    for step in range(5):
        (x, mask), (y, _) = example(step), example(step)
        found, wanted = fast(x, mask), eager(y, mask)
        close(found, wanted)
        close(backward(found, x, *quantizer.parameters()), backward(wanted, y, *eager.parameters()))
    assert counter.frame_count == 1 + (name == "k-means")
    close(state(quantizer), state(eager))
    fast.eval()
    found = fast(x, mask)
    close(found, eager.eval()(x, mask))
    vectors = torch.compile(quantizer.codes_to_vectors, backend="aot_eager", fullgraph=True)
    close(vectors(found.indices), found.quantized)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dim": 0}, "dim must be at least 1, got 0"), ({"codebook_dim": 0}, "codebook_dim must be at least 1, got 0"),
    ({"heads": 3}, "heads must divide dim, got 3 and 8"), ({"accumulation_steps": 0}, "must be at least 1, got 0"),
    ({"decay": float("nan")}, r"decay must be in \[0, 1\), got nan"), ({"metric": "dot"}, "'cosine', got 'dot'"),
    ({"dead_code_threshold": 1}, r"dead_code_threshold must be in \[0, 1\), got 1"),
    ({"beta": 2.0}, r"beta weighs a term that moving averages do without: got 2\.0 and decay=0\.99"),
    ({"beta": -1.0, "decay": None}, "beta must be a finite number from 0, got -1"),
    ({"gamma": float("inf")}, "gamma must be a finite number from 0, got inf"),
    ({"estimator": "gumbel"}, "'rotation', got 'gumbel'"), ({"loss_reduction": "none"}, "'sum', got 'none'"),
    ({"dim": 8.0}, r"dim must be a whole number, got 8\.0"), ({"num_codes": True}, "must be a whole number, got True"),
    ({"channel_dim": 1.5}, "as an integer"),
]  # fmt: skip
X = torch.ones(6, DIM)
REFUSED: list[tuple[tuple[Any, ...], str]] = [
    ((X[:, :7],), r"x must be of size dim=8 along channel_dim=-1, got \(6, 7\)"), ((X[0, 0],), r"dim=8 .* got \(\)"),
    ((X, X > 0), r"mask must have the shape \(6,\) .* got \(6, 8\)"), (([1.0],), "x must be a tensor, got list"),
    ((X.long(),), "x must be of dtype .*32, .* got torch.int64"), ((X, [True]), "mask must be a tensor, got list"),
    ((X, X[:, 0]), "mask must be of dtype torch.bool, got torch.float32"),
]  # fmt: skip


def test_what_is_refused() -> None:
    """A layer, and a batch, before anything changes."""
    for options, message in WRONG:
        with pytest.raises(TypeError if re.search("whole|integer", message) else ValueError, match=message):
            built(**options)
    for quantizer in (built(), built(kmeans_init=True)):
        before = state(quantizer)
        for given, message in REFUSED:
            with pytest.raises(TypeError if re.search("tensor|dtype", message) else ValueError, match=message):
                quantizer(*given)
        exactly(state(quantizer), before)
    with pytest.raises(ValueError, match="compute must be 'quantize' or 'codes_to_vectors', got 'encode'"):
        quantizer(X, compute="encode")


def test_how_codes_begin() -> None:
    """Uniform in [-1/K, 1/K], or on the sphere; each counted once; and so again."""
    quantizer = built(64, 100)
    assert quantizer.codebook.abs().max() <= 0.01
    assert quantizer.codebook.std() == pytest.approx(0.01 / 3**0.5, rel=0.03)
    close(built(64, 9, metric="cosine").codebook.norm(dim=2), torch.ones(1, 9))
    exactly((quantizer.ema_sums, quantizer.ema_counts), (quantizer.codebook, torch.ones(1, 100)))
    again = steps(built(**OPTIONS["k-means"]), 0)
    torch.manual_seed(0)
    again.reset_parameters()
    exactly(state(steps(again, 0)), state(steps(built(**OPTIONS["k-means"]), 0)))


def test_two_processes(on_two: Callable[[str], None]) -> None:
    """DDP and FSDP2 over two gloo processes are one process with the joined batch, by one all_reduce a step."""
    on_two("quantizer_on_two.py")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{"metric": "cosine"}, {"metric": "cosine", "heads": 2}, {}], ids=str)
def test_compiled_gradients_are_of_the_codes_before_the_update(options: Any) -> None:
    torch.compiler.reset()
    eager = built(decay=0.5, estimator="rotation", gamma=10.0, **options)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    x, weight, grads = torch.randn(64, DIM), torch.randn(64, DIM), []
    for quantizer in (eager, compiled):
        rows = x.clone().requires_grad_()
        out = quantizer(rows)
        ((out.quantized * weight).sum() + out.loss).backward()
        grads.append(rows.grad)
    torch.testing.assert_close(*grads)
    torch.compiler.reset()


def test_exports_alone_and_with_any_number_of_rows() -> None:
    quantizer = built(heads=2).eval()
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=100)}}
    program = torch.export.export(quantizer, (torch.randn(5, DIM),), dynamic_shapes=shapes).module()
    x = torch.randn(33, DIM)
    assert torch.equal(program(x)[0], quantizer(x).quantized)


def test_weights_averaged_with_buffers() -> None:
    """As AveragedModel does, and DDP: buffers alone come, and k-means does not begin again."""
    quantizer = built(kmeans_init=True)
    averaged = torch.optim.swa_utils.AveragedModel(quantizer, use_buffers=True)
    for _ in range(3):
        quantizer(torch.randn(50, DIM))
        averaged.update_parameters(quantizer)
    found: Any = averaged.module.train()
    before = found.codebook.clone()
    found(torch.randn(50, DIM))
    assert (found.codebook - before).abs().max() < 1


def test_vectors_are_of_the_dtype_that_the_module_was_cast_to() -> None:
    for options in ({}, {"codebook_dim": 3}):
        quantizer = built(**options).eval()
        indices = torch.zeros(4, 1, dtype=torch.int64)
        assert quantizer.codes_to_vectors(indices).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            quantizer.to(dtype).to("cpu")
            quantizer.load_state_dict(quantizer.state_dict())
            assert quantizer.codes_to_vectors(indices).dtype == dtype


def test_k_means_waits_for_a_row() -> None:
    quantizer = built(kmeans_init=True, dead_code_threshold=0)
    quantizer(torch.randn(9, DIM), torch.zeros(9, dtype=torch.bool))
    quantizer(torch.randn(0, DIM))
    assert not quantizer.initialized
    x = 5 + torch.randn(200, DIM)
    quantizer(x)
    assert quantizer.initialized
    assert quantizer.eval()(x).usage == 1
