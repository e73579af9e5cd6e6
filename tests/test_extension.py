"""What the extension sees of a tensor, and that it touches none that is not as its kernels need it."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from pyseq import ops
from pyseq.kernels.common import NLL, OK, SCORE, UNFIT
from pyseq.ops import _autograd, _check
from pyseq.testing import Guarded, launches
from pyseq.testing.chain import LIVE, Chain, chain

_C: Any = importlib.import_module("pyseq._C")


NAMES = ("emissions", "transitions", "start", "end", "tags", "mask", "lengths")


class Subclass(Tensor):
    pass


@pytest.fixture(params=["exchange", "attributes"], autouse=True)
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to a tensor's memory."""
    _C.allow_exchange(request.param == "exchange")
    if request.param == "exchange" and not _C.has_exchange():
        pytest.skip("this torch has no exchange table")
    assert _C.has_exchange() == (request.param == "exchange")
    yield request.param
    _C.allow_exchange(True)


def arguments(problem: Chain) -> list[Tensor | None]:
    return [getattr(problem, name) for name in NAMES]


class Call:
    """A call of the kernel, to be spoiled."""

    def __init__(self, dtype: torch.dtype = torch.float32, live: str = "holes") -> None:
        self.guarded = guarded = Guarded()
        problem = chain(3, 4, 5, dtype, live)
        self.chain = [None if x is None else guarded(x) for x in arguments(problem)]
        self.weights: Any = None
        self.value: Any = guarded(torch.full((3,), 5.0, dtype=dtype))
        self.grads: list[Any] = [guarded(torch.full_like(x, 5.0)) for x in problem.scores()]
        self.paths: Any = guarded(torch.full((3,), 5, dtype=torch.int32))
        self.reduction = "none"

    def __call__(self) -> int:
        status: int = _C.crf(
            *self.chain, self.weights, NLL, self.reduction, True, self.value, self.grads, self.paths, 1, 0
        )
        self.guarded.check()
        return status

    def outputs(self) -> list[Tensor]:
        return [x for x in (self.value, *self.grads, self.paths) if type(x) is Tensor and x.device.type == "cpu"]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_good_calls_are_served(dtype: torch.dtype, live: str) -> None:
    call = Call(dtype, live)
    call.weights = torch.full((3,), 0.5, dtype=dtype)
    assert _C.chain_fits(*call.chain, True)
    assert call() == OK
    assert not any((x == 5).all() for x in call.outputs())


def padded(x: Tensor) -> Tensor:
    """The same values, one element in two."""
    return x.unsqueeze(-1).expand(*x.shape, 2).reshape(*x.shape[:-1], -1)[..., ::2]


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda x: x.to(torch.int16 if x.is_floating_point() else torch.float32),
    "wider": lambda x: x.double() if x.is_floating_point() else x.to(torch.uint8),
    "narrower": lambda x: x.bfloat16() if x.is_floating_point() else x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "short": lambda x: x[:-1],
    "long": lambda x: torch.cat([x, x]),
    "deep": lambda x: x.unsqueeze(0),
    "much too deep": lambda x: x[None, None, None, None],
    "flat": lambda x: x.sum().to(x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged),
    "list": lambda x: x.tolist(),
    "number": lambda x: 3,
    "type": type,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about its nested tensors
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_no_wrong_argument_is_touched(name: str, wrong: str) -> None:
    call = Call(live="lengths" if name == "lengths" else "holes")
    at = NAMES.index(name)
    given = call.chain[at]
    assert given is not None
    if wrong == "nested" and given.dim() == 1:
        pytest.skip("rows of no dimension")
    call.chain[at] = WRONG[wrong](given)
    converted = name == "emissions" and wrong == "narrower"  # half precision, which the launch widens
    assert _C.chain_fits(*call.chain, True) == converted
    assert call() == UNFIT
    assert all((x == 5).all() for x in call.outputs())


@pytest.mark.parametrize("name", ["emissions", "transitions", "tags"])
def test_a_missing_argument_is_not_made_up(name: str) -> None:
    call = Call()
    call.chain[NAMES.index(name)] = None
    assert not _C.chain_fits(*call.chain, True)
    if name != "tags":  # their absence is another kind's business
        assert call() == UNFIT


