"""Optimizers over the fused operations."""

from pyseq.optim.lazy_adam import LazyAdam as LazyAdam
from pyseq.optim.lookahead import Lookahead as Lookahead

__all__ = ["LazyAdam", "Lookahead"]
