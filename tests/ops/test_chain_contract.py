"""The chain room's contract beside its numbers: registration, compile, export, errors, memory, processes, threads."""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from pyseq import ops
from pyseq.kernels.chain import NLL, PARTITION, SCORE
from pyseq.ops._backend import BACKENDS, settings
from pyseq.testing import assert_within, script, unit
from pyseq.testing.chain import Chain, chain, exact, mixed

CPU = ("reference", "numba", "cpp")
on_cpu = pytest.mark.parametrize("backend", CPU)
on_every = pytest.mark.parametrize("backend", BACKENDS)
# torch's own warning, about itself, whenever dynamo traces an autograd.Function
quiet_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.usefixtures("poison")
def test_uninitialised_memory_is_poisoned() -> None:
    like = torch.zeros(3)
    for fresh in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("op", [ops.crf_log_partition, ops.crf_score, ops.crf_nll, ops.crf_marginals])
@on_every
def test_gradcheck(op: Callable[..., Any], backend: str) -> None:
    small = backend == "triton"
    if small and op is not ops.crf_nll:
        pytest.skip("the interpreter takes too long")
    problem = chain(2, 2, 2, torch.float64) if small else chain(2, 4, 3, torch.float64, "holes")

    def value(*scores: Tensor) -> Tensor:
        emissions, transitions, start, end = scores
        moved = problem.replace(emissions=emissions, transitions=transitions, start=start, end=end)
        return moved(op, backend)  # type: ignore[no-any-return]

    scores = problem.leaves().scores()
    assert torch.autograd.gradcheck(value, scores, fast_mode=small)
    if op is not ops.crf_score and not small:  # a score is linear
        assert torch.autograd.gradgradcheck(value, scores)


@pytest.mark.parametrize("weight", [1.0, 0.5, math.inf])
@pytest.mark.parametrize(("backend", "reduction"), [*itertools.product(CPU, ("sum", "mean")), ("triton", "mean")])
def test_reduction(backend: str, reduction: Any, weight: float) -> None:
    """The numbers of reducing afterwards, value, gradient and second derivative; also of a forbidden path, and of
    sequences that different kernels and tiers serve."""
    small = backend == "triton"
    problem = chain(3, 3, 3, torch.float64, "holes") if small else chain(5, 4, 3, torch.float64, "holes")
    problem.emissions[1, problem.mask[1].int().argmax()] = -math.inf

    def loss(leaves: Chain, fused: bool) -> Tensor:
        args = (leaves.emissions, leaves.transitions, leaves.tags, leaves.start, leaves.end, leaves.mask)
        if fused:
            return weight * ops.crf_nll(*args, reduction=reduction, backend=backend)  # type: ignore[arg-type]
        return weight * getattr(ops.crf_nll(*args, backend=backend), reduction)()  # type: ignore[arg-type, no-any-return]

    for case in (problem,) if small else (problem, mixed(), chain(19, 6, 40)):
        again = case is problem and not small and math.isfinite(weight)
        found = []
        for fused in (True, False):
            leaves = case.leaves()
            value = loss(leaves, fused)
            assert value.shape == ()
            grads = torch.autograd.grad(value, leaves.scores(), create_graph=again)
            found.append([value, *grads])
            if again:
                squares = torch.stack([(g * g).sum() for g in grads]).sum()
                found[-1] += torch.autograd.grad(squares, leaves.scores())
        torch.testing.assert_close(*found, equal_nan=True)


@on_cpu
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_gradients_survive_a_retained_graph(weight: float, backend: str) -> None:
    """What a caller does to a gradient in place shows in no later backward."""
    leaves = chain(3, 4, 5).leaves()
    loss = weight * leaves(ops.crf_nll, backend).sum()
    first = [x.clone() for x in torch.autograd.grad(loss, leaves.scores(), retain_graph=True)]
    for x in torch.autograd.grad(loss, leaves.scores(), retain_graph=True):
        x.zero_()
    loss.backward(retain_graph=True)
    for x in leaves.scores():
        x.grad.zero_()  # type: ignore[union-attr]
    loss.backward()
    assert all(torch.equal(x.grad, right) for x, right in zip(leaves.scores(), first, strict=True))  # type: ignore[arg-type]


