"""What the extension sees of a tensor, and which arguments it passes without a check in Python."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyseq.ops import _check

_C: Any = importlib.import_module("pyseq._C")
DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}


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


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_a_tensor_is_seen_as_it_lies(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 4, 5, dtype=dtype)
    for view in (x, x.permute(3, 1, 0, 2), x[:, 1:, ::2], x[:1].expand(7, 3, 4, 5), x[0, 0, 0], x[0, 0, 0, 0], x[:0]):
        assert _C.seen(view) == (DTYPES[dtype], tuple(view.shape), view.stride())
    assert _C.seen(nn.Parameter(x, requires_grad=False)) == (DTYPES[dtype], (2, 3, 4, 5), (60, 20, 5, 1))
    assert _C.seen(x.as_subclass(Subclass)) is not None


def test_what_has_another_type_is_seen_to_have_one() -> None:
    for dtype in (torch.uint8, torch.int16, torch.complex64):
        seen = _C.seen(torch.ones(2, dtype=dtype))
        assert seen is None or seen[0] == "other"


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about its nested tensors
def test_what_cannot_be_read_is_not_seen() -> None:
    x = torch.ones(2, 3)
    nested = torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged)
    other: Any = [x.to_sparse(), x.to("meta"), nested, torch._efficientzerotensor((2,)), torch.ones([1] * 9)]
    with FakeTensorMode():
        other.append(torch.ones(2))
    for unreadable in (*other, None, 3, Tensor, "x", x.numpy()):
        assert _C.seen(unreadable) is None


def test_lists_of_contiguous_tensors() -> None:
    """Of any rank and of several types, as an optimizer's parameters are."""
    good = [torch.ones(2, 3), torch.ones(4, 2, 2, 2, 3, dtype=torch.bfloat16), torch.ones(()), torch.ones(0, 5)]
    assert _C.seen(good) == [("float32", 6), ("bfloat16", 96), ("float32", 1), ("float32", 0)]
    assert _C.seen([]) == []
    for bad in (torch.ones(3, 2).t(), torch.ones(4)[::2], torch.ones(2, device="meta"), None, 3.0):
        assert _C.seen([*good, bad]) is None


class Inputs(NamedTuple):
    x: Any
    shared: Any = None
    index: Any = None
    flag: Any = None


SIGNATURE = _check.Signature(
    x="scores (batch, width+)", shared="sums (width, width)?", index="integers (batch,)?", flag="booleans (batch,)?"
)


def good(dtype: torch.dtype = torch.float32) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    x, shared = torch.ones(3, 2, dtype=dtype), torch.ones(2, 2, dtype=wide)
    return Inputs(x, shared, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", _check.FLOATS, ids=str)
def test_what_passes_unchecked_would_pass_the_checks(dtype: torch.dtype) -> None:
    """And comes back as it is, whatever its strides."""
    plain = good(dtype)
    twisted = plain._replace(x=plain.x.t().contiguous().t(), shared=nn.Parameter(plain.shared.t()))
    slow = _check.Signature(x="scores (batch, width+)", shared="sums (width, width)?")
    slow.arguments = SIGNATURE.arguments
    slow._fits = lambda *_: False
    for given in (plain, twisted, Inputs(plain.x), plain._replace(index=None), plain._replace(x=plain.x[:0])):
        fits = given.x.numel() > 0 or given.index is None
        assert SIGNATURE._fits(given) == fits
        if fits:
            assert SIGNATURE(given) is given
            assert all(a is b for a, b in zip(slow(given), given, strict=True))


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


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("name", Inputs._fields)
def test_nothing_that_wants_a_check_passes_without(name: str, spoil: str) -> None:
    given = good()
    assert SIGNATURE._fits(given)
    assert not SIGNATURE._fits(given._replace(**{name: SPOIL[spoil](getattr(given, name))}))


def test_calls_of_another_form_do_not_fit() -> None:
    for given in ((), good()[:3], [*good()], None, good()._replace(x=None)):
        assert not SIGNATURE._fits(given)


def test_conversions_and_messages() -> None:
    """What the declaration says; each room's tests have the messages of its own arguments."""
    x = good().x
    converted = SIGNATURE(Inputs(x.bfloat16(), good().shared.half(), torch.zeros(3, dtype=torch.int32)))
    assert [t.dtype for t in converted[:3]] == [torch.bfloat16, torch.float32, torch.int64]
    for given, error, message in (
        (Inputs(x[0]), ValueError, r"x must have shape \(batch, width\), got \(2,\)"),
        (Inputs(x[:, :0]), ValueError, r"x must not be empty along width, got shape \(3, 0\)"),
        (Inputs(x.int()), TypeError, r"x must be of dtype torch\.float32, .* or torch\.float16, got torch\.int32"),
        (Inputs([1.0]), TypeError, r"x must be a tensor of shape \(batch, width\), got list"),
        (Inputs(x, x), ValueError, r"shared must have shape \(width, width\) = \(2, 2\), got \(3, 2\)"),
        (
            Inputs(x, x[:2].double()),
            TypeError,
            r"shared is torch\.float64 but x is torch\.float32; convert one of them",
        ),
        (Inputs(x, x[:2].to("meta")), ValueError, "shared is on meta but x is on cpu; move one of them"),
        (Inputs(x, x[:2].to_sparse()), TypeError, r"shared must be a dense tensor .*; use to_dense\(\)"),
        (
            Inputs(x, None, x[:, 0]),
            TypeError,
            r"index must be of dtype torch\.int64 or torch\.int32, got torch\.float32",
        ),
        (Inputs(x, None, None, x[:, 0]), TypeError, r"flag must be of dtype torch\.bool, got .*; use flag\.bool\(\)"),
    ):
        with pytest.raises(error, match=message):
            SIGNATURE(given)
