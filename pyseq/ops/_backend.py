"""Which backend serves an op on a device, and the reasons of those that do not."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from pyseq.ops import _torch
from pyseq.ops._autograd import refuse_tangents, refuse_transforms

Name = Literal["reference", "numba", "cpp", "triton"]
Backend = Literal["auto", "reference", "numba", "cpp", "triton"]
Op = TypeVar("Op", bound=Callable[..., Any])
BACKENDS: tuple[Name, ...] = get_args(Name)
OPS: list[Callable[..., Any]] = []  # every public op, in the order of definition
OLDEST_TRITON_FOR_AMD = (3, 8)


@dataclass
class _Settings:
    """What the environment said when pyseq was imported, and `use_backend` since."""

    backend: str = os.environ.get("PYSEQ_BACKEND") or "auto"
    source: object = "PYSEQ_BACKEND"  # or the `use_backend` that said so
    check: bool = os.environ.get("PYSEQ_CHECK") == "1"


settings = _Settings()


class use_backend:
    """What `backend="auto"` means from now on, or inside a `with` block, in the whole process.

    backend: "reference", "numba", "cpp" or "triton", which then serves every op or raises with its reasons; or "auto",
    each op's own order. Overrides the environment variable PYSEQ_BACKEND. Compiled and exported models obey it too,
    when they run. Raises ValueError for another name.
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be {_CHOICES}, got {backend!r}")
        self._backend = backend
        self._set()

    def _set(self) -> None:
        self._before = settings.backend, settings.source
        settings.backend, settings.source = self._backend, self

    def __enter__(self) -> None:
        if settings.source is not self:  # used again, or another one came between
            self._set()

    def __exit__(self, *exception: object) -> None:
        settings.backend, settings.source = self._before

    def __str__(self) -> str:
        return "use_backend"


_CHOICES = f"'auto' or one of {', '.join(BACKENDS)}"


@dataclass
class Backends:
    """Who may serve an op.

    room: folder of the launchers in `pyseq.kernels`. inputs: NamedTuple of the tensors that the room's launchers take.
    order: for each device type the compiled backends that "auto" asks, first choice first; the reference comes last,
    and serves other devices. A backend that is in no order has no kernel for the op.
    limits: a backend's own reasons against some inputs, of which all but the first tensor may be None.
    task: what is served, in messages. others: for an optional argument of a public op, who serves calls that give it.
    """

    room: str
    inputs: Callable[..., Any]
    order: Mapping[str, tuple[Name, ...]]
    limits: Mapping[str, Callable[[Any], list[str]]] = field(default_factory=dict)
    task: str = "this op"
    others: Mapping[str, "Backends"] = field(default_factory=dict)

    def op(self, function: Op) -> Op:
        """Decorate a public op, so that `explain` knows it."""
        function.backends = self  # type: ignore[attr-defined]
        OPS.append(function)
        return function

    @functools.cached_property
    def kernels(self) -> frozenset[str]:
        return frozenset().union(*self.order.values())

    def reasons(self, backend: str, inputs: Any) -> list[str]:
        """Why `backend` cannot serve these inputs; empty where it can."""
        if backend == "reference":
            return []
        if backend not in self.kernels:
            return [f"there is no {backend} kernel for {self.task}"]
        reasons = environment(self.room, backend, device_type(inputs))
        return self.limits[backend](inputs) if not reasons and backend in self.limits else reasons

    def way(self, backend: str, inputs: Any) -> tuple[bool, bool, str]:
        """How a public op is served: whether past the dispatcher; whether values out of range raise, as on the CPU in
        eager mode; and the backend. Raises where a derivative that ops do not carry would be dropped."""
        if _torch.plain(inputs):
            refuse_tangents(inputs)
            return True, device_type(inputs) == "cpu", self.choose(backend, inputs)
        if _torch.traced():
            return False, False, self.recorded(backend, inputs)
        refuse_transforms()
        return False, device_type(inputs) == "cpu", self.choose(backend, inputs)

    def recorded(self, backend: str, inputs: Any) -> str:
        """What a graph says: the backend as asked for, also "auto", for a better machine may run it. What has no
        kernels, the reference or a device without an order, is recorded operation by operation."""
        if backend == "auto":
            return backend if device_type(inputs) in self.order else "reference"
        if backend not in BACKENDS:
            raise ValueError(f"backend must be {_CHOICES}, got {backend!r}")
        return backend

    def choose(self, backend: str, inputs: Any) -> str:
        """The backend that serves, or ValueError with the reasons of the one asked for by name."""
        said: object = "backend"
        if backend == "auto":
            backend, said = settings.backend, settings.source
        if backend == "auto":
            for name in self.order.get(device_type(inputs), ()):
                if not self.reasons(name, inputs):
                    return name
            return "reference"
        if backend not in BACKENDS:
            raise ValueError(f"{said} must be {_CHOICES}, got {backend!r}")
        if reasons := self.reasons(backend, inputs):
            raise ValueError(f"{said} {backend!r} cannot serve: {'; '.join(reasons)}")
        return backend