def raw_arguments(kind: str) -> tuple[Any, ...]:
    """Emissions to lengths."""
    live = {"mask": "holes", "lengths": "lengths"}.get(kind, "all")
    problem = chain(*((0, 3, 4) if kind == "no rows" else (2, 0, 4) if kind == "no steps" else (3, 5, 4)), live=live)
    if kind == "permuted":
        problem = problem.replace(emissions=problem.emissions.transpose(0, 1).contiguous().transpose(0, 1))
    if kind == "half":
        problem = problem.replace(emissions=problem.emissions.bfloat16())
    if kind == "double":
        problem = problem.double()
    if kind == "bare":
        problem = problem.replace(start=None, end=None)
    return tuple(vars(problem).values())


RAW = ("plain", "bare", "mask", "lengths", "permuted", "half", "double", "no rows", "no steps")
OFTEN = {("plain", "cpp"), ("half", "cpp"), ("permuted", "auto"), ("mask", "numba"), ("no rows", "cpp")}


def opcheck(call: Any, args: Any, compiled: bool) -> None:
    """Schema, fake, registered autograd; where `compiled`, which takes seconds, dynamic tracing."""
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(call.default, tuple(args), test_utils=every if compiled else every[:3])


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow)
        for case in itertools.product(RAW, ("cpp", "numba", "auto"))
    ],
)
def test_opcheck(kind: str, backend: str) -> None:
    """With scores that require grad; where there is a mask, of every raw op and kind."""
    raw, (*scores, tags, mask, lengths) = torch.ops.pyseq, raw_arguments(kind)
    leaves = [x if x is None else x.detach().requires_grad_() for x in scores]
    mean = "mean" if len(scores[0]) else "sum"  # of no rows NaN, which opcheck takes for a difference
    opcheck(raw.crf_value_and_grad, (*leaves, tags, mask, lengths, None, NLL, mean, True, backend), kind == "plain")
    if kind == "mask":
        weights = torch.randn(len(scores[0])).to(scores[1].dtype)
        for call, *args in (
            (raw.crf_value, *leaves, tags, mask, lengths, None, NLL, "mean", True, backend),
            (raw.crf_value, *scores, None, mask, lengths, None, PARTITION, "none", False, backend),
            (raw.crf_value_and_grad, *leaves, tags, mask, lengths, weights, NLL, "none", True, backend),
            (raw.crf_value_and_grad, *scores, tags, mask, lengths, None, SCORE, "none", True, backend),
            (raw.viterbi, *scores, None, mask, lengths, None, True, backend),
        ):
            opcheck(call, args, call is raw.viterbi)


