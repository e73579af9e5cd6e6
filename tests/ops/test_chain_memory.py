"""The chain room's extension touches no tensor that is not as its kernels need it; calls take the short way to it."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from pyseq import ops
from pyseq.kernels import OK, UNFIT
from pyseq.kernels.chain import NLL, SCORE
from pyseq.ops import _check, _library
from pyseq.testing import Guarded, statuses
from pyseq.testing.chain import chain

_C: Any = importlib.import_module("pyseq._C")
NAMES = ("emissions", "transitions", "start", "end", "tags", "mask", "lengths")


class Call:
    """A call of the kernel, to be spoiled."""

    def __init__(self, dtype: torch.dtype = torch.float32, live: str = "holes") -> None:
        self.guarded = guarded = Guarded()
        problem = chain(3, 4, 5, dtype, live)
        self.inputs = {k: None if x is None else guarded(x) for k, x in vars(problem).items()}
        self.weights: Any = guarded(torch.full((3,), 0.5, dtype=dtype))
        self.value: Any = guarded(torch.full((3,), 5.0, dtype=dtype))
        self.grads: list[Any] = [guarded(torch.full_like(x, 5.0)) for x in problem.scores()]
        self.paths: Any = guarded(torch.full((3,), 5, dtype=torch.int32))
        self.kind, self.reduction = NLL, "none"

    def __call__(self) -> int:
        options = (self.kind, self.reduction, True)
        status: int = _C.chain.crf(
            *self.inputs.values(), self.weights, *options, self.value, *self.grads, self.paths, 1, 0
        )
        self.guarded.check()
        return status

    def outputs(self) -> list[Tensor]:
        return [x for x in (self.value, *self.grads, self.paths) if type(x) is Tensor and x.device.type == "cpu"]


@pytest.mark.parametrize(("dtype", "live"), [(torch.float32, "holes"), (torch.float64, "lengths")])
def test_good_calls_are_served(dtype: torch.dtype, live: str) -> None:
    call = Call(dtype, live)
    assert call() == OK
    assert not any((x == 5).all() for x in call.outputs())


def padded(x: Tensor) -> Tensor:
    """The same values, one element in two."""
    return x.unsqueeze(-1).expand(*x.shape, 2).reshape(*x.shape[:-1], -1)[..., ::2]


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda x: x.to(torch.int16 if x.is_floating_point() else torch.float32),
    "wider": lambda x: x.double() if x.is_floating_point() else x.to(torch.uint8),
    "narrower": lambda x: x.bfloat16() if x.is_floating_point() else x.int(),
    "short": lambda x: x[:-1],
    "long": lambda x: torch.cat([x, x]),
    "deep": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.sum().to(x.dtype),
    "meta": lambda x: x.to("meta"),
    "symbolic": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "stride": padded,
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*NAMES, "weights"])
def test_no_wrong_argument_is_touched(name: str, wrong: str) -> None:
    call = Call(live="lengths" if name == "lengths" else "holes")
    if name == "weights":
        call.weights = WRONG[wrong](call.weights)
    else:
        given = call.inputs[name]
        assert given is not None
        call.inputs[name] = WRONG[wrong](given)
    assert call() == UNFIT
    assert all((x == 5).all() for x in call.outputs())


@pytest.mark.parametrize(
    "outputs",
    [
        {"value": torch.zeros(4)},
        {"value": torch.zeros(())},
        {"value": torch.zeros(3, dtype=torch.float64)},
        {"value": torch.zeros(3), "reduction": "sum"},
        {"value": torch.zeros(()), "reduction": "product"},
        {"value": padded(torch.zeros(3))},
        {"value": None},
        {"paths": torch.zeros(3, dtype=torch.int64)},
        {"paths": padded(torch.zeros(3, dtype=torch.int32))},
        {"grads": [torch.zeros(3, 4, 6), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5)]},
        {"grads": [padded(torch.zeros(3, 4, 5)), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 4), torch.zeros(5), torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.ones(5, 5).triu().t(), torch.zeros(5), torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 5), None, torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5).double()]},
        {"kind": 7},
    ],
)
def test_wrong_outputs_are_not_written(outputs: dict[str, Any]) -> None:
    call = Call()
    vars(call).update(outputs)
    assert call() == UNFIT


def test_a_missing_argument_is_not_made_up() -> None:
    for name, kind in itertools.product(("emissions", "transitions", "tags"), (NLL, SCORE)):
        call = Call()
        call.kind, call.inputs[name] = kind, None
        assert call() == UNFIT
    inputs = (*Call().inputs.values(), None)
    scores, path = torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)
    assert _C.chain.viterbi(*inputs, True, scores, path, 1, 0) == OK
    for bad in ((scores.double(), path), (scores[:2], path), (scores, path.int()), (scores, path[:, :3])):
        assert _C.chain.viterbi(*inputs, True, *bad, 1, 0) == UNFIT


def test_plain_calls_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check in Python, no dispatcher, one launch."""
    problem = chain(3, 4, 5, live="holes").leaves()
    monkeypatch.setattr(_check, "_lead", lambda *_: pytest.fail("the long way"))
    monkeypatch.setattr(_library.Raw, "_dispatched", lambda *_: pytest.fail("the dispatcher"))
    monkeypatch.setattr(_library.Raw, "_readable", lambda *_: pytest.fail("a copy"))
    with statuses("chain", "cpp") as found:
        problem(ops.crf_nll, "cpp").sum().backward()
    assert found == [OK]


