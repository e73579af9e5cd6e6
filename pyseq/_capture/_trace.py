"""A run of a model that is recorded."""

import math
import operator
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from pyseq._capture._values import (
    STAND_INS,
    Graph,
    Guard,
    Held,
    Node,
    Sizes,
    TensorValue,
    Uncapturable,
    Value,
    leaves,
    mapped,
    place,
    version,
)  # fmt: skip

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
APPLY = torch.autograd.Function.__dict__["apply"]
LOCK = threading.RLock()


@dataclass
class Frame:
    """A call of a module that is open: its path, and how often each function was called in it."""

    path: str
    names: Counter[str] = field(default_factory=Counter)

    def address(self, name: str, paths: Collection[str]) -> str:
        """Of a function's result: the second relu of a call is relu_1, and so is the first beside a module relu."""
        name = name.strip("_")
        name = {"truediv": "div", "iadd": "add", "rsub": "sub"}.get(name, name)
        under = f"{self.path}." if self.path else ""
        if name not in self.names and f"{under}{name}" in paths:
            self.names[name] = 1
        self.names[name] += 1
        return f"{under}{name}_{self.names[name] - 1}" if self.names[name] > 1 else f"{under}{name}"


def of_torch(module: nn.Module) -> bool:
    """One of torch's own modules that is a value as a whole."""
    return type(module).__module__.partition(".")[0] == "torch" and not isinstance(module, CONTAINERS)