def rooms() -> dict[str, list[Callable[..., Any]]]:
    """The public ops of each room."""
    found: dict[str, list[Callable[..., Any]]] = {}
    for op in OPS:
        found.setdefault(op.backends.room, []).append(op)  # type: ignore[attr-defined]
    return found


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def device_type(inputs: Any) -> str:
    """Of the first tensor."""
    lead = inputs[0] if isinstance(inputs[0], Tensor) else next(tensors_in(inputs))
    return "cpu" if lead.is_cpu else lead.device.type  # the second takes six times as long


_FOUND: dict[tuple[str, ...], list[str]] = {}


def environment(room: str, backend: str, device: str) -> list[str]:
    """Why a room's kernels cannot run here, whatever the inputs; looked up once."""
    if backend == "reference":
        return []
    key = room, backend, device
    found = _FOUND.get(key)
    if found is None:
        reason = _asked(room, backend, device)
        found = [reason] if reason else []
        if backend != "triton":  # whose switch may be thrown at any time
            _FOUND[key] = found
    return found


def _asked(room: str, backend: str, device: str) -> str:
    if backend == "triton":
        if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"tensors are on {device}, triton needs cuda (or TRITON_INTERPRET=1, for tests)"
        return _without("triton") or (_too_old_for_amd() if torch.version.hip else "")
    if device != "cpu":
        return f"tensors are on {device}, {backend} needs cpu"
    if backend == "numba":
        return _without("numba")
    try:
        extension = importlib.import_module("pyseq._C")
    except ImportError as error:
        return f"the compiled extension is missing ({error}); reinstall pyseq with a C++ compiler"
    return "" if hasattr(extension, room) else "the compiled extension is older than pyseq; reinstall pyseq"


def _without(module: str) -> str:
    return "" if importlib.util.find_spec(module) is not None else f"{module} is not installed"


def _too_old_for_amd() -> str:
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON_FOR_AMD:
        return ""
    return f"triton {version} cannot compile pyseq's kernels for AMD; 3.8, which torch 2.14 brings, can"


_LAUNCHERS: dict[tuple[str, str], ModuleType] = {}


def launcher(room: str, backend: str) -> ModuleType:
    """The module of launchers, imported on first use."""
    found = _LAUNCHERS.get((room, backend))
    if found is None:
        found = _LAUNCHERS[room, backend] = importlib.import_module(f"pyseq.kernels.{room}.{backend}")
    return found


class Explanation(dict[str, list[str]]):
    """Backend -> reasons against it (none: it serves). `chosen` is what auto takes; where PYSEQ_BACKEND or
    `use_backend` names one that cannot serve it is empty, and `refusal` says why."""

    chosen: str
    refusal: str = ""

    def __str__(self) -> str:
        rows = []
        for name, reasons in self.items():
            verdict = "; ".join(reasons) or ("chosen by auto" if name == self.chosen else "available")
            rows.append(f"{name:<10} {verdict}")
        return "\n".join([*rows, self.refusal] if self.refusal else rows)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What each backend says to this call of `op`: no reasons means that it serves.

    op: a function of `pyseq.ops`; args, kwargs: as for the call itself; those after the first tensor may be left out.
    Returns a dict of backend -> list of reasons, with `chosen`; print it for a table. Raises TypeError for another
    function, for arguments that it does not have, or when none of them is a tensor.
    """
    backends = getattr(op, "backends", None)
    if not isinstance(backends, Backends):
        raise TypeError(f"explain needs a function of pyseq.ops, got {op!r}")
    given = inspect.signature(op).bind_partial(*args, **kwargs).arguments
    if next(tensors_in(given.values()), None) is None:
        raise TypeError(f"explain({op.__name__}, ...) needs the tensors of the call")
    backends = next((x for name, x in backends.others.items() if given.get(name) is not None), backends)
    names = inspect.signature(backends.inputs).parameters
    inputs = backends.inputs(**{name: given.get(name) for name in names})
    out = Explanation({name: backends.reasons(name, inputs) for name in BACKENDS})
    try:
        out.chosen = backends.choose("auto", inputs)
    except ValueError as error:
        out.chosen, out.refusal = "", str(error)
    return out
