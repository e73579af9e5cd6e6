"""One suite for every backend of the quantiser, of its statistics, and of functions with another one's gradient."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from pyseq import ops
from pyseq.ops._backend import BACKENDS, settings
from pyseq.testing import codebook as room
from pyseq.testing import guarded, pairwise, script
from pyseq.testing.codebook import WORDS, check_quantize, check_statistics, chosen, compiled, leaves, search, total

on_every = pytest.mark.parametrize("backend", BACKENDS)
on_words = pytest.mark.parametrize("words", WORDS, ids=lambda words: "-".join(words.values()))
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning"),  # NumPy's, below the interpreter
    pytest.mark.filterwarnings("ignore:.*(torch.jit|should not be instantiated):DeprecationWarning"),  # torch's own
]


@pytest.mark.parametrize(("size", "dtype"), pairwise([*room.SIZES, (3000, 1, 3, 2)], room.DTYPES), ids=str)
def test_statistics(size: tuple[int, int, int, int], dtype: torch.dtype, target: Any) -> None:
    """Of any codes, and where all rows have one: then several chunks make its sum, a full one and one less, too."""
    target.spare(math.prod(size), 3000)
    check_statistics(chosen(*size, dtype), size[2], target.backend, target.device)
    for n in (3000, 512, 1023) if size[0] == 3000 else (1025,) if size[0] == 1 else ():
        check_statistics(chosen(n, *size[1:], dtype, only=size[2] // 2), size[2], target.backend, target.device)


def test_statistics_of_any_layout(target: Any) -> None:
    """And of rows that are not finite, which stay with their code."""
    x, indices = (t.to(target.device) for t in chosen(12, 2, 4, 3))
    right = ops.code_statistics(x, indices, 4, heads=True, backend=target.backend)
    twisted = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    sliced = torch.stack([x, x * torch.nan], 3)[..., 0].view(3, 4, 2, 3)
    for rows, at in ((twisted, indices.int()), (sliced, indices.view(3, 4, 2))):
        found = ops.code_statistics(rows, at, 4, heads=True, backend=target.backend)
        assert all(map(torch.equal, found, right))
    one = ops.code_statistics(x[:, 1].requires_grad_(), indices[:, 1], 4, backend=target.backend)
    assert all(torch.equal(a, b[1]) and not a.requires_grad for a, b in zip(one, right, strict=True))
    assert ops.code_statistics(x[0, 0], indices[0, 0], 4, backend=target.backend)[0].shape == (4,)
    spoilt, at, sums = x[:, 0].clone(), indices[:, 0].clone(), []
    spoilt[3], at[3], at[4] = torch.nan, -1, 2
    for spoilt[4, 1] in (0.0, torch.inf):
        sums.append(ops.code_statistics(spoilt, at, 4, backend=target.backend)[1])
    sums[0][2, 1] = torch.inf
    assert torch.equal(*sums)


def test_threads_and_runs_change_no_bit() -> None:
    """Of sums, also in a collapsed codebook, and of the quantiser's results and gradients."""
    before, found = torch.get_num_threads(), list[list[Tensor]]()
    rows, codes = (x.requires_grad_() for x in search("apart", 3000, 2, 40, 24)[:2])  # type: ignore[union-attr]
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        found.append([])
        for x, indices in (chosen(3000, 2, 9, 24), chosen(3000, 1, 9, 24, only=4)):
            found[-1] += ops.code_statistics(x, indices, 9, heads=True, backend="cpp")
        for words in WORDS:
            out = ops.quantize(rows, codes, **words, backend="cpp")
            found[-1] += [*out, *torch.autograd.grad(total(out), [rows, codes])]
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@on_every
def test_indices_out_of_range(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They raise in eager mode; a graph leaves them out, unless PYSEQ_CHECK is 1."""
    run = lambda x, at: ops.code_statistics(x, at, 4, backend=backend)  # noqa: E731
    x, bad = torch.ones(5, 2), (-2, 4, 1 << 40)
    for each in bad:
        with pytest.raises(ValueError, match=f"indices must be -1, or from 0 to 3, got {each}"):
            run(x[:3], torch.tensor([1, each, 3]))
    counts, sums = compiled(run)(x, indices := torch.tensor([1, *bad, 3]))
    assert (counts.tolist(), sums.tolist()) == ([0, 1, 0, 1], [[0, 0], [1, 1], [0, 0], [1, 1]])
    monkeypatch.setattr(settings, "check", True)
    with pytest.raises(ValueError, match="indices must be -1, or from 0 to 3, got -2"):
        (run if backend == "reference" else compiled(run))(x, indices)  # a graph has the reference step by step


@on_words
@pytest.mark.parametrize(("case", "dtype"), pairwise(room.CASES, room.DTYPES), ids=str)
def test_quantize(case: tuple[str, tuple[int, int, int, int]], dtype: torch.dtype, words: Any, target: Any) -> None:
    """Codes, loss, statistics and gradients against float64; the choice is nearest_code's."""
    target.spare(math.prod(case[1]), 500)
    given = search(case[0], *case[1], dtype, seed=case[1][0])
    indices = check_quantize(given, target.backend, target.device, **words)
    if words["metric"] == "l2":
        args: list[Any] = [t if t is None else t.to(target.device) for t in given]
        assert torch.equal(indices, ops.nearest_code(*args[:2], mask=args[2], backend=target.backend)[0])


@pytest.mark.parametrize("reduction", ["mean", "vector", "sum"])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.0, 1.0), (0.5, 3.0)])
def test_weights_of_the_loss(beta: float, gamma: float, reduction: str, target: Any) -> None:
    """beta alone moves codes, gamma alone rows; the other's gradient is zero."""
    words: Any = {"beta": beta, "gamma": gamma, "loss_reduction": reduction}
    check_quantize(search("holes", 6, 2, 4, 3), target.backend, target.device, **words)
    given = leaves(6, 4, 3, device=target.device)
    of_x, of_codes = torch.autograd.grad(ops.quantize(*given, **words, backend=target.backend).loss, given)
    assert (bool(of_x.any()), bool(of_codes.any())) == (gamma > 0, beta > 0)