@pytest.mark.parametrize("name", [*NAMES, "weights", "value", "paths", "grads"])
def test_strides_that_a_kernel_cannot_follow(name: str) -> None:
    call = Call(live="lengths" if name == "lengths" else "holes")
    if name in NAMES:
        at = NAMES.index(name)
        given = call.chain[at]
        assert given is not None
        call.chain[at] = padded(given)
    elif name == "weights":
        call.weights = torch.ones(1).expand(3)
    elif name == "grads":
        call.grads[1] = call.grads[1].t()
        assert call() == UNFIT
        call.grads[1] = call.grads[1].t()
        call.grads[0] = padded(call.grads[0])
    else:
        setattr(call, name, padded(getattr(call, name)))
    assert call() == UNFIT
    assert all((x == 5).all() for x in call.outputs())


@pytest.mark.parametrize(
    "outputs",
    [
        {"value": torch.zeros(4)},
        {"value": torch.zeros(())},
        {"value": torch.zeros(3, dtype=torch.float64)},
        {"value": torch.zeros(3), "reduction": "sum"},
        {"value": None},
        {"weights": torch.zeros(2)},
        {"weights": torch.zeros(3, dtype=torch.float64)},
        {"paths": torch.zeros(3, dtype=torch.int64)},
        {"grads": [torch.zeros(3, 4, 6), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 4), torch.zeros(5), torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 5), None, torch.zeros(5)]},
        {"grads": [torch.zeros(3, 4, 5), torch.zeros(5, 5), torch.zeros(5), torch.zeros(5).double()]},
    ],
)
def test_wrong_outputs_are_not_written(outputs: dict[str, Any]) -> None:
    call = Call()
    vars(call).update(outputs)
    assert call() == UNFIT


def test_viterbi_touches_no_wrong_output() -> None:
    call = Call()
    good = torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)
    assert _C.viterbi(*call.chain, True, *good, 1, 0) == OK
    scores, path = good
    for bad in ((scores.double(), path), (scores[:2], path), (scores, path.int()), (scores, path[:, :3])):
        assert _C.viterbi(*call.chain, True, *bad, 1, 0) == UNFIT


def test_only_plain_tensors_pass_unchecked() -> None:
    call = Call()
    for at, given in enumerate(call.chain):
        if given is not None:
            spoiled = [*call.chain]
            spoiled[at] = given.as_subclass(Subclass)
            assert not _C.chain_fits(*spoiled, True)
    call.chain[1:4] = [nn.Parameter(x) for x in call.chain[1:4] if x is not None]
    assert _C.chain_fits(*call.chain, True)
    assert not _C.chain_fits(*call.chain, False)  # tags that nobody asked for
    both = [*call.chain[:6], torch.ones(3, dtype=torch.int64)]
    assert not _C.chain_fits(*both, True)


def test_plain_calls_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check in Python, one launch, and the upstream gradient read in C++."""
    problem = chain(3, 4, 5, live="holes").leaves()
    statuses: list[int] = []

    def counted(launch: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            statuses.append(launch(*args))
            return statuses[-1]

        return call

    for module, name in ((_check, "tensor"), (_check, "as_wanted"), (_autograd, "refuse_upstream")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the long way"))
    with launches("chain", "cpp", counted):
        problem(ops.crf_nll, "cpp").sum().backward()
    assert statuses == [OK]


def test_what_passes_unchecked_would_pass_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the extension lets pass, the checks in Python return as it came."""
    seen = []
    for dtype in _check.FLOATS:
        for live in LIVE:
            problem = chain(3, 4, 5, dtype, live)
            given = arguments(problem)
            assert _C.chain_fits(*given, True)
            seen.append(given)
    monkeypatch.setattr(importlib.import_module("pyseq.ops.chain"), "_fits", lambda *_: False)
    for given in seen:
        emissions, transitions, start, end, tags, mask, lengths = given
        returned = importlib.import_module("pyseq.ops.chain")._arguments(
            emissions, transitions, start, end, tags, mask, lengths, tagged=True
        )
        assert all(x is y for x, y in zip(given, returned, strict=True))


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", _check.FLOATS)
def test_both_ways_give_the_same(dtype: torch.dtype, live: str, by: str) -> None:
    results = []
    for exchange in (by == "exchange", False):
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
        assert _C.shared_number(torch.zeros(3)) is None
    for at, name in enumerate(NAMES):
        call = Call(live="lengths" if name == "lengths" else "holes")
        given = call.chain[at]
        assert given is not None
        call.chain[at] = torch._efficientzerotensor(given.shape, dtype=given.dtype)
        assert not _C.chain_fits(*call.chain, True)
        assert call() == UNFIT
        emissions, transitions, start, end, tags, mask, lengths = call.chain
        symbolic = Chain(emissions, transitions, start, end, tags, mask, lengths)  # type: ignore[arg-type]
        real = symbolic.replace(**{name: torch.zeros_like(given)})
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
    value.sum().backward()
    assert torch.equal(value, torch.zeros(shape[0]))
    assert emissions.grad is not None
    assert emissions.grad.shape == shape
    assert ops.viterbi(emissions, transitions, backend="cpp")[1].shape == shape[:2]
    assert ops.crf_marginals(emissions, transitions, backend="cpp").shape == shape


