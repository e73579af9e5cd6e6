"""What the extension sees of a tensor, and which arguments it passes without a check in Python."""

import copy
import importlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyseq.ops import _check

_C: Any = importlib.import_module("pyseq._C")
Subclass = type("Subclass", (Tensor,), {})
NAMED = (*_check.FLOATS, torch.int32, torch.int64, torch.bool)  # whose names the extension knows


@pytest.fixture(params=["exchange", "attributes"], autouse=True)
def by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to a tensor's memory."""
    _C.allow_exchange(request.param == "exchange")
    if request.param == "exchange" and not _C.has_exchange():
        pytest.skip("this torch has no exchange table")
    assert _C.has_exchange() == (request.param == "exchange")
    yield
    _C.allow_exchange(True)


@pytest.mark.parametrize("dtype", NAMED, ids=str)
def test_a_tensor_is_seen_as_it_lies(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 4, 5, dtype=dtype)
    for view in (x, x.permute(3, 1, 0, 2), x[:, 1:, ::2], x[:1].expand(7, 3, 4, 5), x[0, 0, 0], x[0, 0, 0, 0], x[:0]):
        assert _C.seen(view) == (str(dtype)[6:], tuple(view.shape), view.stride())
    assert _C.seen(nn.Parameter(x, requires_grad=False)) == _C.seen(x)
    assert _C.seen(x.as_subclass(Subclass)) is not None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about its nested tensors
def test_what_cannot_be_read_is_not_seen() -> None:
    """Or seen to have another type."""
    x = torch.ones(2, 3)
    nested = torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged)
    other: Any = [x.to_sparse(), x.to("meta"), nested, torch._efficientzerotensor((2,)), torch.ones([1] * 9)]
    with FakeTensorMode():
        other.append(torch.ones(2))
    for unreadable in (*other, None, 3, Tensor, "x", x.numpy()):
        assert _C.seen(unreadable) is None
    for dtype in (torch.uint8, torch.int16, torch.complex64):
        assert (_C.seen(x.to(dtype)) or ["other"])[0] == "other"


def test_lists_of_contiguous_tensors() -> None:
    """Of any rank and of several types, as an optimizer's parameters are."""
    good = [torch.ones(2, 3), torch.ones(4, 2, 2, 2, 3, dtype=torch.bfloat16), torch.ones(()), torch.ones(0, 5)]
    assert _C.seen(good) == [("float32", 6), ("bfloat16", 96), ("float32", 1), ("float32", 0)]
    assert _C.seen([]) == []
    for bad in (torch.ones(3, 2).t(), torch.ones(4)[::2], torch.ones(2, device="meta"), None, 3.0):
        assert _C.seen([*good, bad]) is None


Inputs = namedtuple("Inputs", "x shared index flag", defaults=(None, None, None))
SIGNATURE = _check.Signature(
    x="scores (batch, width+)", shared="sums (width, width)?", index="integers (batch,)?", flag="booleans (batch,)?"
)


def good(dtype: torch.dtype = torch.float32) -> Inputs:
    x, shared = torch.ones(3, 2, dtype=dtype), torch.ones(2, 2, dtype=torch.promote_types(dtype, torch.float32))
    return Inputs(x, shared, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", _check.FLOATS, ids=str)
def test_what_passes_unchecked_would_pass_the_checks(dtype: torch.dtype) -> None:
    """And comes back as it is, whatever its strides."""
    plain, slow = good(dtype), copy.copy(SIGNATURE)
    slow._fits = lambda *_: False
    twisted = plain._replace(x=plain.x.t().contiguous().t(), shared=nn.Parameter(plain.shared.t()))
    for given in (plain, twisted, Inputs(plain.x), plain._replace(index=None), Inputs(plain.x[:0])):
        assert SIGNATURE._fits(given)
        assert SIGNATURE(given) is given
        assert all(a is b for a, b in zip(slow(given), given, strict=True))
    assert not SIGNATURE._fits(plain._replace(x=plain.x[:0]))


SPOIL: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda x: x.to(torch.int16),
    "wider": lambda x: x.double() if x.is_floating_point() else x.to(torch.uint8),
    "short": lambda x: x[:-1],
    "empty": lambda x: x[..., :0],
    "deep": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.sum().to(x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "list": lambda x: x.tolist(),
    "symbolic": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negative": lambda x: torch._neg_view(x) if x.is_floating_point() else x.int(),
    "subclass": lambda x: x.as_subclass(Subclass),
}


@pytest.mark.parametrize("name", Inputs._fields)
def test_nothing_that_wants_a_check_passes_without(name: str) -> None:
    """Also no call of another form."""
    given = good()
    assert SIGNATURE._fits(given)
    for how, spoil in SPOIL.items():
        assert not SIGNATURE._fits(given._replace(**{name: spoil(getattr(given, name))})), how
    for other in ((), given[:3], [*given], None, given._replace(x=None)):
        assert not SIGNATURE._fits(other)


def test_conversions_and_messages() -> None:
    """Of dtypes and layouts; those about shapes and devices are in the tests of each room."""
    x = good().x
    converted = SIGNATURE(Inputs(x.bfloat16(), good().shared.half(), torch.zeros(3, dtype=torch.int32)))
    assert [t.dtype for t in converted[:3]] == [torch.bfloat16, torch.float32, torch.int64]
    for given, message in (
        ((x.int(),), r"x must be of dtype torch\.float32, .* or torch\.float16, got torch\.int32"),
        ((x, x[:2].to_sparse()), r"shared must be a dense tensor .*; use to_dense\(\)"),
        ((x, None, x[:, 0]), r"index must be of dtype torch\.int64 or torch\.int32, got torch\.float32"),
        ((x, None, None, x[:, 0]), r"flag must be of dtype torch\.bool, got .*; use flag\.bool\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            SIGNATURE(Inputs(*given))