@quiet_dynamo
@pytest.mark.parametrize(
    ("backend", "reduction"), [*((b, "sum") for b in BACKENDS), ("numba", "mean"), ("cpp", "mean")]
)
def test_compile(backend: str, reduction: str) -> None:
    """One graph, forward and backward, the bits of eager; a new T or B compiles nothing."""
    torch.compiler.reset()
    counter = CompileCounter()

    def loss(emissions: Tensor, transitions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        return ops.crf_nll(emissions, transitions, tags, mask=mask, reduction=reduction, backend=backend)  # type: ignore[arg-type]

    def decode(emissions: Tensor, transitions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ops.viterbi(emissions, transitions, mask=mask, backend=backend)  # type: ignore[arg-type]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    decoded = torch.compile(decode, fullgraph=True, backend=counter)
    sizes = [(2, 3)] if backend in ("triton", "reference") else [(3, 5), (3, 6), (4, 7)]
    for batch, steps in sizes:
        problem = chain(batch, steps, 4, live="holes", seed=steps)
        eager, leaves = problem.leaves(), problem.leaves()
        for x in (leaves.emissions, leaves.tags, leaves.mask):
            if backend != "reference":
                torch._dynamo.mark_dynamic(x, (0, 1))
        rest = (leaves.transitions, leaves.tags, leaves.mask)
        got = torch.autograd.grad(compiled(leaves.emissions, *rest), leaves.scores()[:2])
        right = torch.autograd.grad(loss(eager.emissions, eager.transitions, *rest[1:]), eager.scores()[:2])
        assert all(map(torch.equal, got, right))
        with torch.no_grad():
            found = decoded(leaves.emissions, leaves.transitions, leaves.mask)
            assert all(map(torch.equal, found, decode(eager.emissions, eager.transitions, leaves.mask)))
    assert counter.frame_count == 1


@quiet_dynamo
@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_compiled_marginals_and_their_gradient(backend: Any) -> None:
    torch.compiler.reset()
    scores = chain(3, 4, 3).leaves().scores()
    compiled = torch.compile(ops.crf_marginals, fullgraph=True, backend="aot_eager")
    got, right = (op(*scores, backend=backend) for op in (compiled, ops.crf_marginals))
    assert torch.equal(got, right)
    grads, expected = (torch.autograd.grad(x, scores, torch.ones(3, 4, 3).tril()) for x in (got, right))
    for x, y in zip(grads, expected, strict=True):
        assert_within("gradient", x, y.double().numpy(), 8 * unit(torch.float32) * float(y.abs().max()))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_scores_round_no_gradient_of_the_parameters(dtype: torch.dtype, backend: str) -> None:
    """The weights of marginals are float32, whatever the scores are."""
    half = chain(2, 8, 5, dtype, seed=3)
    single = half.single()
    weights = torch.randn(2, 8, 5)
    found, right = (
        torch.autograd.grad((leaves(ops.crf_marginals, backend) * weights).sum(), leaves.scores()[1:])
        for leaves in (half.leaves(), single.leaves())
    )
    for got, wanted in zip(found, right, strict=True):
        assert_within("gradient", got, wanted.double().numpy(), 16 * unit(torch.float32) * float(wanted.abs().max()))


@on_cpu
def test_marginals_and_loss_in_every_mode(backend: str) -> None:
    """Under saved-tensor hooks (activation checkpointing, offloading), in inference mode, and without steps."""
    problem = chain(2, 3, 3)
    right = problem(ops.crf_marginals, backend)
    with torch.inference_mode():
        lasting = problem.emissions.clone()
        assert torch.equal(problem(ops.crf_marginals, backend), right)
        raw = torch.ops.pyseq.crf_value_and_grad(*problem.inputs(False), PARTITION, "none", False, backend)
        assert torch.equal(raw[1], right)  # as a graph has it
    assert torch.equal(problem.replace(emissions=lasting)(ops.crf_marginals, backend), right)

    def penalty(emissions: Tensor) -> Tensor:
        here = problem.replace(emissions=emissions)
        marginals = here(ops.crf_marginals, backend)
        (slope,) = torch.autograd.grad(marginals.square().sum(), emissions, create_graph=True)
        total: Tensor = here(ops.crf_nll, backend).sum() + marginals.square().sum() + slope.square().sum()
        return total

    leaf = problem.emissions.clone().requires_grad_()
    (plain,) = torch.autograd.grad(penalty(leaf), leaf)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(penalty, leaf, use_reentrant=False), leaf)
    with torch.autograd.graph.save_on_cpu():
        (offloaded,) = torch.autograd.grad(penalty(leaf), leaf)
    assert torch.equal(again, plain)
    assert torch.equal(offloaded, plain)
    empty = chain(2, 0, 3).leaves()
    empty(ops.crf_marginals, backend).sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in empty.scores())