@pytest.mark.parametrize("dtype", room.DTYPES, ids=str)
def test_the_code_itself_bit_for_bit(dtype: torch.dtype, target: Any) -> None:
    """Where x + (code - x) is something else."""
    codes = search("apart", 1, 1, 7, 4, dtype).codebook[0].to(target.device)
    x = (100 + search("apart", 20, 1, 1, 4).x[:, 0]).to(dtype).to(target.device).requires_grad_()
    for words in WORDS[:2]:
        out = ops.quantize(x, codes, **words, backend=target.backend)
        assert torch.equal(out.quantized, code := codes[out.indices].to(dtype))
        assert not torch.equal(x + (code - x), code)


@on_words
def test_rows_that_are_not_finite_touch_nothing_else(words: Any, target: Any) -> None:
    """The others have the bits of a run without them; so has a run where they are masked, and one of nothing else."""
    x, codes = leaves(9, 5, 3, torch.float32, target.device)
    keep = torch.arange(9, device=x.device) != 4

    def step(rows: Tensor, mask: Tensor | None = None) -> tuple[Any, ...]:
        rows = rows.detach().clone().requires_grad_()
        out = ops.quantize(rows, codes, mask=mask, **words, backend=target.backend)
        return out, *torch.autograd.grad([out.quantized.sum(), out.loss], [rows, codes])

    right, of_x, of_codes = step(x[keep])
    for bad in (torch.nan, torch.inf, -torch.inf, 0.5):
        spoilt = x.detach().index_fill(0, torch.tensor(4, device=x.device), bad)
        out, found, of_book = step(spoilt, keep if bad == 0.5 else None)
        assert (out.indices[4], out.quantized[4].any(), found[4].any()) == (-1, False, False)
        got = out.quantized[keep], out.indices[keep], found[keep], out.counts, out.perplexity, of_book
        assert all(map(torch.equal, got, (*right[:2], of_x, *right[3:], of_codes)))
        assert out.loss.item() == pytest.approx(right.loss.item(), rel=2e-7)
    out, *grads = step(x, torch.zeros_like(keep))
    assert (out.indices.tolist(), out.loss.item(), out.perplexity.item()) == ([-1] * 9, 0, 1)
    assert not any(t.any() for t in (out.quantized, out.counts, *grads))


@on_words
def test_rows_at_their_code_at_zero_and_opposite(words: Any, target: Any) -> None:
    """Gradients are finite, of second order too; what cannot be rotated is passed straight through."""
    codes = torch.tensor([[3.0, 4.0]], device=target.device, requires_grad=True)
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]], device=target.device, requires_grad=True)
    out = ops.quantize(rows, codes, **words, backend=target.backend)
    assert out.indices.tolist() == [0, 0, 0]
    up, across = codes.detach().new_tensor([[1.0, 2.0]]), codes.detach().new_tensor([[-0.32, 0.24]])
    grad = torch.autograd.grad(out.quantized, rows, up.expand(3, 2), retain_graph=True)
    right = torch.cat([across / 5, across * 0, across / 10] if words["metric"] == "cosine" else [up] * 3)
    torch.testing.assert_close(grad[0], right, rtol=1e-5, atol=1e-6)
    first = torch.autograd.grad(total(out), [rows, codes], create_graph=True)
    second = torch.autograd.grad(torch.cat(first).square().sum(), [rows, codes])
    assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("factor", [1e25, 1e-25])
