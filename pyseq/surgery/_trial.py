"""One forward of a model that leaves no trace, and what modules gave in it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyseq._capture import arguments, untouched


class Call(NamedTuple):
    """What a watched module gave in one call: a shape, or a tuple of them; whether the model's output holds it."""

    shape: Any
    is_output: bool


def leaves(value: Any) -> Iterator[Tensor]:
    """Tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from leaves(x)
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from leaves(x)


def trial(model: nn.Module, example: Any, watched: list[nn.Module], calls: list[Call]) -> None:
    """Run the model without gradients and add what the watched modules give to calls, also when it fails.

    Random state, buffers, weights of modules with `max_norm`, the example and modes are afterwards what they were.
    """
    seen: list[tuple[Tensor, ...]] = []
    out: tuple[Tensor, ...] = ()
    args, kwargs = arguments(model, example)
    weights = [m.weight for m in model.modules() if getattr(m, "max_norm", None) is not None]
    with untouched(model, *leaves((args, kwargs)), *weights), ExitStack() as stack:  # type: ignore[arg-type]
        for module in {id(m): m for m in watched}.values():
            handle = module.register_forward_hook(lambda _m, _args, output: seen.append((*leaves(output),)))
            stack.callback(handle.remove)
        try:
            out = (*leaves(model(*args, **kwargs)),)
        finally:
            for given in seen:
                shapes = tuple((*t.shape,) for t in given)
                is_output = all(any(t is o for o in out) for t in given)
                calls.append(Call(shapes[0] if len(shapes) == 1 else shapes, is_output))