@quiet_dynamo
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "numba", "cpp"])
def test_bad_values_under_compile_make_their_sequence_nan(backend: str) -> None:
    torch.compiler.reset()
    problem = chain(5, 5, 4, seed=3).replace(lengths=torch.tensor([5, 5, 3, -2, 9]))
    tags = problem.tags.clone()
    tags[1, 4], tags[2, 3] = -100, 99  # the second is at an absent step
    bad, sound = torch.tensor([False, True, False, True, True]), torch.tensor([0, 2])

    def both(emissions: Tensor, tags: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        nll = ops.crf_nll(emissions, problem.transitions, tags, lengths=lengths, backend=backend)  # type: ignore[arg-type]
        score = ops.crf_score(emissions, problem.transitions, tags, lengths=lengths, backend=backend)  # type: ignore[arg-type]
        with torch.no_grad():
            best = ops.viterbi(emissions, problem.transitions, lengths=lengths, backend=backend)  # type: ignore[arg-type]
        return nll, score, *best

    leaf, other = (problem.emissions.clone().requires_grad_() for _ in range(2))
    nll, score, best, path = torch.compile(both, fullgraph=True, backend="aot_eager")(leaf, tags, problem.lengths)
    assert nll.isnan().tolist() == score.isnan().tolist() == bad.tolist()
    assert best.isnan().tolist() == [False, False, False, True, True]
    assert (path[3:] == -1).all()
    right = both(other[sound], problem.tags[sound], problem.lengths[sound])
    for got, expected in zip((nll, score, best, path), right, strict=True):
        assert torch.equal(got[sound], expected)
    for got, expected in ((nll, right[0]), (score, right[1])):
        (grad,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
        (same,) = torch.autograd.grad(expected.sum(), other, retain_graph=True)
        assert torch.equal(grad[sound], same[sound])
        assert grad[1].isnan().all()


@quiet_dynamo
def test_bad_values_raise_under_compile_when_checks_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "check", True)
    torch.compiler.reset()
    compiled = torch.compile(ops.crf_nll, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"tags must lie in \[0, 4\) at live steps, got 9 for sequence 1, step 2"):
        compiled(torch.zeros(2, 3, 4), torch.zeros(4, 4), torch.tensor([[0, 0, 0], [0, 0, 9]]))
    torch.compiler.reset()


class Tagger(nn.Module):
    """An encoder, and by `task` the mean loss, the losses, marginals or the best path."""

    def __init__(self, task: str, backend: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.transitions = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.task, self.backend = task, backend

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> Any:
        chain = self.encoder(x), self.transitions
        if self.task == "viterbi":
            return ops.viterbi(*chain, mask=mask, backend=self.backend)
        if self.task == "marginals":
            return ops.crf_marginals(*chain, mask=mask, backend=self.backend).square().sum()
        reduction: Any = "mean" if self.task == "mean" else "none"
        losses = ops.crf_nll(*chain, tags, mask=mask, reduction=reduction, backend=self.backend)
        return losses if self.task == "mean" else (losses * torch.arange(1.0, 1 + len(losses))).sum()

    def derivatives(self, loss: Tensor) -> list[Tensor]:
        """First and second."""
        first = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        total = torch.stack([(x * x).sum() for x in first]).sum()
        return [*first, *torch.autograd.grad(total, list(self.parameters()))]


def example(batch: int = 3, time: int = 5, live: str = "holes") -> tuple[Tensor, Tensor, Tensor]:
    problem = chain(batch, time, 4, live=live)
    return problem.emissions, problem.tags, problem.mask


@pytest.mark.parametrize("backend", [*CPU, "auto"])
def test_export(backend: str) -> None:
    module = Tagger("viterbi", backend)
    dynamic = backend != "reference"  # whose loop over time is unrolled
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=64)}
    program = torch.export.export(module, example(), dynamic_shapes=(sizes,) * 3 if dynamic else None)
    for again in (example(), example(5, 9, "left")) if dynamic else (example(),):
        assert all(map(torch.equal, program.module()(*again), module(*again)))


