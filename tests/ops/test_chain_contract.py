"""The chain room's contract beside its numbers: registration, compile, export, errors, memory, processes, threads."""

import itertools
import math
import sys
import threading
from collections.abc import Callable
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
    problem = chain(2, 2, 2, torch.float64) if small else chain(3, 4, 3, torch.float64, "holes")

    def value(*scores: Tensor) -> Tensor:
        emissions, transitions, start, end = scores
        moved = problem.replace(emissions=emissions, transitions=transitions, start=start, end=end)
        return moved(op, backend)  # type: ignore[no-any-return]

    scores = problem.leaves().scores()
    assert torch.autograd.gradcheck(value, scores, fast_mode=small)
    if op is not ops.crf_score and not small:  # a score is linear
        assert torch.autograd.gradgradcheck(value, scores)


@on_cpu
@pytest.mark.parametrize("op", [ops.crf_log_partition, ops.crf_nll, ops.crf_marginals], ids=lambda op: op.__name__)
def test_double_backward_in_float32(op: Callable[..., Any], backend: str) -> None:
    problem = chain(5, 4, 3, live="holes", seed=1)

    def second(of: Chain, backend: str) -> list[Tensor]:
        leaves = of.leaves()
        out = leaves(op, backend)
        (first,) = torch.autograd.grad((out * out).sum(), leaves.emissions, create_graph=True)
        return list(torch.autograd.grad((first * first).sum(), leaves.scores(), allow_unused=True))

    right, own, found = second(problem.double(), "reference"), second(problem, "reference"), second(problem, backend)
    for true, near, got in zip(right, own, found, strict=True):
        band = 8 * unit(torch.float32) * float(true.abs().max())
        assert_within("second", got, true.numpy(), 2 * float((near - true).abs().max()) + band)


@on_every
@pytest.mark.parametrize("weight", [1.0, 0.5, math.inf])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduction(reduction: str, weight: float, backend: str) -> None:
    """The numbers of reducing afterwards, value, gradient and second derivative; also of a forbidden path, and of
    sequences that different kernels and tiers serve."""
    problem = chain(3, 3, 3, torch.float64, "holes") if backend == "triton" else chain(5, 4, 3, torch.float64, "holes")
    assert problem.mask is not None
    assert problem.tags is not None
    at = int(problem.mask[1].int().argmax())
    problem.emissions[1, at, problem.tags[1, at]] = -math.inf

    def loss(leaves: Chain, fused: bool) -> Tensor:
        extra = {"reduction": reduction} if fused else {}
        args = (leaves.emissions, leaves.transitions, leaves.tags, leaves.start, leaves.end, leaves.mask)
        nll: Tensor = ops.crf_nll(*args, backend=backend, **extra)  # type: ignore[arg-type]
        return weight * (nll if fused else getattr(nll, reduction)())

    cases = [(problem, False)]
    if backend != "triton":
        cases += [(mixed(), False), (chain(19, 6, 40), False), *[(problem, True)] * math.isfinite(weight)]
    for problem, again in cases:
        fused, plain = problem.leaves(), problem.leaves()
        got, right = loss(fused, True), loss(plain, False)
        assert got.shape == ()
        torch.testing.assert_close(got, right)
        grads = [
            torch.autograd.grad(x, leaves.scores(), create_graph=again) for x, leaves in ((got, fused), (right, plain))
        ]
        if again:
            grads = [
                torch.autograd.grad(torch.stack([(g * g).sum() for g in first]).sum(), leaves.scores())
                for first, leaves in zip(grads, (fused, plain), strict=True)
            ]
        torch.testing.assert_close(*grads, equal_nan=True)
    with pytest.raises(ValueError, match="reduction must be 'none', 'sum' or 'mean', got 'batchmean'"):
        ops.crf_nll(problem.emissions, problem.transitions, problem.tags, reduction="batchmean")  # type: ignore[arg-type]


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
        assert x.grad is not None
        x.grad.zero_()
    loss.backward()
    for x, right in zip(leaves.scores(), first, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, right)


