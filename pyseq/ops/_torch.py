"""The private names of torch that pyseq uses, and only here. Where one is gone a public, slower way serves."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def _private(path: str) -> Callable[..., Any] | None:
    """A function below `torch._C`, or None."""
    try:
        return functools.reduce(getattr, path.split("."), torch._C)  # type: ignore[return-value]
    except AttributeError:
        return None


_modes = _private("_len_torch_dispatch_stack")
_tracing = _private("_is_tracing")
_transforms = _private("_are_functorch_transforms_active")
_keeps_graph = _private("_autograd._get_current_graph_task_keep_graph")
_graph_task = _private("_current_graph_task_id")
_is_batched = _private("_functorch.is_batchedtensor") or (lambda x: False)
_is_legacy_batched = _private("_functorch.is_legacy_batchedtensor") or (lambda x: False)
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def plain(arguments: Iterable[Any]) -> bool:
    """Whether the dispatcher would do no more for these arguments than call the kernel of their device: no mode,
    tracer, transform or subclass. Where torch does not tell, no: it is asked, at the price of the rest of a small
    call."""
    if torch.compiler.is_compiling() or _modes is None or _tracing is None or _transforms is None:
        return False
    if _modes() or _tracing() or _transforms():
        return False
    if _PLAIN.issuperset(map(type, arguments)):
        return True
    return all(plain(x) if isinstance(x, (list, tuple)) else type(x) in _PLAIN for x in arguments)


def traced() -> bool:
    """Whether a graph is recorded, or a mode looks on: values are not to be read, nor "auto" chosen."""
    if torch.compiler.is_compiling():
        return True
    return bool(_modes is not None and _modes()) or bool(_tracing is not None and _tracing())


def transforms_active() -> bool:
    """Whether a transform of torch.func runs; where torch does not tell, it refuses our ops in its own words."""
    return _transforms is not None and bool(_transforms())


def is_batched(x: Tensor) -> bool:
    """Whether x stands for a batch of gradients; where torch does not tell, reading its memory fails."""
    return bool(_is_batched(x) or _is_legacy_batched(x))


def keeps_graph() -> bool:
    """Whether the backward that runs may run again: then a saved gradient must not get into other hands."""
    return _keeps_graph is None or bool(_keeps_graph())


def in_backward() -> bool:
    """Whether autograd runs this, as activation checkpointing lets it run a forward again; no where torch does not
    tell: then state that a forward updates is updated once more."""
    return not torch.compiler.is_compiling() and _graph_task is not None and _graph_task() != -1


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its care for torch.func, which no plain call needs: it takes 6 % of the smallest
    step."""
    direct = getattr(super(torch.autograd.Function, function), "apply", None)
    return function.apply if direct is None else direct  # type: ignore[no-any-return]
