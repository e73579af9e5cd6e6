"""Modules over the fused operations: no maths of their own."""

from pyseq.nn.constraints import tag_constraints as tag_constraints
from pyseq.nn.crf import CRF as CRF
from pyseq.nn.crf import crf_parameter_groups as crf_parameter_groups
from pyseq.nn.hmm import HMM as HMM
from pyseq.nn.memm import MEMM as MEMM
from pyseq.nn.quantizer import VectorQuantizer as VectorQuantizer
from pyseq.nn.quantizer import VectorQuantizerOutput as VectorQuantizerOutput
from pyseq.nn.tied_linear import TiedLinear as TiedLinear

__all__ = [
    "CRF",
    "HMM",
    "MEMM",
    "TiedLinear",
    "VectorQuantizer",
    "VectorQuantizerOutput",
    "crf_parameter_groups",
    "tag_constraints",
]
