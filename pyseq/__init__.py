"""Fused operations for discrete structure in PyTorch, and the layers and models built on them."""

import importlib
from typing import TYPE_CHECKING, Any

from pyseq.ops._backend import explain as explain
from pyseq.ops._backend import use_backend as use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "use_backend"]

if TYPE_CHECKING:
    from pyseq import data as data
    from pyseq import models as models
    from pyseq import nn as nn
    from pyseq import optim as optim
    from pyseq import surgery as surgery
else:

    def __getattr__(name: str) -> Any:
        """`pyseq.nn` and its like, imported when they are first named."""
        if name in ("data", "models", "nn", "optim", "surgery"):
            return importlib.import_module(f"pyseq.{name}")
        raise AttributeError(f"module 'pyseq' has no attribute {name!r}")
