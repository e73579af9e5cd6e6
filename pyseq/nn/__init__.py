"""Modules over the fused operations: no maths of their own."""

from pyseq.nn.crf import CRF as CRF
from pyseq.nn.crf import crf_parameter_groups as crf_parameter_groups

__all__ = ["CRF", "crf_parameter_groups"]
