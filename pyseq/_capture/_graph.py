"""The graph of a model in each mode, by running it on an example."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyseq._capture._trace import Trace
from pyseq._capture._values import Flag, Graph, Node, Uncapturable, leaves, mapped


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


def defaults(model: nn.Module, given: Collection[str]) -> dict[str, Any]:
    """The arguments of the model that were left out, with the values that they have then."""
    every = inspect.signature(model.forward).parameters.values()
    return {x.name: x.default for x in every if x.default is not x.empty and x.name not in given}


@contextmanager
def untouched(model: nn.Module, *more: Tensor) -> Iterator[None]:
    """Without gradients; behind it modules' attributes and hooks, buffers, the tensors named and random numbers are as
    before."""
    lazy = [name for name, x in model.named_parameters() if nn.parameter.is_lazy(x)]
    if lazy:
        raise ValueError(f"{lazy[0]} has no shape before the model's first run: call the model once")
    before = [(module, {**vars(module)}) for module in model.modules()]
    held = [(x, copy.copy(x)) for _, own in before for name, x in own.items() if _is_container(name, x)]
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
        for container, old in held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(old)
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _is_container(name: str, x: Any) -> bool:
    """Hooks, and what forward passes collect; parameters, buffers and modules are not a run's to change."""
    return type(x) in (list, dict, set, OrderedDict) and name not in ("_parameters", "_buffers", "_modules")


def _graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, opaque: dict[str, str],
    descend: Collection[str], flip: Any = None,
) -> Graph:  # fmt: skip
    """One mode's graph; modules whose code cannot be recorded are added to `opaque`, unless it is a flipped run."""
    while True:
        trace = Trace(model, opaque, descend, flip)
        names = iter(signature(model, args, kwargs))
        with untouched(model):
            for module in model.modules():
                module.training = training
            given = (
                [trace.input(next(names), x) for x in args],
                {name: trace.input(name, x) for name, x in kwargs.items()},
            )
            try:
                with torch.inference_mode(False), torch.enable_grad(), trace.recording():
                    output = model(*given[0], **given[1])
            except Exception as error:
                if flip:
                    raise
                inner = trace.culprit
                if not inner or inner in opaque or any(x.startswith(f"{inner}.") for x in descend):
                    raise Uncapturable(str(error)) from error
                opaque[inner] = str(error)
                continue
        trace.graph.output = mapped(trace._seen, output)
        trace.graph.inputs.update(defaults(model, trace.graph.inputs))
        return trace.graph


def capture(model: nn.Module, example: Any, descend: Collection[str] = ()) -> dict[bool, Graph]:
    """The graph in training and in evaluation mode, one object where they differ in training flags alone.

    descend: paths to open although they are torch's own. Raises Uncapturable, with the reason.
    """
    args, kwargs = arguments(model, example)
    opaque: dict[str, str] = {}
    known = -1
    while len(opaque) != known:
        known = len(opaque)
        graphs = {mode: _graph(model, args, kwargs, mode, opaque, descend) for mode in (True, False)}
    merged = _merged(graphs[True], graphs[False])
    return {True: merged, False: merged} if merged else graphs


def flipped(model: nn.Module, example: Any, descend: Collection[str], graph: Graph, mode: bool, line: Any) -> Graph:
    """The graph again, had the code at this line read another size. Raises what the model raises."""
    args, kwargs = arguments(model, example)
    return _graph(model, args, kwargs, mode, {**graph.closed}, descend, line)


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