@pytest.mark.parametrize(
    ("task", "strict", "backend"),
    [("mean", False, "auto"), ("each", True, "auto"), ("marginals", False, "numba"), ("marginals", True, "auto")],
)
def test_exported_training(task: str, strict: bool, backend: str) -> None:
    """The gradients of eager training, of the encoder too, and their gradients."""
    module = Tagger(task, backend)
    program = torch.export.export(module, example(), strict=strict).module()
    both = program, module
    once = [torch.autograd.grad(model(*example()), list(module.parameters())) for model in both]
    assert all(map(torch.allclose, *once))  # other routes than with create_graph
    found, right = (module.derivatives(model(*example())) for model in both)
    for got, wanted in zip(found, right, strict=True):
        largest = float(wanted.detach().abs().max())
        assert largest > 0
        assert_within("derivative", got, wanted.detach().double().numpy(), 8 * unit(torch.float32) * largest)


def test_pipelined_training() -> None:
    """torch.distributed.pipelining cuts an exported model: the stages' gradients are those of the whole."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    whole = Tagger("mean", "auto")
    pipe = pipeline(whole, example(), split_spec={"encoder": SplitPoint.END})
    right = torch.autograd.grad(whole(*example()), list(whole.parameters()))
    stages = [pipe.get_stage_module(i) for i in range(2)]
    x, tags, mask = example()
    stages[1](stages[0](x), tags, mask).backward()
    found = [x.grad for stage in stages for x in stage.parameters()]
    for grad in right:
        assert any(other is not None and torch.equal(grad, other) for other in found)


def test_an_exported_graph_takes_the_backend_of_where_it_runs(tmp_path: Any) -> None:
    """What was made beside the extension serves without it, without Numba, and as `use_backend` says."""
    made, where = {}, str(tmp_path)
    for task in ("each", "viterbi"):
        module = Tagger(task, "auto")
        torch.export.save(torch.export.export(module, example()), f"{where}/{task}.pt2")
        made[task] = module(*example())
    torch.save(
        [example(), {k: v[1] if isinstance(v, tuple) else v.detach() for k, v in made.items()}], f"{where}/made.pt"
    )
    for missing, served in (((), "cpp numba reference"), (("pyseq._C", "numba"), "reference")):
        out = script(
            f"""
import sys, warnings
for name in {missing!r}:
    sys.modules[name] = None
warnings.simplefilter("ignore")
import torch, pyseq
from pyseq import ops
inputs, right = torch.load({where!r} + "/made.pt")
for wanted in ("auto", "numba", "reference")[: 1 if {missing!r} else 3]:
    pyseq.use_backend(wanted)
    for task, value in right.items():
        module = torch.export.load({where!r} + f"/{{task}}.pt2").module()
        found = module(*inputs)
        if task == "viterbi":
            assert torch.equal(found[1], value)
            continue
        torch.testing.assert_close(found, value)
        found.backward()
        assert all(x.grad.abs().max() > 0 for x in module.parameters())
        if task == "each":  # in backward, too, the backend is that of the moment
            with pyseq.use_backend("reference"):
                module(*inputs).backward()
    print(pyseq.explain(ops.crf_nll, inputs[0]).chosen, end=" ")