@on_every
def test_a_cosine_is_of_directions(factor: float, backend: Any) -> None:
    """The choice is that of nearest_code also where the square of a length leaves the format."""
    given = (given := search("apart", 9, 1, 7, 5))._replace(x=given.x * factor)
    room.near_enough(given, "cosine", ops.quantize(*given[:2], metric="cosine", backend=backend).indices)


def test_heads_counts_and_perplexity(target: Any) -> None:
    """Heads are quantisers of their own, of any leading dimensions and layout."""
    x, codes = (t.to(target.device) for t in search("apart", 6, 2, 5, 3)[:2])  # type: ignore[union-attr]
    mask = torch.arange(6, device=target.device) != 2
    words: Any = {"loss_reduction": "sum", "backend": target.backend}
    out, sums = ops.quantize(x, codes, mask=mask, **words), [0.0, 0.0]
    assert [t.shape for t in out] == [(6, 2, 3), (6, 2), (), (2, 5), ()]
    twisted = x.view(2, 3, 2, 3).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    again = ops.quantize(twisted, codes, mask=mask.view(2, 3), **words)
    assert all(torch.equal(a.view(b.shape), b) for a, b in zip(again, out, strict=True))
    for h in range(2):
        one = ops.quantize(x[:, h], codes[h], mask=mask, **words)
        assert all(map(torch.equal, (*one[:2], one.counts), (out.quantized[:, h], out.indices[:, h], out.counts[h])))
        shares = [one.indices.tolist().count(k) / 5 for k in range(5)]
        sums[0] += math.exp(-sum(p * math.log(p) for p in shares if p)) / 2
        sums[1] += one.loss.item()
    assert [out.perplexity.item(), out.loss.item()] == pytest.approx(sums)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@on_every
def test_second_derivatives(metric: Any, backend: Any) -> None:
    """Of each argument against differences; of both as the reference has them, to which sg(..) is a constant."""
    x, codes = given = leaves(4, 3, 2)
    words: Any = {"metric": metric, "backend": backend}
    assert torch.autograd.gradgradcheck(lambda t: ops.quantize(t, codes.detach(), **words).loss, x)
    assert torch.autograd.gradgradcheck(lambda t: ops.quantize(x.detach(), t, **words).loss, codes)
    for words["estimator"], wanted in itertools.product(("straight_through", "rotation"), ((0, 1), (0,), (1,))):
        found, inputs = [], [given[i] for i in wanted]
        for words["backend"] in (backend, "reference"):
            args: Any = (t if i in wanted else t.detach() for i, t in enumerate(given))
            first = torch.autograd.grad(total(ops.quantize(*args, **words)), inputs, create_graph=True)
            found.append([*first, *torch.autograd.grad(torch.cat(first).square().sum(), inputs)])
        torch.testing.assert_close(*found)


def test_who_gets_a_gradient(target: Any) -> None:
    """The decoder's never reaches the codebook; nobody who wants none; the same from a graph that was kept."""
    x, codes = leaves(4, 3, 2, device=target.device)
    for rows, again in itertools.product((x, x.detach()), (False, True)):
        out = ops.quantize(rows, codes, backend=target.backend)
        loss = out.quantized.sum() + 0 * codes.sum()
        assert not torch.autograd.grad(loss, codes, create_graph=again)[0].any()
    for args in ([x.detach(), codes.detach()], [x, codes]):
        with torch.set_grad_enabled(args[0] is not x):
            assert not any(t.requires_grad for t in ops.quantize(*args, backend=target.backend))
    out = ops.quantize(x, codes, backend=target.backend)
    assert [t.requires_grad for t in out] == [True, False, True, False, False]
    first = torch.autograd.grad(total(out), [x, codes], retain_graph=True)
    right = [g.clone() for g in first]
    assert not any(g.zero_().any() for g in first)
    assert all(map(torch.equal, torch.autograd.grad(total(out), [x, codes]), right))


def test_memory_law() -> None:
    """Forward and backward stay far below N x K floats, 256 MB here: at most sixteen times the arguments."""
    grown = script("from pyseq.testing.codebook import *; print(growth_of_a_step(('numba', 'cpp'), 16384, 4096, 16))")
    assert int(grown) < 16 * 4 * 16 * (16384 + 4096)


