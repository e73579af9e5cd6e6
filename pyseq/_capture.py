"""A forward pass as a graph of named nodes, for surgery and initialisation.

The model runs on an example, in training and in evaluation mode, and its Python code sees stand-ins that
carry the real tensors and sizes: what it computes with them is recorded, and a branch that hangs on a tensor's values
cannot be. Modules of torch, and those whose code cannot be recorded, are nodes as they are, unless asked to be opened.
"""

import inspect
import math
import operator
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
SIZED = ("broadcast_to", "chunk", "narrow", "repeat_interleave", "reshape", "roll", "split", "tile", "unflatten")
FLOATS = ("ceil", "exp", "floor", "log", "log2", "log10", "pow", "prod", "sqrt")  # of math
PLAIN = ("dim", "ndimension", "get_device", "element_size", "untyped_storage", "data_ptr")  # asked once, never recorded
VALUES = ("item", "tolist", "numpy", "__array__", "is_nonzero", "equal", "allclose")  # read a tensor's values
SIZES = ("size", "numel", "nelement", "stride", "storage_offset", "__len__")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
UNARY = ("neg", "pos", "invert", "abs")
BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift",
)  # fmt: skip
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
OWN = Path(__file__)
HERE = (str(Path(torch.__file__).parent), mock.__file__, str(OWN), str(OWN.with_name("surgery")))
APPLY = torch.autograd.Function.__dict__["apply"]
LOCK = threading.RLock()


class Uncapturable(RuntimeError):
    """Why a forward pass is no graph."""


def mapped(change: Callable[[Any], Any], tree: Any, build: bool = False) -> Any:
    """A structure of tuples, lists, dicts, slices and dataclasses (as Built, unless build) with its leaves changed."""
    again = partial(mapped, change, build=build)
    kind = type(tree)
    if kind is Node or kind in STAND_INS:
        return change(tree)
    if isinstance(tree, tuple):
        return kind(*map(again, tree)) if hasattr(tree, "_fields") else tuple(map(again, tree))
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


@dataclass(frozen=True)
class Flag:
    """The training flag of a module, or its contrary, where the forward pass took it as an argument."""

    owner: str
    contrary: bool = False


@dataclass
class Graph:
    """Of one mode. places: for each address the results (structures of nodes) of each time that it was computed."""

    nodes: list[Node]
    places: dict[str, list[Any]]
    inputs: dict[str, Any]
    output: Any
    guards: list[Guard]
    constants: dict[str, Tensor]


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


@dataclass
class Frame:
    """A call of a module that is open: its path, and how often each function was called in it."""

    path: str
    names: Counter[str] = field(default_factory=Counter)

    def address(self, name: str) -> str:
        """Of a function's result: the second relu of a call is relu_1."""
        name = name.strip("_")
        name = {"truediv": "div", "iadd": "add", "rsub": "sub"}.get(name, name)
        self.names[name] += 1
        name = f"{name}_{self.names[name] - 1}" if self.names[name] > 1 else name
        return f"{self.path}.{name}" if self.path else name


def of_torch(module: nn.Module) -> bool:
    """One of torch's own modules that is a value as a whole."""
    return type(module).__module__.partition(".")[0] == "torch" and not isinstance(module, CONTAINERS)


