"""What a graph is made of, and what the model's code sees while one is recorded: stand-ins for tensors and sizes."""

import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyseq._capture._trace import Trace

UNARY = ("neg", "pos", "invert", "abs")
BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
OWN = Path(__file__).parent
HERE = (str(Path(torch.__file__).parent), mock.__file__, str(OWN), str(OWN.with_name("surgery")))  # not a model's


class Uncapturable(RuntimeError):
    """Why a forward pass is no graph."""


def mapped(change: Callable[[Any], Any], tree: Any, build: bool = False) -> Any:
    """A structure of tuples, lists, dicts, slices and dataclasses (as Built, unless build) with its leaves changed."""
    again = partial(mapped, change, build=build)
    kind = type(tree)
    if kind is Node or kind in STAND_INS:
        return change(tree)
    if isinstance(tree, tuple):
        return kind._make(map(again, tree)) if hasattr(tree, "_fields") else tuple(map(again, tree))
    if isinstance(tree, list):
        return list(map(again, tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: again(getattr(tree, f.name)) for f in fields(tree)}
        return kind(**values) if build else Built(kind, values)
    if kind is Built:
        return Built(tree.kind, again(tree.values))
    if isinstance(tree, dict):
        return {name: again(x) for name, x in tree.items()}
    if isinstance(tree, slice):
        return slice(again(tree.start), again(tree.stop), again(tree.step))
    return change(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, tree)
    return found


def version(x: Tensor) -> int:
    """Counts writes; of inference tensors, which nobody may write to outside of that mode, none."""
    return 0 if x.is_inference() else x._version


class Built:
    """A dataclass to be made of values."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values


@dataclass(eq=False)
class Node:
    """One step of a forward pass. args and kwargs hold the nodes whose results it takes."""

    index: int
    op: str  # input, tensor (a parameter or buffer), module, function, method
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owner: str  # path of the module whose forward did it
    where: str  # file and line
    address: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    mutates: list["Node"] = field(default_factory=list)
    under: tuple[str, ...] = ()  # contexts that it runs in, as code

    def __repr__(self) -> str:
        return f"<{self.index}: {self.address or self.op}>"

    @property
    def inputs(self) -> list["Node"]:
        return [x for x in leaves((self.args, self.kwargs)) if type(x) is Node]


@dataclass(frozen=True)
class Guard:
    """What the Python code read of a size to go on: a part that can see the size holds it to that."""

    node: Node
    seen: Any
    position: int  # in the nodes, when it was read
    number: bool  # it became a plain number, not only a branch
    where: str
    owner: str  # path of the module in whose forward

    @property
    def line(self) -> tuple[str, str]:
        return self.where, self.owner


@dataclass(frozen=True)
class Flag:
    """The training flag of a module, or its contrary, where the forward pass took it as an argument."""

    owner: str
    contrary: bool = False


@dataclass(frozen=True)
class Held:
    """What a value has in it that no node gives: the part that wants it is no graph."""

    number: int  # equal for one object
    reason: str


@dataclass
class Graph:
    """Of one mode. places: for each address the results (structures of nodes) of each time that it was computed.

    closed: modules whose own code is none, and why.
    """

    nodes: list[Node]
    places: dict[str, list[Any]]
    inputs: dict[str, Any]
    output: Any
    guards: list[Guard]
    constants: dict[str, Tensor]
    closed: dict[str, str] = field(default_factory=dict)


class Sizes(tuple[Any, ...]):
    """A shape whose sizes are recorded."""

    __slots__ = ()

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total


class Value:
    """What the model's code sees for a size, or for another object that a node gave; of a tensor, `TensorValue`."""

    def __init__(self, trace: "Trace", node: Node, real: Any) -> None:
        self._trace, self._node, self._real = trace, node, real

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._real)  # never a tensor's: C code would take this object for one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if callable(real):
            raise Uncapturable(f"{name}() of {type(self._real).__name__} at {place()}")
        return self._trace.function(getattr, (self, name), {}, name) if isinstance(real, Tensor) else real

    def __getitem__(self, index: Any) -> Any:
        return self._trace.function(operator.getitem, (self, index), {}, "getitem")

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._real)

    def __bool__(self) -> bool:
        return bool(self._trace.guard(self, number=False))

    def __int__(self) -> int:
        return int(self._trace.guard(self, number=True))

    def __float__(self) -> float:
        return float(self._trace.guard(self, number=True))

    def __index__(self) -> int:
        return operator.index(self._trace.guard(self, number=True))

    def __hash__(self) -> int:
        return hash(self._trace.guard(self, number=True))

    def __repr__(self) -> str:
        return repr(self._real)

    def __format__(self, spec: str) -> str:
        return format(self._real, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Uncapturable(f"a size is copied or pickled at {place()}")


def refused(what: str) -> Callable[..., Any]:
    def method(self: Any, *_: Any) -> Any:
        raise Uncapturable(f"{what} at {place()}")

    return method


class TensorValue(Tensor):
    """What the model's code sees for a tensor: one of its own right, whose every use is recorded."""

    _trace: "Trace"
    _node: Node
    _real: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        real = getattr(self._real, name)
        if callable(real):
            return partial(self._trace.method, name, self)
        if name in ("shape", "device") or isinstance(real, Tensor):
            return self._trace.function(getattr, (self, name), {}, name)
        return real

    def __setattr__(self, name: str, new: Any) -> None:
        if not name.startswith("_"):
            raise Uncapturable(f"an attribute of a tensor is set at {place()}")
        object.__setattr__(self, name, new)

    def __getitem__(self, index: Any) -> Any:
        return self._trace.function(operator.getitem, (self, index), {}, "getitem")

    def __setitem__(self, index: Any, new: Any) -> None:
        self._trace.function(operator.setitem, (self, index, new), {}, "setitem")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._real)

    def __format__(self, spec: str) -> str:
        return format(self._real, spec)

    __hash__ = object.__hash__
    __bool__ = __int__ = __float__ = __complex__ = __index__ = __contains__ = refused("a tensor's values are read")
    __array__ = refused("a tensor becomes an array")
    __reduce_ex__ = __deepcopy__ = refused("a tensor is copied or pickled")


STAND_INS = (Value, TensorValue)


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """A call of torch that has stand-ins among its arguments."""
    trace = next(x for x in leaves((args, kwargs)) if type(x) in STAND_INS)._trace
    name = getattr(func, "__name__", "call")
    if torch.overrides.is_tensor_method_or_property(func):
        if name in ("__get__", "__set__"):
            raise Uncapturable(f"an attribute of a tensor is read or set by torch at {place()}")
        return trace.method(name, *args, **kwargs)
    return trace.function(func, args, kwargs, name)


def _add_operators() -> None:
    def add(name: str, run: Callable[..., Any], label: str, swapped: bool = False) -> None:
        def method(self: Any, *other: Any) -> Any:
            return self._trace.function(run, (*other, self) if swapped else (self, *other), {}, label)

        for kind in STAND_INS:
            setattr(kind, f"__{name}__", method)

    for name in (*UNARY, *BINARY, *COMPARED):
        run, short = getattr(operator, name), name.rstrip("_")
        add(short, run, short)
        if name in BINARY:
            add(f"r{short}", run, short, swapped=True)
            add(f"i{short}", getattr(operator, f"i{short}"), short)


_add_operators()


def place() -> str:
    """File and line of the code outside torch that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