@pytest.mark.levels
@on_words
def test_guard_bands(words: Any, target: Any) -> None:
    if target.backend == "reference":
        pytest.skip("has no launcher")
    sizes = [(3, 2, 5, 3)] if target.interpreted else [(3, 2, 5, 3), (97, 1, 70, 17), (13, 3, 33, 1)]
    for size, dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        with guarded("codebook", target.backend) as count:
            check_quantize(search("holes", *size, dtype), target.backend, target.device, **words)
            check_statistics(chosen(*size, dtype), size[2], target.backend, target.device)
        assert next(count) == 5  # search, counts, pull, sums; statistics by themselves


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_opcheck(backend: str) -> None:
    for overload, args in room.raw_calls(backend):
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compile_and_export(backend: str) -> None:
    """Training in one graph has the bits of eager training; a program that was exported its numbers."""
    x = torch.randn(2, 3, 4)
    for words in WORDS[::3] if backend == "cpp" else WORDS[-1:]:
        right = (module := room.Encoder(**words, backend=backend)).step(x)
        assert all(map(torch.equal, module.step(x, compiled(module.forward)), right))
        if backend != "triton":
            program: Any = torch.export.export(module, (x,)).module()
            found = [loss := program(x), *torch.autograd.grad(loss, list(program.parameters()))]
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@on_words
@on_every
def test_every_mode(words: Any, backend: str) -> None:
    """Activation checkpointing, offloading, inference mode, autocast."""
    module, x = room.Encoder(**words, backend=backend), torch.randn(4, 4)
    right = module.step(x)
    again = module.step(x, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        offloaded = module.step(x)
    with torch.inference_mode():
        assert torch.equal(module(x), right[0])
    assert all(map(torch.equal, again + offloaded, right * 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = x @ module.weight
        out = ops.quantize(rows, module.codes, **module.words)
    assert (out.quantized.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
    assert all(map(torch.equal, out, ops.quantize(rows, module.codes, **module.words)))
    assert all(g.any() for g in torch.autograd.grad(out.loss, list(module.parameters())))


@on_every
def test_transforms_that_are_not_served_raise(backend: Any) -> None:
    x, codes, at = torch.randn(2, 4, 3), torch.randn(5, 3), torch.zeros(4, dtype=torch.int64)
    calls: list[Any] = [lambda x: ops.quantize(x, codes, backend=backend).loss]
    calls.append(lambda x: ops.code_statistics(x, at, 5, backend=backend)[1])
    for transform, call in itertools.product((torch.vmap, torch.func.grad), calls):
        with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
            transform(call)(x if transform is torch.vmap else x[0])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        calls[0](torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


X, C, I = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
Q, S, TWO = ops.quantize, ops.code_statistics, ops.straight_through(torch.sum, torch.relu)
BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (S, (X, None, 5), {}, TypeError, "indices must be a tensor, got NoneType"),
    (S, (X, I, True), {}, ValueError, "num_codes must be a whole number from 1, got True"),
    (S, (X, I[:2], 5), {}, ValueError, r"x must have shape \(..., width\) and indices .*, got \(3, 4\) and \(2,\)"),
    (S, (X[0], I[0], 5), {"heads": True}, ValueError, r"x must have shape \(..., heads, width\) .* \(4,\) and \(\)"),
    (S, (X, I.float(), 5), {}, TypeError, r"indices must be of dtype torch\.int64 or .*, got torch\.float32"),
    (S, (X, I.to("meta"), 5), {}, ValueError, "indices is on meta but x is on cpu; move one of them"),
    (Q, (X, C[:, :3]), {}, ValueError, r"x must have shape \(..., 3\) beside a codebook of \(5, 3\), got \(3, 4\)"),
    (Q, (X, C), {"estimator": "ste"}, ValueError, "estimator must be 'straight_through' or 'rotation', got 'ste'"),
    (Q, (X, C), {"loss_reduction": "none"}, ValueError, "loss_reduction must be 'mean' or 'vector' or 'sum', got"),
    (Q, (X, C), {"beta": -1.0}, ValueError, r"beta must be a finite number from 0, got -1\.0"),
    (TWO, (X,), {}, ValueError, r"forward_fn and backward_fn must return one shape, got \(\) and \(3, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    op, args, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        op(*args, **options)


@pytest.mark.parametrize("forward", [torch.round, torch.sign, lambda x: x, torch.Tensor.bfloat16])
def test_straight_through(forward: Any) -> None:
    """The value of one, bit for bit and in memory of its own; first and second derivatives of the other."""
    x = torch.tensor([-1.5, 0.4, 100.25], dtype=torch.float64, requires_grad=True)
    proxy = lambda x, *, by: torch.tanh(x * by) ** 2  # noqa: E731
    both = ops.straight_through(lambda x, *, by: forward(x), proxy)
    value, right = both(x, by=0.3), proxy(x, by=0.3)
    assert torch.equal(value, forward(x))
    assert value.data_ptr() != x.data_ptr()
    slopes = [torch.autograd.grad(out.sum(), x, create_graph=True)[0] for out in (value, right)]
    slopes += torch.autograd.grad(compiled(both)(x, by=0.3).sum(), x)
    torch.testing.assert_close([slopes[0], slopes[2]], [slopes[1]] * 2)
    torch.testing.assert_close(*(torch.autograd.grad(slope.sum(), x) for slope in slopes[:2]))
    assert not both(x.detach(), by=0.3).requires_grad