class Made(TorchFunctionMode):
    """Notes down the tensors that come to be inside of a node."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors.update((id(x), x) for x in leaves(result) if isinstance(x, Tensor))
        return result


class Trace:
    """Records one run. flip: a line of code in a module; what it reads of a size is taken for another there."""

    def __init__(self, model: nn.Module, opaque: Mapping[str, str], descend: Collection[str], flip: Any = None) -> None:
        self.opaque, self.descend, self.flip = opaque, descend, flip
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self.modules = {*self.paths.values()}
        self.graph = Graph([], {}, {}, None, [], {}, {**opaque})
        self.frames = [Frame("")]
        self.known: dict[str, TensorValue] = {}  # of parameters and buffers
        self.kept: list[tuple[Node, Tensor, int]] = []  # with the version that the node made
        self.latest: dict[int, Node] = {}  # of tensors that a node changed in place and returned
        self.first: dict[int, Node] = {}  # that gave a tensor
        self.made, self.casts = Made(), list[Any]()
        self.held: list[Any] = []
        self.running, self.culprit, self.thread = False, "", threading.get_ident()

    @property
    def active(self) -> bool:
        return self.running and threading.get_ident() == self.thread

    def _node(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Node:
        node = Node(len(self.graph.nodes), op, target, args, dict(kwargs or {}), self.frames[-1].path, place())
        if op not in ("input", "tensor"):
            node.under = self._under()
        self.graph.nodes.append(node)
        return node

    def _under(self) -> tuple[str, ...]:
        if torch.is_inference_mode_enabled():
            raise Uncapturable(f"inference mode at {place()}")
        casts = [f"torch.autocast({x.device!r}, {x.fast_dtype}, {x._enabled}, {x._cache_enabled})" for x in self.casts]
        return (*(() if torch.is_grad_enabled() else ("torch.no_grad()",)), *casts)

    def _kept(self, node: Node, tensor: Tensor) -> TensorValue:
        node.shape, node.dtype = (*tensor.shape,), tensor.dtype
        self.kept.append((node, tensor, version(tensor)))
        self.first.setdefault(id(tensor), node)
        stand_in = tensor.detach().as_subclass(TensorValue)
        stand_in._trace, stand_in._node, stand_in._real = self, node, tensor
        return stand_in

    def input(self, name: str, x: Any) -> Any:
        """Of the model, a stand-in for each tensor in it."""

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return self._kept(node(), leaf.clone() if leaf.is_inference() else leaf)

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
        """The node of a stand-in, or of a tensor of the model's; others that were there before are constants."""
        if type(x) in STAND_INS:
            return self._newest(x._node, x._real)
        if not isinstance(x, Tensor):
            if self._carries(x):
                raise Uncapturable(f"{type(x).__name__}, which holds tensors of the run, is used at {place()}")
            return x
        name = self.names.get(id(x))
        if name is None:
            if id(x) in self.first:
                return self._newest(self.first[id(x)], x)
            if id(x) in self.made.tensors:
                raise Uncapturable(f"a tensor that a module kept aside is used at {place()}")
            name = next((n for n, t in self.graph.constants.items() if t is x), f"constant_{len(self.graph.constants)}")
            self.graph.constants[name] = x
        return self.tensor(name, x)._node

    def _newest(self, node: Node, real: Any) -> Node:
        later = self.latest.get(id(real), node)
        return later if later.index > node.index else node

    def _seen(self, x: Any) -> Any:
        """What is at an address, or the model's output: a node, or why it is none."""
        try:
            return self._of(x)
        except Uncapturable as error:
            if not any(known is x for known in self.held):
                self.held.append(x)
            return Held(next(i for i, known in enumerate(self.held) if known is x), str(error))

    def _carries(self, x: Any, depth: int = 4) -> bool:
        """Whether an object has tensors of this run in it."""
        if type(x) in STAND_INS:
            return True
        if isinstance(x, Tensor):
            known = self.first.get(id(x))
            return id(x) not in self.names and (known.op != "tensor" if known else id(x) in self.made.tensors)
        if depth == 0 or isinstance(x, (type, nn.Module)):
            return False
        inner = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else ()
        return any(self._carries(one, depth - 1) for one in (*inner, *getattr(x, "__dict__", {}).values()))

    def _run(self, op: str, target: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Node, Any]:
        nodes = mapped(self._of, (args, kwargs))
        real = mapped(lambda x: x._real if type(x) in STAND_INS else x, (args, kwargs))
        given = [x for x in leaves(real) if isinstance(x, Tensor)]
        before = [version(x) for x in given]
        self.running = False
        try:
            with self.made:
                result = call(*real[0], **real[1])
        finally:
            self.running = True
        node = self._node(op, target, *nodes)
        if [version(x) for x in given] != before:
            self._changed(node, result)
        return node, result

    def _changed(self, node: Node, result: Any) -> None:
        """A node wrote into tensors: whoever reads one of them later comes after it."""
        for i, (owner, tensor, old) in enumerate(self.kept):
            if version(tensor) != old:
                self.kept[i] = (owner, tensor, version(tensor))
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
            self._place(self.frames[-1].address(name, self.modules), node, found)
        return found

    def _place(self, address: str, node: Node | None, found: Any) -> None:
        times = self.graph.places.setdefault(address, [])
        times.append(mapped(self._seen, found))
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
        here = Guard(value._node, value._real, len(self.graph.nodes), number, place(), self.frames[-1].path)
        self.graph.guards.append(here)
        if self.flip == here.line:
            return value._real + 1 if number else not value._real
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
        """In place of nn.Module.__setattr__."""
        if self.active and any(type(x) in STAND_INS for x in leaves(new)):
            raise Uncapturable(f"a tensor is kept as self.{name} at {place()}")
        original(module, name, new)

    def entered(self, original: Callable[..., Any], cast: Any) -> Any:
        if self.active:
            self.casts.append(cast)
        return original(cast)

    def left(self, original: Callable[..., Any], cast: Any, *error: Any) -> Any:
        if self.casts and self.casts[-1] is cast:
            self.casts.pop()
        return original(cast, *error)

    def seeded(self, original: Callable[..., Any], *args: Any) -> Any:
        if self.active:
            raise Uncapturable(f"random numbers are seeded at {place()}")
        return original(*args)

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
            for name, own in (("__call__", self.called), ("__getattr__", self.attribute), ("__setattr__", self.assign)):
                patched.enter_context(instead(name, own))
            patched.enter_context(instead("__enter__", self.entered, torch.autocast))
            patched.enter_context(instead("__exit__", self.left, torch.autocast))
            for name in ("manual_seed", "seed", "set_rng_state"):
                patched.enter_context(instead(name, self.seeded, torch))
            patched.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(self.apply)))
            for module, names in ((torch, (*FACTORIES, *SIZED)), (math, FLOATS)):
                for name in names:
                    patched.enter_context(function(module, name))
            self.running = True
            try:
                yield
            finally:
                self.running = False


def passed(x: Any) -> Any:
    """What a module hands on as it got it."""
    return x


def instead(name: str, own: Callable[..., Any], kind: Any = nn.Module) -> Any:
    """A context in which own(original, ...) runs in place of that method of every module, or of another kind."""
    original = getattr(kind, name)

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return own(original, *args, **kwargs)

    return mock.patch.object(kind, name, method)