"""
        )
        assert out.strip() == served


@on_every
def test_autocast(backend: str) -> None:
    """Half scores from a layer meet float32 parameters; nothing else changes."""
    linear, problem = nn.Linear(4, 4), chain(2, 3, 4, live="lengths")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        emissions = linear(problem.emissions)
        value = problem.replace(emissions=emissions)(ops.crf_nll, backend)
        grads = torch.autograd.grad(value.sum(), linear.weight, retain_graph=True)
        score, _ = problem.replace(emissions=emissions)(ops.viterbi, backend)
    assert (emissions.dtype, value.dtype, score.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    plain = problem.replace(emissions=emissions)(ops.crf_nll, backend)
    assert torch.equal(plain, value)
    assert torch.equal(torch.autograd.grad(plain.sum(), linear.weight)[0], grads[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # forward mode's own imports
@on_cpu
def test_transforms_that_are_not_served_raise(backend: Any) -> None:
    emissions, transitions = torch.randn(3, 2, 4, 5), torch.randn(5, 5)
    for op in (ops.crf_log_partition, ops.crf_marginals, ops.viterbi):
        call: Any = functools.partial(op, transitions=transitions, backend=backend)
        for grad in (False, True):
            with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
                torch.vmap(call)(emissions.clone().requires_grad_(grad and op is not ops.viterbi))
        if op is not ops.viterbi:
            with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
                torch.func.grad(lambda x: call(x).sum())(emissions[0])  # noqa: B023 (called here)
    if backend == "reference":
        return  # plain torch, which serves the rest
    problem = chain(3, 2, 4).leaves()
    for differentiable in (ops.crf_nll, ops.crf_marginals):
        value = problem(differentiable, backend)
        with pytest.raises(RuntimeError, match="batched gradients"):
            torch.autograd.grad(value, problem.emissions, torch.stack([value.detach()] * 2), is_grads_batched=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.emissions.detach(), torch.ones_like(problem.emissions))
        for unary in (ops.crf_log_partition, ops.viterbi):
            with pytest.raises(RuntimeError, match="forward-mode derivatives"):
                problem.replace(emissions=dual)(unary, backend)
        problem(ops.crf_nll, backend).sum().backward()  # without a tangent all is as usual
        value = problem(ops.crf_nll, backend)
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            value.backward(torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3)))


@on_cpu
def test_numbers_of_nothing(backend: str) -> None:
    """No sequences, no steps: through every route of backward the gradients are zero."""
    every: tuple[Callable[..., Any], ...] = (ops.crf_log_partition, ops.crf_nll, ops.crf_score)
    for op, shape in itertools.product(every, ((0, 3, 4), (2, 0, 4))):
        for weights in (None, torch.arange(shape[0])):
            leaves = chain(*shape).leaves()
            leaves.emissions.requires_grad_(shape[0] == 0)  # where there are no steps, only the parameters
            value = leaves(op, backend)
            value.sum().backward() if weights is None else value.backward(weights.float())
            assert not leaves.transitions.grad.any()  # type: ignore[union-attr]
    for reduction in ("sum", "mean"):
        leaves = chain(0, 3, 4).leaves()
        args: Any = (leaves.emissions, leaves.transitions, leaves.tags)
        loss: Any = ops.crf_nll(*args, reduction=reduction, backend=backend)  # type: ignore[arg-type]
        assert loss.isnan() if reduction == "mean" else loss == 0
        loss.backward()
        assert not leaves.transitions.grad.any()  # type: ignore[union-attr]


def change(**changes: Any) -> Callable[[Chain], Chain]:
    return lambda problem: problem.replace(**{k: f(getattr(problem, k)) for k, f in changes.items()})


def put(at: tuple[int, ...], what: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clone().index_put_([torch.tensor(i) for i in at], torch.tensor(what, dtype=x.dtype))


MASK = torch.ones(3, 5, dtype=torch.bool)


# shapes, values and devices; dtypes and layouts of every declaration are in tests/test_extension.py
VALUE, TYPE = ValueError, TypeError
BAD: list[tuple[str, Callable[[Chain], Chain], type[Exception], str]] = [
    ("rank", change(emissions=lambda x: x[0]), VALUE, r"emissions must have shape .*, got \(5, 4\)"),
    ("blocked", change(emissions=Tensor.to_mkldnn), TYPE, "emissions must be a dense tensor .* got a _mkldnn one"),
    ("no tags", change(emissions=lambda x: x[..., :0]), VALUE, "emissions must not be empty along tags"),
    ("complex", change(emissions=lambda x: x + 0j), TYPE, r"emissions must be of dtype .* got torch\.complex64"),
    ("square", change(transitions=lambda x: x[:3]), VALUE, r"transitions must have shape \(tags, tags\) = \(4, 4\)"),
    ("float64", change(transitions=Tensor.double), TYPE, r"transitions is torch\.float64 but"),
    ("start", change(start=lambda x: x[:3]), VALUE, r"start must have shape \(tags,\) = \(4,\), got \(3,\)"),
    ("end", change(end=lambda x: x.unsqueeze(0)), VALUE, r"end must have shape \(tags,\) = \(4,\), got \(1, 4\)"),
    ("no labels", change(tags=lambda x: None), TYPE, r"tags must be a tensor of shape \(batch, time\), got NoneType"),
    ("one-hot labels", change(tags=lambda x: nn.functional.one_hot(x, 4)), VALUE, r"tags must have shape .* \(3, 5\)"),
    ("label -1", change(tags=put((1, 2), -1)), VALUE, r"tags must lie in \[0, 4\) .*, got -1 for sequence 1, step 2"),
    ("label K", change(tags=put((2, 4), 4)), VALUE, r"tags must lie in \[0, 4\) .*, got 4 for sequence 2, step 4"),
    ("mask shape", change(mask=lambda x: MASK[:, :4]), VALUE, r"mask must have shape .* = \(3, 5\), got \(3, 4\)"),
    ("mask dtype", change(mask=lambda x: MASK.byte()), TYPE, r"mask must be of dtype torch\.bool, got torch\.uint8"),
    ("both", change(mask=lambda x: MASK, lengths=lambda x: MASK.sum(1)), VALUE, "mask and lengths say the same thing"),
    ("lengths", change(lengths=lambda x: MASK.sum(1, True)), VALUE, r"lengths must have shape .* = \(3,\)"),
    ("length T+1", change(lengths=lambda x: torch.tensor([5, 6, 0])), VALUE, r"lengths must lie in \[0, 5\], got 6"),
    ("length -1", change(lengths=lambda x: torch.tensor([5, 5, -1])), VALUE, r"got -1 for sequence 2"),
    ("device of labels", change(tags=lambda x: x.to("meta")), VALUE, "tags is on meta but emissions is on cpu"),
]  # fmt: skip


@on_cpu
@pytest.mark.parametrize(("name", "mutate", "error", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_input(name: str, mutate: Callable[[Chain], Chain], error: type, message: str, backend: str) -> None:
    bad = mutate(chain(3, 5, 4))
    untagged = () if "label" in name else (ops.crf_log_partition, ops.crf_marginals, ops.viterbi)
    for op in (ops.crf_nll, ops.crf_score, *untagged):
        if op is ops.crf_nll and bad.tags is None:
            continue  # which may have `allowed` in their place
        with pytest.raises(error, match=message):
            bad(op, backend)


def test_memory_law() -> None:
    """Forward and backward at (8, 512, 128) stay far below the B T K K potentials, 268 MB in float32."""
    out = script(
        """
