"""Optimizers over the fused operations."""

from pyseq.optim.clip import clip_grad_norm_ as clip_grad_norm_
from pyseq.optim.lazy import Lazy as Lazy
from pyseq.optim.lazy_adam import LazyAdam as LazyAdam
from pyseq.optim.lookahead import Lookahead as Lookahead
from pyseq.optim.report import RowCounts as RowCounts
from pyseq.optim.report import RowReport as RowReport
from pyseq.optim.report import row_report as row_report

__all__ = ["Lazy", "LazyAdam", "Lookahead", "RowCounts", "RowReport", "clip_grad_norm_", "row_report"]