def raw_arguments(kind: str) -> tuple[Any, ...]:
    """Emissions to lengths."""
    live = {"mask": "holes", "lengths": "lengths"}.get(kind, "all")
    problem = chain(*((0, 3, 4) if kind == "no rows" else (2, 0, 4) if kind == "no steps" else (3, 5, 4)), live=live)
    if kind == "permuted":
        problem = problem.replace(emissions=problem.emissions.transpose(0, 1).contiguous().transpose(0, 1))
    if kind == "tags first":
        problem = problem.replace(emissions=problem.emissions.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    if kind == "windows":
        problem = problem.replace(emissions=torch.randn(3, 4 + 1).unfold(1, 4, 1), tags=problem.tags[:, :2])  # type: ignore[index]
    if kind == "half":
        problem = problem.replace(emissions=problem.emissions.bfloat16())
    if kind == "double":
        problem = problem.double()
    if kind == "bare":
        problem = problem.replace(start=None, end=None)
    return tuple(vars(problem).values())


RAW = ("plain", "bare", "mask", "lengths", "permuted", "tags first", "windows", "half", "double", "no rows", "no steps")


def checks(compiled: bool) -> tuple[str, ...]:
    """Of `opcheck`; the last compiles, which takes seconds."""
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return every if compiled else every[:3]


OFTEN = {("plain", "cpp"), ("half", "cpp"), ("permuted", "auto"), ("mask", "numba"), ("no rows", "cpp")}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(kind, backend, marks=() if (kind, backend) in OFTEN else pytest.mark.slow)
        for kind, backend in itertools.product(RAW, ("cpp", "numba", "auto"))
    ],
)
def test_opcheck(kind: str, backend: str) -> None:
    """Schema, fake, registered autograd and dynamic tracing, with scores that require grad."""
    *scores, tags, mask, lengths = raw_arguments(kind)
    leaves = [x if x is None else x.detach().requires_grad_() for x in scores]
    mean = "mean" if len(scores[0]) else "sum"  # of no rows NaN, which opcheck takes for a difference
    options = (NLL, mean, True, backend)
    args = (*leaves, tags, mask, lengths, None, *options)
    torch.library.opcheck(torch.ops.pyseq.crf_value_and_grad.default, args, test_utils=checks(kind == "plain"))


@pytest.mark.parametrize("backend", ["cpp", pytest.param("numba", marks=pytest.mark.slow)])
def test_opcheck_of_other_calls(backend: str) -> None:
    *scores, tags, mask, lengths = raw_arguments("mask")
    weights = torch.randn(len(scores[0])).to(scores[1].dtype)
    leaves = [x.detach().requires_grad_() for x in scores]
    raw = torch.ops.pyseq
    for call, *args in (
        (raw.crf_value, *leaves, tags, mask, lengths, None, NLL, "mean", True, backend),
        (raw.crf_value, *scores, None, mask, lengths, None, PARTITION, "none", False, backend),
        (raw.crf_value_and_grad, *leaves, tags, mask, lengths, weights, NLL, "none", True, backend),
        (raw.crf_value_and_grad, *scores, tags, mask, lengths, None, SCORE, "none", True, backend),
        (raw.viterbi, *scores, None, mask, lengths, None, True, backend),
    ):
        torch.library.opcheck(call.default, tuple(args), test_utils=checks(call is raw.viterbi))


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
    for batch, time in sizes:
        problem = chain(batch, time, 4, live="holes", seed=time)
        eager, leaves = problem.leaves(), problem.leaves()
        assert leaves.mask is not None
        assert leaves.tags is not None
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
@on_cpu
def test_compiled_marginals_and_their_gradient(backend: str) -> None:
    torch.compiler.reset()

    def marginals(*scores: Tensor) -> Tensor:
        return ops.crf_marginals(*scores, backend=backend)  # type: ignore[arg-type, no-any-return]

    scores = chain(3, 4, 3).leaves().scores()
    upstream = torch.randn(3, 4, 3)
    got, right = torch.compile(marginals, fullgraph=True, backend="aot_eager")(*scores), marginals(*scores)
    assert torch.equal(got, right)
    grads, expected = (torch.autograd.grad(x, scores, upstream) for x in (got, right))
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
def test_marginals_in_every_mode(backend: str) -> None:
    """Under saved-tensor hooks (checkpoints, offloading), in inference mode, and without steps."""
    problem = chain(2, 3, 3)
    right = problem(ops.crf_marginals, backend)
    with torch.inference_mode():
        lasting = problem.emissions.clone()
        assert torch.equal(problem(ops.crf_marginals, backend), right)
        raw = torch.ops.pyseq.crf_value_and_grad(*problem.inputs(False), PARTITION, "none", False, backend)
        assert torch.equal(raw[1], right)  # as a graph has it
    assert torch.equal(problem.replace(emissions=lasting)(ops.crf_marginals, backend), right)

    def penalty(emissions: Tensor) -> Tensor:
        marginals = problem.replace(emissions=emissions)(ops.crf_marginals, backend)
        (slope,) = torch.autograd.grad(marginals.square().sum(), emissions, create_graph=True)
        total: Tensor = marginals.square().sum() + slope.square().sum()
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


