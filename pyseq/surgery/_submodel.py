"""Parts of models and runs with edited values, by the model's graph where it has one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyseq._capture import Graph, Node, Uncapturable, arguments, capture, flipped, leaves, signature
from pyseq.surgery._intercept import Intercepted, listing, run
from pyseq.surgery._parts import addresses, found, from_graphs, listed


@dataclass(frozen=True)
class Place:
    """An address of a model, with the shapes and types of the tensors there."""

    address: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{str(dtype).removeprefix('torch.')} {(*shape,)}"
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )


class Nodes(list[Place]):
    """What `nodes` gives; printed as a table."""

    def __str__(self) -> str:
        width = max((len(x.address) for x in self), default=0)
        return "\n".join(f"{x.address:<{width}}  {x}" for x in self)

    __repr__ = __str__


def nodes(model: nn.Module, *example: Any, **keywords: Any) -> Nodes:
    """The addresses of a model's values, with their shapes, in the order in which they are computed.

    example, keywords: the model's arguments. `block#1` is the second call of `block`, counted from 0, `layer.add_1` the
    second addition in a call of `layer`; inputs are called as in the model's `forward`.
    Time: two forward passes. The model stays as it is.
    Raises TypeError for arguments that the model does not take, and whatever its forward pass raises.

    >>> nodes(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.zeros(5, 2))
    input  float32 (5, 2)
    0      float32 (5, 3)
    1      float32 (5, 3)
    """
    model = original(model)
    given: Any = signature(model, example, keywords) if keywords else example
    try:
        graph = capture(model, given)[model.training]
        places, inputs = graph.places, graph.inputs
    except Uncapturable:
        places, inputs = listing(model, given)
    rows = [(name, x) for name, x in inputs.items()]
    rows += [(name, found(places, {}, name)) for name in addresses(places)]
    result = Nodes()
    for name, tree in rows:
        tensors: list[Any] = [
            x for x in leaves(tree) if isinstance(x, Tensor) or (type(x) is Node and x.shape is not None)
        ]
        if tensors:
            sizes = tuple((*x.shape,) for x in tensors)
            result.append(Place(name, sizes, tuple(x.dtype for x in tensors)))
    return result


def submodel(
    model: nn.Module,
    outputs: str | Sequence[str] | None = None,
    inputs: str | Sequence[str] | None = None,
    *,
    example: Any,
) -> nn.Module:
    """The part of a model between some of its values and others, as a module that shares its weights.

    outputs, inputs: addresses, one or several; None: the model's own. An address is the path of a module
    (`"layer3.1"`), one call of a module that is called several times (`"block#2"`, counted from 0), a function's result
    in the forward pass of a module (`"layer4.1.add"`, `"relu_1"`), or an input by its name; `nodes` lists all.
    example: arguments of the model, a tuple, a dict of keywords, or one tensor; not changed, and its sizes are not
    fixed.

    Returns a module from the values at inputs (one positional argument each, in the order given) to those at outputs
    (several as a tuple), which computes nothing else. Its modules, parameters and buffers are the model's own objects
    under their names there, only those that it uses, so both train together; copy.deepcopy parts them.
    submodel(model, None, at)(submodel(model, at)(x)) equals model(x) bit for bit, also in training.

    The model's code is recorded as a graph, on the example, in both modes. Where it cannot be, since a branch hangs on
    a tensor's values, the part runs the model's own code: one that begins at the inputs stops as soon as its outputs
    are there; one that begins inside runs the code before it on the example, whose values may not reach the result.

    Raises ValueError for an unknown address, with those nearest; for a module's path where it is called several times;
    for a cut that the model's inputs pass, naming the values that leak and who wants them; and for a part that would
    have to go by values, or sizes, that it does not see. TypeError for an example that the model does not take.
    Time: two forward passes, and one for each line before the cut that goes by a size. Source:
    https://kexue.fm/archives/6985.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(5, 4)
    >>> head, tail = submodel(model, "1", example=x), submodel(model, inputs="1", example=x)
    >>> torch.equal(tail(head(x)), model(x)), [name for name, _ in tail.named_parameters()]
    (True, ['2.weight', '2.bias'])
    """
    model = original(model)
    starts, ends = listed(inputs, "inputs"), listed(outputs, "outputs")
    wanted = [*(starts or ()), *(ends or ())]
    graphs, reason = _graphs(model, example, wanted)
    if graphs:
        try:
            return from_graphs(model, graphs, starts, ends, _flip(model, example, wanted))
        except Uncapturable as error:
            reason = str(error)
    return Intercepted(model, starts, ends, example, reason)


def original(model: nn.Module) -> nn.Module:
    """The model, of a compiled one what was compiled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _graphs(model: nn.Module, example: Any, wanted: Sequence[str]) -> tuple[dict[bool, Graph], str]:
    """Graphs in which these addresses can be; none where there is no such, and why."""
    try:
        graphs = capture(model, example, wanted)
    except Uncapturable as error:
        return {}, str(error)
    values = {x.target for x in graphs[True].nodes if x.op == "module"}
    for name in wanted:
        steps = name.partition("#")[0].split(".")
        if inside := values.intersection(".".join(steps[:i]) for i in range(1, len(steps))):
            return {}, f"the code of {inside.pop()} is no graph"
    return graphs, ""


def _flip(model: nn.Module, example: Any, wanted: Sequence[str]) -> Callable[[Graph, bool, Any], Graph]:
    return lambda graph, mode, line: flipped(model, example, wanted, graph, mode, line)


def rerun(model: nn.Module, args: Any, edits: Mapping[str, Any]) -> Any:
    """What the model gives where some of its values are replaced by others.

    args: the model's arguments: a tuple, a dict of keywords, or one tensor. edits: for each address (see `submodel`)
    what takes the place of its value. Gradients flow to the new values and to the model.
    Costs two more forward passes than a call; for many runs from the same place make a `submodel` once.
    Raises ValueError for an unknown address, and as `submodel` does.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(5, 4)
    >>> torch.equal(rerun(model, x, {"1": torch.zeros(5, 8)}), model[2].bias.expand(5, 2))
    True
    """
    model = original(model)
    if not isinstance(edits, Mapping) or not all(isinstance(name, str) for name in edits):
        raise TypeError(f"edits must be a dict of new values by address, got {edits!r:.60}")
    if not edits:
        raise ValueError("edits must name at least one address, got none; call the model itself")
    given, keywords = arguments(model, args)
    own = signature(model, given, keywords)
    paths = dict(model.named_modules())
    if ahead := {name: x for name, x in edits.items() if name in own and name not in paths}:
        bound = inspect.signature(model.forward).bind(*given, **keywords)
        bound.arguments.update(ahead)
        given, keywords = bound.args, bound.kwargs
        edits = {name: x for name, x in edits.items() if name not in ahead}
        if not edits:
            return model(*given, **keywords)
        args = {**own, **ahead}
    graphs, _ = _graphs(model, args, [*edits])
    if graphs:
        try:
            present = {model.training: graphs[model.training]}
            part = from_graphs(model, present, None, None, _flip(model, args, [*edits]), [*edits])
            return part(*edits.values(), **signature(model, given, keywords))
        except Uncapturable:
            pass
    places, inputs = listing(model, args)
    for name in edits:
        found(places, inputs, name)
    return run(model, given, keywords, replace=edits)