@pytest.mark.parametrize(("dtype", "live"), [(torch.float32, "holes"), (torch.bfloat16, "lengths")])
def test_tensors_read_as_before_torch_2_10_give_the_same(dtype: torch.dtype, live: str) -> None:
    results = []
    for exchange in (False, True):  # ends with what is usual
        _C.allow_exchange(exchange)
        problem = chain(5, 6, 4, dtype, live).leaves()
        value = problem(ops.crf_nll, "cpp")
        value.sum().backward()
        results.append([value, *(x.grad for x in problem.scores()), *problem(ops.viterbi, "cpp")])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:.*data pointer.*")  # torch's, about fakes
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tensors_without_memory() -> None:
    """Symbolic zeros, which are plain tensors to Python; fakes; wrappers: neither read nor taken for None."""
    with FakeTensorMode():
        fake = torch.randn(3, 4, 5, requires_grad=True)
        ops.crf_log_partition(fake, torch.randn(5, 5)).sum().backward()
        assert fake.grad is not None
        assert fake.grad.shape == fake.shape
    for name in NAMES:
        problem = chain(3, 4, 5, live="lengths" if name == "lengths" else "holes")
        given = getattr(problem, name)
        symbolic = problem.replace(**{name: torch._efficientzerotensor(given.shape, dtype=given.dtype)})
        real = problem.replace(**{name: torch.zeros_like(given)})
        for backend in ("numba", "cpp"):
            for op in (ops.crf_nll, ops.crf_marginals):
                assert torch.equal(symbolic(op, backend), real(op, backend))
            assert torch.equal(symbolic(ops.viterbi, backend)[1], real(ops.viterbi, backend)[1])
    problem = chain(3, 4, 5).leaves()
    for backend in ("numba", "cpp"):
        value = problem(ops.crf_nll, backend)
        (gradient,) = torch.autograd.grad(value, problem.emissions, torch._efficientzerotensor((3,)))
        assert torch.equal(gradient, torch.zeros(3, 4, 5))
    twice: Any = TwoTensor(problem.emissions.detach(), problem.emissions.detach()).requires_grad_()
    ops.crf_log_partition(twice, problem.transitions).sum().backward()
    assert torch.equal(twice.grad.a, ops.crf_marginals(problem.emissions, problem.transitions))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_empty_tensors_of_any_stride(shape: tuple[int, ...]) -> None:
    """`contiguous()` leaves them as they are."""
    emissions, transitions = torch.zeros(*shape[:2], 6)[..., ::2].requires_grad_(), torch.zeros(3, 3)
    value = ops.crf_log_partition(emissions, transitions, backend="cpp")
    (grad,) = torch.autograd.grad(value.sum(), emissions)
    assert torch.equal(value, torch.zeros(shape[0]))
    assert ops.viterbi(emissions, transitions, backend="cpp")[1].shape == shape[:2]
    assert grad.shape == ops.crf_marginals(emissions, transitions, backend="cpp").shape == shape


@pytest.mark.parametrize("backend", ["numba", "cpp"])
def test_the_sign_of_a_conjugates_imaginary_part(backend: str) -> None:
    """Torch puts it off, and only its own operations know; also in the gradient from above."""

    def imaginary(x: Tensor) -> Tensor:
        return (x * 1j).conj().imag

    for put_off in (imaginary, torch._neg_view):
        plain = chain(2, 3, 3).leaves()
        lazy = plain.map(lambda x: put_off(-x) if x.is_floating_point() else x)  # noqa: B023 (called here)
        assert all(x.is_neg() for x in lazy.scores())
        value, right = lazy(ops.crf_nll, backend), plain(ops.crf_nll, backend)
        assert torch.equal(value, right)
        assert torch.equal(lazy(ops.viterbi, backend)[0], plain(ops.viterbi, backend)[0])
        weights = imaginary(torch.tensor([2.0, 3.0]))
        assert weights.is_neg()
        found = torch.autograd.grad(value, plain.scores(), weights)
        assert all(map(torch.equal, found, torch.autograd.grad(right, plain.scores(), weights.resolve_neg())))