@pytest.mark.parametrize("backend", ["numba", "cpp"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace(backend: str) -> None:
    """A trace records the raw op, not the empty tensors that its kernel fills."""
    problem, other = chain(3, 4, 3), chain(3, 4, 3, seed=1)

    def all_of_it(emissions: Tensor, transitions: Tensor) -> tuple[Tensor, ...]:
        value = ops.crf_log_partition(emissions, transitions, backend=backend)  # type: ignore[arg-type]
        return (value, *ops.viterbi(emissions, transitions, backend=backend))  # type: ignore[arg-type]

    traced = torch.jit.trace(all_of_it, (problem.emissions, problem.transitions))
    for x in (problem, other):
        got, right = traced(x.emissions, x.transitions), all_of_it(x.emissions, x.transitions)
        assert all(map(torch.equal, got, right))


@quiet_dynamo
@on_cpu
def test_bad_values_under_compile_make_their_sequence_nan(backend: str) -> None:
    torch.compiler.reset()
    problem = chain(5, 5, 4, seed=3).replace(lengths=torch.tensor([5, 5, 3, -2, 9]))
    assert problem.tags is not None
    assert problem.lengths is not None
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
@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_bad_values_raise_under_compile_when_checks_are_forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "check", True)
    torch.compiler.reset()
    problem = chain(2, 3, 4, seed=4)

    def loss(emissions: Tensor, tags: Tensor) -> Tensor:
        return ops.crf_nll(emissions, problem.transitions, tags, backend=backend)  # type: ignore[arg-type]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"tags must lie in \[0, 4\) at live steps, got 9 for sequence 1, step 2"):
        compiled(problem.emissions, torch.tensor([[0, 0, 0], [0, 0, 9]]))
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
    assert problem.tags is not None
    assert problem.mask is not None
    return problem.emissions, problem.tags, problem.mask


@pytest.mark.parametrize("backend", [*CPU, "auto"])
def test_export(backend: str) -> None:
    module = Tagger("viterbi", backend)
    dynamic = backend != "reference"  # whose loop over time is unrolled
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=64)}
    program = torch.export.export(module, example(), dynamic_shapes=(sizes,) * 3 if dynamic else None)
    for again in (example(), example(5, 9, "left")) if dynamic else (example(),):
        assert all(map(torch.equal, program.module()(*again), module(*again)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("task", ["mean", "each", "marginals"])
@pytest.mark.parametrize("backend", ["auto", "numba"])
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

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Tagger("mean", "auto")

        def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
            return self.second(self.first(x), tags, mask)  # type: ignore[no-any-return]

    whole = Whole()
    pipe = pipeline(whole, example(), split_spec={"second": SplitPoint.BEGINNING})
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
    for task in ("mean", "each", "marginals", "viterbi"):
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


@pytest.mark.parametrize("transform", ["vmap", "vmap with grad", "grad"])
@pytest.mark.parametrize("op", [ops.crf_log_partition, ops.crf_marginals, ops.viterbi], ids=lambda op: op.__name__)
@on_cpu
def test_function_transforms_raise(transform: str, op: Callable[..., Any], backend: str) -> None:
    emissions, transitions = torch.randn(3, 2, 4, 5), torch.randn(5, 5)
    if op is ops.viterbi and transform != "vmap":
        pytest.skip("has no gradient")

    def call(x: Tensor) -> Any:
        return op(x, transitions, backend=backend)

    mapped = torch.func.grad(lambda x: call(x[0]).sum()) if transform == "grad" else torch.vmap(call)
    with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
        mapped(emissions.requires_grad_(transform == "vmap with grad"))


def test_numbers_of_a_batch_without_sequences() -> None:
    """B = 0 through every route of backward."""
    every: tuple[Callable[..., Any], ...] = (ops.crf_log_partition, ops.crf_nll, ops.crf_score)
    for backend, op in itertools.product(CPU, every):
        for reduce in (Tensor.sum, lambda x: (x * torch.ones_like(x)).sum()):
            leaves = chain(0, 3, 4).leaves()
            reduce(leaves(op, backend)).backward()
            assert not any(x.grad is None or x.grad.any() for x in leaves.scores())
    for backend, op in itertools.product(("reference", *CPU), every):
        leaves = chain(2, 0, 4).leaves()  # no steps, and only the parameters in the graph
        leaves.emissions.requires_grad_(False)
        leaves(op, backend).sum().backward()
        assert leaves.transitions.grad is not None
        assert not leaves.transitions.grad.any()
    for backend, reduction in itertools.product(CPU, ("sum", "mean")):
        leaves = chain(0, 3, 4).leaves()
        assert leaves.tags is not None
        loss = ops.crf_nll(leaves.emissions, leaves.transitions, leaves.tags, reduction=reduction, backend=backend)  # type: ignore[arg-type]
        assert loss.isnan() if reduction == "mean" else loss == 0
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaves.transitions.grad is not None
        assert not leaves.transitions.grad.any()


def change(**changes: Any) -> Callable[[Chain], Chain]:
    return lambda problem: problem.replace(**{k: f(getattr(problem, k)) for k, f in changes.items()})


def put(at: tuple[int, ...], what: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clone().index_put_([torch.tensor(i) for i in at], torch.tensor(what, dtype=x.dtype))


MASK = torch.ones(3, 5, dtype=torch.bool)


@on_cpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # forward mode's own imports
def test_batched_and_forward_derivatives_raise(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch")
    problem = chain(3, 2, 4).leaves()
    for op in (ops.crf_nll, ops.crf_marginals):
        value = problem(op, backend)
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


# what tests/test_extension.py shows of every declaration is not shown again
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
    with pytest.raises(error, match=message):
        bad(ops.crf_nll, backend)
    with pytest.raises(error, match=message):
        bad(ops.crf_score, backend)
    if "label" not in name:
        for op in (ops.crf_log_partition, ops.crf_marginals, ops.viterbi):
            with pytest.raises(error, match=message):
                bad(op, backend)


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_memory_law(backend: str) -> None:
    """Forward and backward at (8, 512, 128) stay far below the B T K K potentials, 268 MB in float32."""
    grown = script(
        f"""
import resource, torch
from pyseq import ops
def step(batch, time, tags):
    emissions = torch.zeros(batch, time, tags, requires_grad=True)
    transitions = torch.zeros(tags, tags, requires_grad=True)
    ops.crf_nll(emissions, transitions, torch.zeros(batch, time).long(), backend={backend!r}).sum().backward()
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(2, 3, 128)
before = used()
step(8, 512, 128)
print(used() - before)
""",
        OMP_NUM_THREADS="1",
    )
    emissions = 8 * 512 * 128 * 4 / 1024
    assert int(grown) < 8 * emissions + 4096


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for the size of the process")
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_scratch_that_does_not_fit(threads: int) -> None:
    """MemoryError, also out of a team of threads, and the next call is as good as ever."""
    out = script(
        f"""
import pathlib, resource, torch
from pyseq import ops
torch.set_num_threads({threads})
emissions, transitions = torch.zeros(16, 10_000, 64, requires_grad=True), torch.zeros(64, 64)
tags = torch.zeros(16, 10_000, dtype=torch.int64)
calls = {{
    "loss": lambda: ops.crf_nll(emissions, transitions, tags, backend="cpp"),
    "value": lambda: ops.crf_log_partition(emissions.detach(), transitions, backend="cpp"),
    "viterbi": lambda: ops.viterbi(emissions, transitions, backend="cpp")[0],
}}
unlimited = resource.getrlimit(resource.RLIMIT_AS)
for name, call in calls.items():
    expected = call().detach()
    found = set()
    for share in (0.1, 0.3, 0.6, 1.2, 1.6, 2.0, 2.5, 8):
        status = pathlib.Path("/proc/self/status").read_text()
        size = int(status.split("VmSize:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (size + int(share * 4 * emissions.numel()), unlimited[1]))
        try:
            assert torch.equal(call(), expected)
            found.add("served")
        except MemoryError as error:
            found.add(str(error))
        except RuntimeError as error:  # torch's own, for the gradients
            assert "alloc" in str(error)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert torch.equal(call(), expected)
    print(name, sorted(found))
"""
    )
    refused = "no memory for a kernel's scratch; use smaller batches"
    assert out.splitlines() == [f"{name} {[refused, 'served']}" for name in ("loss", "value", "viterbi")]


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
    """Concurrent calls give the bits of calls one by one."""
    problems = [chain(20, 50, 9, seed=seed) for seed in range(4)]

    def answer(problem: Chain) -> list[Tensor]:
        leaves = problem.leaves()
        value = leaves(ops.crf_nll, backend)
        return [value, *torch.autograd.grad(value.sum(), leaves.scores()), *problem(ops.viterbi, backend)]

    right = [answer(problem) for problem in problems]
    found: dict[int, list[list[Tensor]]] = {}

    def work(i: int) -> None:
        found[i] = [answer(problems[i]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, expected in enumerate(right):
        assert all(all(map(torch.equal, again, expected)) for again in found[i])


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_gil_is_released(backend: str) -> None:
    """A Python thread runs while a kernel does."""
    problem = chain(8, 3000, 64, seed=5)
    problem(ops.crf_log_partition, backend)
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            start = ticks[0]
            problem(ops.crf_log_partition, backend)
            seen.append(ticks[0] - start)
    finally:
        torch.set_num_threads(before)
        done.set()
        thread.join()
    assert max(seen) > 2


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


def test_public_path_is_silent() -> None:
    """A raw op called on a tensor that requires grad warns or loses the gradient; the public ones never do."""
    for backend in CPU:
        leaves = chain(3, 4, 5, live="holes").leaves()
        for op in (ops.crf_nll, ops.crf_score, ops.crf_log_partition, ops.crf_marginals):
            value = leaves(op, backend)
            assert value.requires_grad
            value.sum().backward()
        with torch.no_grad():
            assert not leaves(ops.crf_nll, backend).requires_grad
        score, _ = leaves(ops.viterbi, backend)
        assert not score.requires_grad
        assert math.isfinite(score.sum())


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_activation_checkpointing(backend: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    emissions, transitions = torch.randn(3, 5, 4, requires_grad=True), torch.randn(4, 4)
    tags = torch.randint(4, (3, 5))

    def loss(x: Tensor) -> Tensor:
        return ops.crf_nll(x, transitions, tags, backend=backend).sum()

    (expected,) = torch.autograd.grad(loss(emissions), emissions)
    emissions.grad = None
    checkpoint(loss, emissions, use_reentrant=False).backward()
    assert torch.equal(emissions.grad, expected)  # type: ignore[arg-type]