def test_calls_that_make_no_sense_are_refused() -> None:
    call = Call()
    call.reduction = "product"
    call.value = torch.zeros(())
    assert call() == UNFIT
    rest = (None, True, torch.zeros(3), None, None, 1, 0)
    for kind, labels in ((NLL, None), (SCORE, None), (7, call.chain[4])):
        assert _C.crf(*call.chain[:4], labels, *call.chain[5:], None, kind, "none", *rest[1:]) == UNFIT


@pytest.mark.parametrize("backend", ["reference", "numba", "cpp"])
@pytest.mark.parametrize("tags", [1, 3])
def test_the_sign_of_a_conjugates_imaginary_part(tags: int, backend: str) -> None:
    """Torch puts it off, and only its own operations know; also in the gradient from above."""
    problem = chain(1, 1, tags)
    plain = problem.map(lambda x: -x if x.is_floating_point() else x)

    def imaginary(x: Tensor) -> Tensor:
        return (x * 1j).conj().imag

    def unit_stride(x: Tensor) -> Tensor:
        return imaginary(x.squeeze(-1)).unsqueeze(-1) if x.size(-1) == 1 else torch._neg_view(x)

    for put_off in (imaginary, unit_stride):
        lazy = problem.map(lambda x: put_off(x) if x.is_floating_point() else x)  # noqa: B023 (called here)
        assert all(x.is_neg() for x in lazy.scores())
        for op in (ops.crf_log_partition, ops.crf_score):
            assert torch.equal(lazy(op, backend), plain(op, backend))
        assert torch.equal(lazy(ops.viterbi, backend)[0], plain(ops.viterbi, backend)[0])
    for weight in (torch.tensor([2j]), torch.tensor([2j, 3j])):
        problem = chain(len(weight), 3, tags).leaves()
        weights = weight.conj().imag
        assert weights.is_neg()
        problem(ops.crf_log_partition, backend).backward(weights)
        moved = problem.leaves()
        moved(ops.crf_log_partition, backend).backward(-weight.imag)
        for x, y in zip(problem.scores(), moved.scores(), strict=True):
            assert x.grad is not None
            assert y.grad is not None
            assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor(-0.25, dtype=torch.float64), -0.25),
        (torch.full((7,), 3.0), 3.0),
        (torch.tensor(3.0).expand(70), 3.0),
        (torch.tensor([3.0, 9.0, 3.0, 9.0])[::2], 3.0),
        (torch.tensor([3.0, 3.0, 4.0]), None),
        (torch.tensor([math.nan]), None),
        (torch.tensor(math.inf), None),
        (torch.tensor([math.nan, math.nan]), None),
        (torch.full((2,), -math.inf), None),
        (torch.zeros(0), None),
    ],
)
def test_shared_number(x: Tensor, expected: float | None) -> None:
    assert _C.shared_number(x) == expected
    assert _autograd._shared_number_by_torch(x) == expected


def test_shared_number_refuses_what_it_cannot_read() -> None:
    for x in (torch.ones(2, 2), torch.ones(2, dtype=torch.int64), torch.ones(2).half(), torch.ones(2).to("meta"), 1.0):
        assert _C.shared_number(x) is None