import resource, torch
from pyseq import ops
def step(backend, batch, time, tags):
    emissions = torch.zeros(batch, time, tags, requires_grad=True)
    transitions = torch.zeros(tags, tags, requires_grad=True)
    ops.crf_nll(emissions, transitions, torch.zeros(batch, time).long(), backend=backend).sum().backward()
for backend in ("numba", "cpp"):
    step(backend, 2, 3, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(backend, 8, 512, 128)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""",
        OMP_NUM_THREADS="1",
    )
    emissions = 8 * 512 * 128 * 4 / 1024
    assert [int(grown) < 8 * emissions + 4096 for grown in out.split()] == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for the size of the process")
def test_scratch_that_does_not_fit() -> None:
    """MemoryError, also out of a team of threads, and the next call is as good as ever."""
    out = script(
        """
import pathlib, resource, torch
from pyseq import ops
torch.set_num_threads(2)
emissions, transitions = torch.zeros(16, 10_000, 64), torch.zeros(64, 64)
unlimited = resource.getrlimit(resource.RLIMIT_AS)
for op in (ops.crf_log_partition, lambda *scores, backend: ops.viterbi(*scores, backend=backend)[0]):
    expected, found = op(emissions, transitions, backend="cpp"), set()
    for share in (0.1, 0.6, 1.6, 2.5, 8):
        size = int(pathlib.Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (size + int(share * 4 * emissions.numel()), unlimited[1]))
        try:
            assert torch.equal(op(emissions, transitions, backend="cpp"), expected)
            found.add("served")
        except MemoryError as error:
            found.add(str(error))
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert torch.equal(op(emissions, transitions, backend="cpp"), expected)
    print(sorted(found))
"""
    )
    assert out.splitlines() == [str(["no memory for a kernel's scratch; use smaller batches", "served"])] * 2


def test_workers_and_forks() -> None:
    """A loader's worker, forked after the parent ran a team of two threads, decodes and returns."""
    out = script(
        """
import torch, warnings
from pyseq import ops
torch.set_num_threads(2)
transitions = torch.randn(9, 9)
parent = ops.viterbi(torch.ones(64, 200, 9), transitions, backend="cpp")[1]
class Decoded(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return ops.viterbi(torch.ones(64, 200, 9), transitions, backend=("cpp", "numba")[i])[1]
options = {"batch_size": None, "num_workers": 1, "timeout": 60, "multiprocessing_context": "fork"}
print([torch.equal(path, parent) for path in torch.utils.data.DataLoader(Decoded(), **options)])
"""
    )
    assert out.strip() == "[True, True]"


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_python_threads(backend: str) -> None:
    """Concurrent calls give the bits of calls one by one, and a Python thread runs while a kernel does."""

    def answer(problem: Chain) -> list[Tensor]:
        leaves = problem.leaves()
        value = leaves(ops.crf_nll, backend)
        return [value, *torch.autograd.grad(value.sum(), leaves.scores()), *problem(ops.viterbi, backend)]

    problems = [chain(20, 50, 9, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, problem in zip(pool.map(answer, problems * 10), problems * 10, strict=True):
            assert all(map(torch.equal, found, answer(problem)))
        long, ticks = chain(8, 3000, 64, seed=5), 0
        long(ops.crf_log_partition, backend)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in range(50):  # on a busy machine few of them give way
                kernel = pool.submit(long, ops.crf_log_partition, backend)
                while not kernel.done():
                    time.sleep(0.001)
                    ticks += 1
                if ticks > 10:
                    break
        finally:
            torch.set_num_threads(before)
    assert ticks > 10


GPU_SHAPES = [(64, 256, 9), (99, 512, 32), (32, 128, 128), (16, 64, 512), (4, 33, 1024), (1, 20000, 9)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_large_shapes_on_a_gpu(shape: tuple[int, int, int]) -> None:
    problem = chain(*shape, live="holes", seed=6)
    truth = exact(problem, np.float64)
    leaves = problem.to("cuda").leaves()
    value = leaves(ops.crf_nll, "triton")
    assert_within("nll", value, truth.value(NLL), 9 * unit(torch.float32) * (truth.size_z + truth.size_score))
    grads = torch.autograd.grad(value.sum(), leaves.scores())
    right, sizes = truth.gradients(NLL, np.ones(shape[0]))
    worst = 2 * min(shape[1], 1000) * (shape[2] + 8) * unit(torch.float32)
    for name, grad, true, size in zip(("emissions", "transitions", "start", "end"), grads, right, sizes, strict=True):
        assert_within(name, grad, true, worst * size)
    score, path = problem.to("cuda")(ops.viterbi, "triton")
    assert_within("best", score, truth.best, 2 * unit(torch.float32) * abs(truth.best))
    assert (path.cpu().numpy() == truth.path).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_host_synchronisation_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward, backward nor decoding waits for the device; PYSEQ_CHECK=1 does, and raises."""
    problem = chain(4, 6, 5, live="holes").to("cuda").leaves()
    problem(ops.crf_nll, "triton").sum().backward()
    problem(ops.viterbi, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem(ops.crf_nll, "triton").sum().backward()
        problem(ops.viterbi, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(settings, "check", True)
    bad = problem.replace(tags=torch.full((4, 6), 9, device="cuda"))
    with pytest.raises(ValueError, match="tags must lie in"):
        bad(ops.crf_nll, "triton")
