"""Which backend serves an op on a device, and the reasons of those that do not."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, TypeVar

from torch import Tensor

Backend = Literal["auto", "reference", "numba", "cpp", "triton"]
Op = TypeVar("Op", bound=Callable[..., Any])
BACKENDS = ("reference", "numba", "cpp", "triton")
ROOMS: dict[str, "Room"] = {}


def _constant_when_traced(function: Op) -> Op:
    """torch.compiler.assume_constant_result, which would import the whole of torch._dynamo (and triton) to say this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Room:
    """A family of ops that share launchers.

    name: folder of the launchers in `pyseq.kernels`.
    order: for each device type, the backends `auto` asks, first choice first; other devices get `reference`.
    limits: the room's own reasons against a backend, where it has any, for inputs like the given (sizes, dtypes).
    ops: the public functions, as `op` decorated them.
    """

    name: str
    order: dict[str, tuple[str, ...]]
    limits: dict[str, Callable[[Tensor], list[str]]]
    ops: list[Callable[..., Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ROOMS[self.name] = self

    def op(self, function: Op) -> Op:
        """Decorate a public function of the room, so that `explain` knows it."""
        function.room = self  # type: ignore[attr-defined]
        self.ops.append(function)
        return function

    def reasons(self, backend: str, lead: Tensor) -> list[str]:
        """Why `backend` cannot serve inputs like `lead`; empty where it can."""
        reasons = _environment(backend, device_type(lead))
        return self.limits[backend](lead) if not reasons and backend in self.limits else reasons

    def choose(self, backend: str, lead: Tensor) -> str:
        """The backend that serves, or ValueError with the reasons of the one asked for by name."""
        said = "backend"
        if backend == "auto":
            backend, said = _variable(_PYSEQ_BACKEND, "auto"), "PYSEQ_BACKEND"
        if backend == "auto":
            for name in self.order.get(device_type(lead), ("reference",)):
                if not self.reasons(name, lead):
                    return name
        if backend not in BACKENDS:
            raise ValueError(f"{said} must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
        if reasons := self.reasons(backend, lead):
            raise ValueError(f"{said} {backend!r} cannot serve: {'; '.join(reasons)}")
        return backend


def device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # the second takes six times as long


_VARIABLES: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]  # a private of CPython's
_PYSEQ_BACKEND, _PYSEQ_CHECK = map(os.environ.encodekey, ("PYSEQ_BACKEND", "PYSEQ_CHECK"))


@_constant_when_traced
def _variable(key: Any, default: str) -> str:
    """os.environ.get, or the default for an empty one; that method raises and catches two errors where the variable is
    not set, a tenth of a small call."""
    return (os.environ.decodevalue(_VARIABLES[key]) if key in _VARIABLES else "") or default


def checks_forced() -> bool:
    """PYSEQ_CHECK=1: value checks raise on every device, at the price of a host synchronisation on the GPU."""
    forced: bool = _variable(_PYSEQ_CHECK, "0") == "1"
    return forced


_FOUND: dict[str, str] = {}


def _missing(module: str) -> str:
    """Why a module cannot be used ('' where it can), looked up once. Only `_C` is imported; it costs microseconds."""
    if module not in _FOUND:
        if module == "pyseq._C":
            try:
                importlib.import_module(module)
                _FOUND[module] = ""
            except ImportError as error:
                _FOUND[module] = f"the compiled extension is missing ({error}); reinstall pyseq with a C++ compiler"
        else:
            found = importlib.util.find_spec(module) is not None
            _FOUND[module] = "" if found else f"{module} is not installed"
    return _FOUND[module]


def compiled(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `pyseq._C`, or `otherwise` where the extension is missing or has no such function."""
    if not _missing("pyseq._C"):
        found = getattr(importlib.import_module("pyseq._C"), name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
        _FOUND["pyseq._C"] = "the compiled extension is older than pyseq; reinstall pyseq"
    return otherwise


@_constant_when_traced
def _environment(backend: str, device: str) -> list[str]:
    if backend == "reference":
        return []
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        if device != "cuda" and not (device == "cpu" and interpreted):
            return [f"tensors are on {device}, triton needs cuda (or TRITON_INTERPRET=1, for tests)"]
        reason = _missing("triton")
    else:
        if device != "cpu":
            return [f"tensors are on {device}, {backend} needs cpu"]
        module = "numba" if backend == "numba" else "pyseq._C"
        reason = _FOUND[module] if module in _FOUND else _missing(module)
    return [reason] if reason else []


_LAUNCHERS: dict[tuple[str, str], ModuleType] = {}


def launcher(room: str, backend: str) -> ModuleType:
    """The module of launchers, imported on first use."""
    found = _LAUNCHERS.get((room, backend))
    if found is None:
        found = _LAUNCHERS[room, backend] = importlib.import_module(f"pyseq.kernels.{room}.{backend}")
    return found


class Explanation(dict[str, list[str]]):
    """Backend -> reasons against it (none: it serves). `chosen` is what auto takes; where PYSEQ_BACKEND names one that
    cannot serve it is empty, and `refusal` says why."""

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

    op: a function of `pyseq.ops`; args, kwargs: as for the call itself (only the first tensor matters).
    Returns a dict of backend -> list of reasons, with `chosen`; print it for a table. Raises TypeError for another
    function, or when no argument is a tensor.
    """
    room = getattr(op, "room", None)
    if not isinstance(room, Room):
        raise TypeError(f"explain needs a function of pyseq.ops, got {op!r}")
    lead = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if lead is None:
        raise TypeError(f"explain({op.__name__}, ...) needs the tensors of the call")
    out = Explanation({name: room.reasons(name, lead) for name in BACKENDS})
    try:
        out.chosen = room.choose("auto", lead)
    except ValueError as error:
        out.chosen, out.refusal = "", str(error)
    return out
