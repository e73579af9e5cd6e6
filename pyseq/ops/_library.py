"""The one torch.library namespace; each room defines its private raw ops in it."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("pyseq", "FRAGMENT")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


class Unfit(RuntimeError):
    """A kernel cannot take a tensor as it lies in memory."""


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define a raw op, serve it by `kernel` on CPU and CUDA and by `fake` under tracing; returns what to call.

    That is the bound overload, but for plain tensors where nothing traces it calls the kernel without the dispatcher,
    which costs as much as the rest of a small call. A kernel that meets plain tensors which only the dispatcher makes
    real (symbolic zeros) raises `Unfit`.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"pyseq::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.pyseq, name).default

    def call(*args: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
        try:
            return overload(*args) if traced or not _PLAIN.issuperset(map(type, args)) else kernel(*args)
        except Unfit:
            return overload(*args)

    return call
