"""The contract of a raw op, on a toy room: lists, mutation, the bypass, launches; and private names of torch taken
away."""

import contextlib
import functools
import importlib.util
import inspect
import math
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pyseq
from pyseq import ops
from pyseq.kernels import OK, UNFIT
from pyseq.ops import _autograd, _backend, _chain, _chain_reference, _library, _torch
from pyseq.ops._backend import Backends
from pyseq.ops._library import Raw
from pyseq.testing import script


class Lists(NamedTuple):
    fast: list[Tensor]
    slow: list[Tensor]


class Options(NamedTuple):
    alpha: float
    backend: str


BACKENDS = Backends(
    "toy",
    Lists,
    {"cpu": ("numba",)},
    {"numba": lambda inputs: ["too many"] if inputs.slow and len(inputs.slow) > 3 else []},
)
ran: list[str] = []


def pull(inputs: Lists, alpha: float) -> Any:
    """The toy's launcher: both lists move to slow + alpha (fast - slow)."""
    ran.append("numba")
    if not all(x.is_contiguous() for x in (*inputs.fast, *inputs.slow)):
        return UNFIT
    with torch.no_grad():
        for fast, slow in zip(*inputs, strict=True):
            slow.data.lerp_(fast.data, alpha)  # data: no version is counted but the library's
            fast.data.copy_(slow)
    return OK


def kernel(inputs: Lists, options: Options) -> None:
    if options.backend == "reference":
        ran.append("reference")
        for fast, slow in zip(*inputs, strict=True):
            slow.lerp_(fast, options.alpha)
            fast.copy_(slow)
        return
    TOY.launch("pull", inputs, options.backend, options.alpha)


def nothing(inputs: Lists, options: Options) -> None:
    return None


TOY = Raw("test_pull_", Lists, Options, kernel, nothing, BACKENDS, returns=0, mutates=("fast", "slow"))


def pull_(fast: list[Tensor], slow: list[Tensor], alpha: float, *, backend: str = "auto") -> None:
    """The toy's public op."""
    with torch.no_grad():
        inputs = Lists(fast, slow)
        direct, _, chosen = BACKENDS.way(backend, inputs)
        TOY(inputs, Options(alpha, chosen), direct)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A room `toy` with a Numba launcher, which is not installed with the others."""
    module: Any = types.ModuleType("pyseq.kernels.toy.numba")
    module.pull, module.__all__ = pull, ["pull"]
    monkeypatch.setitem(_backend._LAUNCHERS, ("toy", "numba"), module)
    ran.clear()


def tensors() -> tuple[list[Tensor], list[Tensor]]:
    fast = [torch.full((2, 3), 8.0), torch.full((), 4.0)]
    return fast, [torch.zeros(2, 3), torch.zeros(())]


def test_the_schema_says_what_is_written() -> None:
    assert str(torch.ops.pyseq.test_pull_.default._schema) == (
        "pyseq::test_pull_(Tensor(a!)[] fast, Tensor(b!)[] slow, float alpha, str backend) -> ()"
    )


WAYS: dict[str, Callable[[list[Tensor], list[Tensor]], None]] = {
    "past the dispatcher": lambda fast, slow: pull_(fast, slow, 0.5),
    "through the dispatcher": lambda fast, slow: torch.ops.pyseq.test_pull_(fast, slow, 0.5, "auto"),
    "reference": lambda fast, slow: pull_(fast, slow, 0.5, backend="reference"),
    "compiled": torch.compile(lambda fast, slow: pull_(fast, slow, 0.5), fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_into_a_mutating_kernel_counts_versions(way: str) -> None:
    """And what autograd had saved is known to be overwritten."""
    fast, slow = tensors()
    weight = nn.Parameter(torch.full((3,), 2.0))
    fast.append(weight)
    slow.append(torch.zeros(3))
    before = [x._version for x in (*fast, *slow)]
    loss = (weight * weight).sum()
    with torch.no_grad():
        WAYS[way](fast, slow)
    assert ran == ["reference" if way == "reference" else "numba"]
    for x, expected in zip((*fast, *slow), (4.0, 2.0, 1.0) * 2, strict=True):
        assert (x == expected).all()
    assert all(x._version > v for x, v in zip((*fast, *slow), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_opcheck_of_a_mutating_op_over_lists() -> None:
    torch.library.opcheck(torch.ops.pyseq.test_pull_.default, (*tensors(), 0.5, "numba"))


def test_what_is_written_is_never_copied() -> None:
    """A launcher that refuses a written tensor is not given another one; nothing is written and nobody is silent."""
    fast, slow = tensors()
    fast[0] = torch.zeros(3, 2).t()
    with pytest.raises(RuntimeError, match="pull: numba cannot read or write a tensor that passed the checks"):
        pull_(fast, slow, 0.5)
    assert all(not x.any() for x in slow)


def test_lists_are_explained_with_all_inputs_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order, kernels and limits are an op's own."""
    op: Any = pull_
    monkeypatch.setattr(op, "backends", BACKENDS, raising=False)
    fast, slow = tensors()
    told = pyseq.explain(op, fast, slow, 0.5)
    assert told.chosen == "numba"
    assert told["cpp"] == ["there is no cpp kernel for this op"]
    assert pyseq.explain(op, [fast[0]] * 4, [slow[0]] * 4)["numba"] == ["too many"]
    assert pyseq.explain(op, slow=[slow[0]] * 4, fast=[fast[0]] * 4).chosen == "reference"
    assert pyseq.explain(op, [x.to("meta") for x in fast]).chosen == "reference"
    with pytest.raises(ValueError, match="backend 'numba' cannot serve: too many"):
        pull_([fast[0]] * 4, [slow[0]] * 4, 0.5, backend="numba")
    with pytest.raises(ValueError, match="backend 'cpp' cannot serve: there is no cpp kernel for this op"):
        pull_(fast, slow, 0.5, backend="cpp")


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
        (torch.full((2,), -math.inf), None),
        (torch.zeros(0), None),
        (torch._efficientzerotensor((3,)), None),
    ],
)
def test_shared_weight(x: Tensor, expected: float | None) -> None:
    assert _autograd.shared_weight(x) == expected


