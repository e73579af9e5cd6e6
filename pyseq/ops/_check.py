"""Argument checks that every room shares. A message names the argument, what it got, what was wanted, and the mend."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Kind = Literal["scores", "sums", "integers", "booleans"]
Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Argument(NamedTuple):
    name: str
    kind: Kind
    sizes: tuple[str, ...]
    filled: tuple[str, ...]  # sizes that must not be 0
    optional: bool

    @property
    def meaning(self) -> str:
        return f"({', '.join(self.sizes)}{',' if len(self.sizes) == 1 else ''})"


class Signature:
    """What tensors an op takes, each declared as "kind (sizes)", with a question mark where it may be None.

    A size of one name is one number throughout; one with a plus where it first stands is not 0. Kinds: "scores", any
    float dtype: the first argument, which decides the device and the dtype of the sums, float64 beside float64, else
    float32; "sums", converted to that dtype; "integers", converted to int64; "booleans".

    >>> class Inputs(NamedTuple):
    ...     x: Tensor
    ...     labels: Tensor | None
    >>> check = Signature(x="scores (rows, width+)", labels="integers (rows,)?")
    >>> check(Inputs(torch.zeros(2, 3), torch.tensor([0, 1, 2])))
    Traceback (most recent call last):
    ValueError: labels must have shape (rows,) = (2,), got (3,)
    """

    def __init__(self, **arguments: str) -> None:
        self.arguments = []
        for name, text in arguments.items():
            kind, sizes = text.split(" ", 1)
            words = [word.strip() for word in sizes.strip("()?").split(",") if word.strip()]
            names, filled = tuple(w.rstrip("+") for w in words), tuple(w.rstrip("+") for w in words if w.endswith("+"))
            self.arguments.append(_Argument(name, kind, names, filled, text.endswith("?")))  # type: ignore[arg-type]

    def __call__(self, given: Inputs) -> Inputs:
        """The arguments, a NamedTuple, converted where that loses nothing. ValueError for a shape or device, TypeError
        for what is no dense tensor of a fitting dtype."""
        if not torch.compiler.is_compiling() and self._fits(given):  # a fifth of the time
            return given
        lead = _lead(self.arguments[0], given[0])
        sizes: dict[str, int] = {}
        out: list[Any] = []
        for argument, x in zip(self.arguments, given, strict=True):
            if x is None and argument.optional:
                out.append(None)
                continue
            shape = tuple(sizes.get(name, -1) for name in argument.sizes)
            x = lead if argument.kind == "scores" else _beside(argument, x, shape, self.arguments[0].name, lead)
            sizes |= zip(argument.sizes, x.shape, strict=True)
            for name in argument.filled:
                if sizes[name] == 0:
                    raise ValueError(f"{argument.name} must not be empty along {name}, got shape {tuple(x.shape)}")
            # launchers read memory, where the sign of a conjugate's imaginary part may be missing
            out.append(x.resolve_neg() if x.is_floating_point() else x)
        return type(given)(*out)

    @functools.cached_property
    def _fits(self) -> Callable[..., bool]:
        """Whether nothing is left to say and to convert, asked in C++; never, without it."""
        try:
            _C = importlib.import_module("pyseq._C")
            signature, numbers = _C.Signature(), dict[str, int]()
            for argument in self.arguments:
                sizes = [numbers.setdefault(name, len(numbers)) for name in argument.sizes]
                filled = [numbers[name] for name in argument.filled]
                signature.add(getattr(_C.Kind, argument.kind), sizes, filled, argument.optional)
            return signature.fits  # type: ignore[no-any-return]
        except (ImportError, AttributeError):  # missing, or older than pyseq
            return lambda *_: False


def positive(name: str, x: object) -> None:
    """TypeError unless x is an integer, ValueError unless it is at least 1."""
    if not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name} must be an integer, got {x!r}")
    if x < 1:
        raise ValueError(f"{name} must be at least 1, got {x}")


def wide(lead: Tensor) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if lead.dtype == torch.float64 else torch.float32


def _lead(argument: _Argument, x: object) -> Tensor:
    x = _dense(argument, x)
    if x.dim() != len(argument.sizes):
        raise ValueError(f"{argument.name} must have shape {argument.meaning}, got {tuple(x.shape)}")
    _of_dtype(argument.name, x, FLOATS)
    return x


def _beside(argument: _Argument, x: object, shape: tuple[int, ...], lead_name: str, lead: Tensor) -> Tensor:
    """shape: -1 where a size is free."""
    name, kind = argument.name, argument.kind
    x = _dense(argument, x)
    if x.dim() != len(shape) or any(b not in (-1, a) for a, b in zip(x.shape, shape, strict=True)):
        known = f" = {shape}" if -1 not in shape else ""
        raise ValueError(f"{name} must have shape {argument.meaning}{known}, got {tuple(x.shape)}")
    if kind == "sums":
        _of_dtype(name, x, FLOATS)
        if x.dtype == torch.float64 != lead.dtype:
            raise TypeError(f"{name} is {x.dtype} but {lead_name} is {lead.dtype}; convert one of them")
    elif kind == "integers":
        _of_dtype(name, x, (torch.int64, torch.int32))
    else:
        _of_dtype(name, x, (torch.bool,), f"; use {name}.bool()")
    if x.device != lead.device:
        raise ValueError(f"{name} is on {x.device} but {lead_name} is on {lead.device}; move one of them")
    return x.to(wide(lead)) if kind == "sums" else x.long() if kind == "integers" else x


def _of_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], mend: str = "") -> None:
    if x.dtype not in dtypes:
        *others, last = map(str, dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} must be of dtype {wanted}, got {x.dtype}{mend}")


def _dense(argument: _Argument, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument.name} must be a tensor of shape {argument.meaning}, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        advice = "use padding and a mask" if x.is_nested else "use to_dense()"
        raise TypeError(
            f"{argument.name} must be a dense tensor of shape {argument.meaning}, got a {kind} one; {advice}"
        )
    return x