class Trace:
    """Records one run."""

    def __init__(self, model: nn.Module, opaque: Collection[str], descend: Collection[str]) -> None:
        self.model, self.opaque, self.descend = model, opaque, descend
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self.graph = Graph([], {}, {}, None, [], {})
        self.frames = [Frame("")]
        self.known: dict[str, TensorValue] = {}  # of parameters and buffers
        self.kept: list[tuple[Node, Tensor, int]] = []  # with the version that the node made
        self.latest: dict[int, Node] = {}  # of tensors that a node changed in place and returned
        self.running, self.culprit, self.thread = False, "", threading.get_ident()
        self.assigned: list[tuple[nn.Module, str, Any]] = []

    @property
    def active(self) -> bool:
        return self.running and threading.get_ident() == self.thread

    def _node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Node:
        node = Node(len(self.graph.nodes), op, target, args, dict(kwargs or {}), self.frames[-1].path, place())
        self.graph.nodes.append(node)
        return node

    def _kept(self, node: Node, tensor: Tensor) -> TensorValue:
        node.shape, node.dtype = (*tensor.shape,), tensor.dtype
        self.kept.append((node, tensor, tensor._version))
        stand_in = tensor.detach().as_subclass(TensorValue)
        stand_in._trace, stand_in._node, stand_in._real = self, node, tensor
        return stand_in

    def input(self, name: str, x: Any) -> Any:
        """Of the model, a stand-in for each tensor in it."""

        def stand_in(leaf: Any) -> Any:
            return self._kept(node(), leaf) if isinstance(leaf, Tensor) else leaf

        def node() -> Node:
            return self._node("input", name)

        found = mapped(stand_in, x)
        self.graph.inputs[name] = mapped(self._of, found)
        return found

    def tensor(self, name: str, x: Tensor) -> TensorValue:
        if name not in self.known:
            self.known[name] = self._kept(self._node("tensor", name), x)
        return self.known[name]

    def _of(self, x: Any) -> Any:
        """The node of a stand-in, or of a tensor of the model's; other tensors are constants of the part."""
        if type(x) in STAND_INS:
            later = self.latest.get(id(x._real), x._node)
            return later if later.index > x._node.index else x._node
        if not isinstance(x, Tensor):
            return x
        name = self.names.get(id(x))
        if name is None:
            name = next((n for n, t in self.graph.constants.items() if t is x), f"constant_{len(self.graph.constants)}")
            self.graph.constants[name] = x
        return self.tensor(name, x)._node

    def _run(self, op: str, target: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Node, Any]:
        nodes = mapped(self._of, (args, kwargs))
        real = mapped(lambda x: x._real if type(x) in STAND_INS else x, (args, kwargs))
        given = [x for x in leaves(real) if isinstance(x, Tensor)]
        before = [x._version for x in given]
        self.running = False
        try:
            result = call(*real[0], **real[1])
        finally:
            self.running = True
        node = self._node(op, target, *nodes)
        if [x._version for x in given] != before:
            self._changed(node, result)
        return node, result

    def _changed(self, node: Node, result: Any) -> None:
        """A node wrote into tensors: whoever reads one of them later comes after it."""
        for i, (owner, tensor, version) in enumerate(self.kept):
            if tensor._version != version:
                self.kept[i] = (owner, tensor, tensor._version)
                node.mutates.append(owner)
                if tensor is result:
                    self.latest[id(tensor)] = node

    def _wrapped(self, node: Node, result: Any, symbolic: bool) -> Any:
        if isinstance(result, Tensor):
            return self._kept(node, result)
        items: Any = partial(self._item, node)
        if isinstance(result, torch.Size):
            return Sizes(items(i, x, True) for i, x in enumerate(result))
        if isinstance(result, (tuple, list)):
            found = [items(i, x, symbolic) for i, x in enumerate(result)]
            return type(result)(*found) if hasattr(result, "_fields") else type(result)(found)
        if type(result) is dict:
            return {name: items(name, x, symbolic) for name, x in result.items()}
        if result is None or not (symbolic or is_dataclass(result) or isinstance(result, torch.device)):
            return result
        return Value(self, node, result)

    def _item(self, node: Node, index: Any, x: Any, symbolic: bool) -> Any:
        if not (symbolic or isinstance(x, (Tensor, tuple, list, dict))):
            return x
        return self._wrapped(self._node("function", operator.getitem, (node, index)), x, symbolic)

    def _named(self, node: Node, name: str, found: Any) -> Any:
        """An address, where the result has tensors."""
        if any(type(x) is TensorValue for x in leaves(found)):
            self._place(self.frames[-1].address(name), node, found)
        return found

    def _place(self, address: str, node: Node | None, found: Any) -> None:
        times = self.graph.places.setdefault(address, [])
        times.append(mapped(self._of, found))
        if node is not None:
            node.address = address if len(times) == 1 else f"{address}#{len(times) - 1}"

    def function(self, func: Any, args: tuple[Any, ...], kwargs: Any, name: str) -> Any:
        if name in VALUES:
            raise Uncapturable(f"{name} reads a tensor's values at {place()}")
        node, result = self._run("function", func, func, args, kwargs)
        tensors = any(isinstance(getattr(x, "_real", x), Tensor) for x in leaves((args, kwargs)))
        symbolic = not tensors or name in SIZES
        return self._named(node, name, self._wrapped(node, result, symbolic))

    def method(self, name: str, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        if name in VALUES:
            raise Uncapturable(f"{name}() reads a tensor's values at {place()}")
        if name in PLAIN or name.startswith("is_"):
            return getattr(x._real, name)(*args, **kwargs)

        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(own, name)(*args, **kwargs)

        node, result = self._run("method", name, call, (x, *args), kwargs)
        return self._named(node, name, self._wrapped(node, result, name in SIZES))

    def module(self, module: nn.Module, path: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        modes = [(m, m.training) for m in module.modules()]
        for m, _ in modes:  # shapes are the same, and statistics stay as they are
            m.training = False
        try:
            node, result = self._run("module", path, partial(call, module), args, kwargs)
        finally:
            for m, mode in modes:
                m.training = mode
        found = self._wrapped(node, result, False)
        self._place(path, node, found)
        return found

    def guard(self, value: Value, number: bool) -> Any:
        here = Guard(value._node, value._real, len(self.graph.nodes), number, place())
        self.graph.guards.append(here)
        return value._real

    def called(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of a module, in place of nn.Module.__call__."""
        path = self.paths.get(id(module))
        if not self.active or path is None:
            return original(module, *args, **kwargs)
        if path and self._closed(module, path):
            return self.module(module, path, original, args, kwargs)
        self.frames.append(Frame(path))
        first = len(self.graph.nodes)
        try:
            found = original(module, *args, **kwargs)
        except BaseException:
            self.culprit = self.culprit or path
            raise
        finally:
            self.frames.pop()
        if path:
            if any(self._is_passed(first, x) for x in leaves(found)):
                found = mapped(partial(self._own, first), found, build=True)
            self._place(path, None, found)
        return found

    def _is_passed(self, first: int, x: Any) -> bool:
        return type(x) is TensorValue and self._of(x).index < first  # type: ignore[no-any-return]

    def _own(self, first: int, x: Any) -> Any:
        """A result of a module that only passed it on gets a node of its own, so that others keep theirs."""
        if not self._is_passed(first, x):
            return x
        return self._wrapped(*self._run("function", passed, passed, (x,), {}), False)

    def _closed(self, module: nn.Module, path: str) -> bool:
        if any(name.startswith(f"{path}.") for name in self.descend):
            return False
        hooks = getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None)
        return bool(of_torch(module) or hooks or path in self.opaque or parametrize.is_parametrized(module))

    def attribute(self, original: Callable[..., Any], module: nn.Module, name: str) -> Any:
        """In place of nn.Module.__getattr__, which finds parameters, buffers and modules."""
        found = original(module, name)
        if not self.active or not isinstance(found, Tensor) or id(found) not in self.names:
            return found
        return self.tensor(self.names[id(found)], found)

    def assign(self, original: Callable[..., Any], module: nn.Module, name: str, new: Any) -> None:
        """In place of nn.Module.__setattr__: what forward passes note down is taken back afterwards."""
        if self.active:
            if any(type(x) in STAND_INS for x in leaves(new)):
                raise Uncapturable(f"a tensor is kept as self.{name} at {place()}")
            if name != "training":
                self.assigned.append((module, name, module.__dict__.get(name, MISSING)))
        original(module, name, new)

    def apply(self, kind: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of torch.autograd.Function.apply, whose backward is not that of the operations inside."""
        own = APPLY.__get__(None, kind)
        given = leaves((args, kwargs))
        if not self.active or not any(type(x) in STAND_INS for x in given):
            return own(*args, **kwargs)
        if any(callable(x) and type(x) not in STAND_INS for x in given):
            raise Uncapturable(f"{kind.__name__} takes a function at {place()}")
        return self.function(own, args, kwargs, kind.__name__)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def function(module: Any, name: str) -> Any:
            original = getattr(module, name)

            @wraps(original)
            def own(*args: Any, **kwargs: Any) -> Any:
                given = any(type(x) in STAND_INS for x in leaves((args, kwargs)))
                if not self.active or not (given or name in FACTORIES):
                    return original(*args, **kwargs)
                return self.function(original, args, kwargs, name)

            return mock.patch.object(module, name, own)

        with LOCK, ExitStack() as patched:
            patched.enter_context(instead("__call__", self.called))
            patched.enter_context(instead("__getattr__", self.attribute))
            patched.enter_context(instead("__setattr__", self.assign))
            patched.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(self.apply)))
            for module, names in ((torch, (*FACTORIES, *SIZED)), (math, FLOATS)):
                for name in names:
                    patched.enter_context(function(module, name))
            self.running = True
            try:
                yield
            finally:
                self.running = False
        for module, name, old in reversed(self.assigned):
            if old is MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = old


MISSING = object()


def passed(x: Any) -> Any:
    """What a module hands on as it got it."""
    return x


def instead(name: str, own: Callable[..., Any]) -> Any:
    """A context in which own(original, module, ...) runs in place of that method of every module."""
    original = getattr(nn.Module, name)

    @wraps(original)
    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(original, module, *args, **kwargs)

    return mock.patch.object(nn.Module, name, method)


def arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example: a tuple, a dict, or one tensor."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict):
        return (), example
    wanted = "a tuple of the model's arguments, a dict of its keywords or a tensor"
    raise TypeError(f"example must be {wanted}, got {type(example).__name__}")


def signature(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name; of *args as args_0, args_1, ..."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"example does not fit {type(model).__name__}.forward: {error}") from None
    found: dict[str, Any] = {}
    for name, x in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}_{i}": one for i, one in enumerate(x)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found |= x
        else:
            found[name] = x
    return found


@contextmanager
def untouched(model: nn.Module, *more: Tensor) -> Iterator[None]:
    """Without gradients; behind it buffers, the tensors named, modes and random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, x) for m in model.modules() for name, x in m.named_buffers(recurse=False)]
    tensors = [(x, x.detach().clone()) for x in (*model.buffers(), *more)]
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, name, x in buffers:  # a forward pass may have put others in their place
            if getattr(module, name) is not x:
                setattr(module, name, x)
        for x, old in tensors:
            if not torch.equal(x, old):  # a copy would spoil graphs that hold the tensor
                x.detach().copy_(old)
        for module, mode in modes:
            module.training = mode


def _graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, opaque: set[str],
    descend: Collection[str],
) -> Graph:  # fmt: skip
    """One mode's graph; modules whose code cannot be recorded are added to `opaque`."""
    while True:
        trace = Trace(model, opaque, descend)
        names = iter(signature(model, args, kwargs))
        with untouched(model):
            for module in model.modules():
                module.training = training
            given = (
                [trace.input(next(names), x) for x in args],
                {name: trace.input(name, x) for name, x in kwargs.items()},
            )
            try:
                with trace.recording():
                    output = model(*given[0], **given[1])
            except Exception as error:
                inner = trace.culprit
                if not inner or inner in opaque or any(x.startswith(f"{inner}.") for x in descend):
                    raise Uncapturable(str(error)) from error
                opaque.add(inner)
                continue
        trace.graph.output = mapped(trace._of, output)
        return trace.graph


def capture(model: nn.Module, example: Any, descend: Collection[str] = ()) -> dict[bool, Graph]:
    """The graph in training and in evaluation mode, one object where they differ in training flags alone.

    descend: paths to open although they are torch's own. Raises Uncapturable, with the reason.
    """
    args, kwargs = arguments(model, example)
    opaque: set[str] = set()
    known = -1
    while len(opaque) != known:
        known = len(opaque)
        graphs = {mode: _graph(model, args, kwargs, mode, opaque, descend) for mode in (True, False)}
    merged = _merged(graphs[True], graphs[False])
    return {True: merged, False: merged} if merged else graphs


def _next(rest: Iterator[Any], _: Any) -> Any:
    return next(rest)


def _merged(train: Graph, still: Graph) -> Graph | None:
    """One graph for both modes, with flags where their arguments differ; None if their steps do."""
    if len(train.nodes) != len(still.nodes) or train.output.__class__ is not still.output.__class__:
        return None
    changed = []
    for a, b in zip(train.nodes, still.nodes, strict=True):
        if (a.op, a.target, a.owner, a.shape) != (b.op, b.target, b.owner, b.shape):
            return None
        one, other = leaves((a.args, a.kwargs)), leaves((b.args, b.kwargs))
        if len(one) != len(other):
            return None
        flags = []
        for x, y in zip(one, other, strict=True):
            if type(x) is Node:
                same = type(y) is Node and x.index == y.index
            elif isinstance(x, bool) and isinstance(y, bool) and x != y:
                flags.append(Flag(a.owner, contrary=not x))
                continue
            else:
                same = type(x) is type(y) and (x is y or bool(x == y))
            if not same:
                return None
            flags.append(x)
        changed.append((a, flags))
    if [x.index for x in leaves(train.output) if type(x) is Node] != [
        x.index for x in leaves(still.output) if type(x) is Node
    ]:
        return None
    for node, flags in changed:
        rest = iter(flags)
        node.args, node.kwargs = mapped(partial(_next, rest), (node.args, node.kwargs))
    return train