NAMES = (
    "_len_torch_dispatch_stack",
    "_is_tracing",
    "_are_functorch_transforms_active",
    "_functorch.is_batchedtensor",
    "_functorch.is_legacy_batchedtensor",
    "_autograd._get_current_graph_task_keep_graph",
)


def without(names: Iterable[str], patch: pytest.MonkeyPatch) -> Any:
    """`pyseq.ops._torch` as a torch without these names would have it."""
    module: Any = importlib.util.module_from_spec(_torch.__spec__)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as gone:
        for name in names:
            owner, _, last = name.rpartition(".")
            gone.delattr(functools.reduce(getattr, filter(None, owner.split(".")), torch._C), last)
        _torch.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
    for user in (_autograd, _backend, _chain, _chain_reference, _library):
        for public in ("plain", "traced", "keeps_graph", "_torch"):
            if hasattr(user, public):
                patch.setattr(user, public, getattr(module, public, module))
    return module


def results() -> list[Any]:
    """A training step, twice over its graph, compiled, decoded; batched gradients and vmap, refused or right."""
    torch.manual_seed(0)
    emissions, transitions = torch.randn(3, 4, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    tags = torch.randint(5, (3, 4))
    loss = ops.crf_nll(emissions, transitions, tags, reduction="mean")
    found = [loss.detach(), *torch.autograd.grad(loss, [emissions, transitions], retain_graph=True)]
    found += torch.autograd.grad(loss, [emissions, transitions])
    torch.compiler.reset()
    compiled = torch.compile(ops.crf_nll, fullgraph=True, backend="aot_eager")
    found += [compiled(emissions, transitions, tags, reduction="mean").detach(), *ops.viterbi(emissions, transitions)]
    with contextlib.suppress(RuntimeError):
        assert torch.equal(torch.vmap(ops.viterbi, (0, None))(emissions[None], transitions)[1][0], found[-1])
    values = ops.crf_nll(emissions, transitions, tags)
    rows = [torch.autograd.grad(values, emissions, row, retain_graph=True)[0] for row in torch.eye(3)]
    with contextlib.suppress(RuntimeError):
        (batched,) = torch.autograd.grad(values, emissions, torch.eye(3), is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack(rows))
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, about itself
@pytest.mark.parametrize(
    "gone", [*((name,) for name in NAMES), NAMES], ids=lambda names: names[0] if names[1:] else "all"
)
def test_every_private_name_of_torch_may_go(gone: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers without it, by the public way."""
    right = results()
    module = without(gone, monkeypatch)
    assert all(map(torch.equal, results(), right))
    assert module.plain((torch.ones(1),)) != bool(set(gone) & set(NAMES[:3]))  # without these the dispatcher is asked


def test_pyseq_is_imported_beside_a_torch_that_renamed_them_all() -> None:
    out = script(
        f"""
import functools, torch
for name in {NAMES!r}:
    owner, _, last = name.rpartition(".")
    owner = functools.reduce(getattr, filter(None, owner.split(".")), torch._C)
    kept = getattr(owner, last)
    setattr(owner, last + "_renamed", kept)
    delattr(owner, last)
import pyseq, pyseq.ops, pyseq.nn
print(pyseq.explain(pyseq.ops.viterbi, torch.ones(1, 1, 1)).chosen)
"""
    )
    assert out == "cpp"


def test_private_names_stand_in_one_file() -> None:
    for module in ("_autograd", "_backend", "_check", "_library", "_chain", "_chain_reference", "chain"):
        source = inspect.getsource(__import__(f"pyseq.ops.{module}", fromlist=["_"]))
        assert "torch._" not in source, module
