"""The one torch.library namespace, and how a private raw op is made: schema, kernels, fake, gradients, bypass,
launch."""

from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyseq.kernels import UNFIT
from pyseq.ops._backend import Backends, launcher
from pyseq.ops._torch import applier, plain

_LIBRARY = torch.library.Library("pyseq", "FRAGMENT")
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}

# (inputs, options, outputs but the first, upstream gradients of all outputs or of the first) -> gradients of the inputs
Formula = Callable[[Any, Any, tuple[Tensor, ...], tuple[Tensor | None, ...]], Any]


class Unfit(RuntimeError):
    """A kernel cannot take a tensor as it lies in memory."""


class Raw:
    """A private raw op, `torch.ops.pyseq.<name>`, called with a NamedTuple of inputs and one of options.

    inputs, options: the types of both, whose fields in this order are the arguments of the schema. The last option is
    `backend`; "auto" is chosen when the op runs, not when it is traced.
    kernel: (inputs, options) -> a tensor, a tuple or None, on real tensors, with the backend that was chosen.
    fake: the same on tensors without data. returns: number of tensors.
    mutates: names of inputs that the kernel writes; their version counters advance on every way into it.
    gradient: makes the op differentiable in its inputs, also where a graph recorded it.
    """

    def __init__(
        self,
        name: str,
        inputs: Any,
        options: Any,
        kernel: Callable[[Any, Any], Any],
        fake: Callable[[Any, Any], Any],
        backends: Backends,
        returns: int = 1,
        mutates: Iterable[str] = (),
        gradient: Formula | None = None,
    ) -> None:
        self.inputs, self.options, self.kernel, self.backends = inputs, options, kernel, backends
        self.mutates = tuple(mutates)
        _LIBRARY.define(self._schema(name, returns), tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._dispatched, key)
        torch.library.register_fake(f"pyseq::{name}", lambda *args: fake(*self._named(args)), lib=_LIBRARY)
        self.overload: Callable[..., Any] = getattr(torch.ops.pyseq, name).default
        self._first: Any = None
        if gradient is not None:
            self._make_differentiable(name, gradient)

    def __call__(self, inputs: Any, options: Any, direct: bool | None = None) -> Any:
        """Through the dispatcher, or straight to the kernel where it would add nothing.

        direct: whether it would, by a caller who has chosen the backend too; a gradient formula, which may have it from
        a graph, leaves both to this call.
        """
        if direct is None:
            direct = plain(inputs)
            if direct:
                options = options._replace(backend=self.backends.choose(options.backend, inputs))
        if direct and not (self._first and torch.is_grad_enabled() and needs_grad(inputs)):
            try:
                return self._run(inputs, options)
            except Unfit:  # tensors that only the dispatcher makes real: symbolic zeros
                pass
        return self.overload(*inputs, *options)

    def first(self, inputs: Any, options: Any, direct: bool) -> Tensor:
        """The first output of an op with gradients, and those of it alone: they cost less without the dispatcher."""
        if direct:
            try:
                return self._first(*inputs, options)  # type: ignore[no-any-return]
            except Unfit:
                pass
        return self.overload(*inputs, *options)[0]  # type: ignore[no-any-return]

    def _schema(self, name: str, returns: int) -> str:
        arguments = []
        for field, kind in (get_type_hints(self.inputs) | get_type_hints(self.options)).items():
            type_ = _TYPES[kind]
            if field in self.mutates:
                type_ = type_.replace("Tensor", f"Tensor({chr(97 + self.mutates.index(field))}!)", 1)
            arguments.append(f"{type_} {field}")
        out = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
        return f"{name}({', '.join(arguments)}) -> {out}"

    def _named(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
        count = len(self.inputs._fields)
        return self.inputs(*args[:count]), self.options(*args[count:])

    def _run(self, inputs: Any, options: Any) -> Any:
        out = self.kernel(inputs, options)
        if self.mutates:
            for name in self.mutates:
                increment_version(getattr(inputs, name))
        return out

    def _dispatched(self, *args: Any) -> Any:
        inputs, options = self._named(args)
        return self._run(inputs, options._replace(backend=self.backends.choose(options.backend, inputs)))

    def _make_differentiable(self, name: str, gradient: Formula) -> None:
        count, make = len(self.inputs._fields), self.inputs._make

        def save(ctx: Any, inputs: tuple[Any, ...], options: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            ctx.options = options
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, *(() if isinstance(output, Tensor) else output[1:]))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, *self._named(inputs), output)

        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor only once
            grads = gradient(make(saved[:count]), ctx.options, saved[count:], upstream)
            return *grads, *(None for _ in self.options._fields)

        torch.library.register_autograd(f"pyseq::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

        class First(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Tensor:
                *tensors, options = args
                inputs = make(tensors)
                output = self._run(inputs, options)
                save(ctx, inputs, options, output)
                return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
                saved = ctx.saved_tensors
                return *gradient(make(saved[:count]), ctx.options, saved[count:], (upstream,)), None

        self._first = applier(First)

    def launch(self, launch: str, inputs: Any, backend: str, *rest: Any, rows: tuple[str, ...] = ()) -> int:
        """Call a launcher of the room with inputs that it can read, options and outputs; returns its status.

        rows: inputs of which launchers take any strides but the last. Half precision becomes float32 on the CPU.
        """
        call = getattr(launcher(self.backends.room, backend), launch)
        status: int = call(inputs, *rest) if backend == "cpp" else UNFIT
        if status == UNFIT:
            status = call(self._readable(inputs, backend, rows), *rest)
            if status == UNFIT:
                raise Unfit(f"{launch}: {backend} cannot read or write a tensor that passed the checks; was it freed?")
        return status

    def _readable(self, inputs: Any, backend: str, rows: tuple[str, ...]) -> Any:
        """Contiguous, but for what the kernel writes, which must be so already."""
        changed: dict[str, Any] = {}
        for name, x in zip(inputs._fields, inputs, strict=True):
            if x is None or name in self.mutates:
                continue
            if isinstance(x, Tensor):
                changed[name] = _contiguous(x, backend, name in rows)
            else:
                changed[name] = [_contiguous(each, backend, name in rows) for each in x]
        return inputs._replace(**changed)


def _contiguous(x: Tensor, backend: str, by_rows: bool) -> Tensor:
    if x.numel() and not x.data_ptr():
        raise Unfit("symbolic zeros have no memory")
    if x.is_cpu and backend != "triton" and x.is_floating_point() and x.element_size() == 2:
        x = x.float()
    return x if by_rows and x.stride(-1) == 1 else x.contiguous()


def needs_grad(inputs: Iterable[Tensor | None]) -> bool:
    return any([x is not None and x.requires_grad for x in inputs])  # a generator takes three times as long
