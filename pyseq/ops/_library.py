"""The one torch.library namespace; each room defines its private raw ops in it."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("pyseq", "FRAGMENT")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define a raw op, serve it by `kernel` on CPU and CUDA and by `fake` under tracing; returns the bound overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"pyseq::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.pyseq, name).default
    return overload
