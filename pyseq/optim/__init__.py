"""Optimizers over the fused operations."""

from pyseq.optim.lookahead import Lookahead as Lookahead

__all__ = ["Lookahead"]
