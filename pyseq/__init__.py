"""Fused operations for discrete structure in PyTorch, and the layers and models built on them."""

from pyseq.ops._backend import explain as explain

__version__ = "0.1.0"
__all__ = ["__version__", "explain"]
