"""Fused operations. Every function takes `backend="auto"`; `explain(op, ...)` says who serves and why others do not."""

from pyseq.ops._backend import Backend as Backend
from pyseq.ops._backend import explain as explain
from pyseq.ops.chain import crf_log_partition as crf_log_partition
from pyseq.ops.chain import crf_marginals as crf_marginals
from pyseq.ops.chain import crf_nll as crf_nll
from pyseq.ops.chain import crf_score as crf_score
from pyseq.ops.chain import viterbi as viterbi
from pyseq.ops.chain_posterior import crf_entropy as crf_entropy
from pyseq.ops.chain_posterior import crf_sample as crf_sample
from pyseq.ops.codebook import Quantized as Quantized
from pyseq.ops.codebook import code_statistics as code_statistics
from pyseq.ops.codebook import nearest_code as nearest_code
from pyseq.ops.codebook import quantize as quantize
from pyseq.ops.codebook import straight_through as straight_through
from pyseq.ops.lazy_adam import lazy_adam_update_ as lazy_adam_update_
from pyseq.ops.lookahead import lookahead_update_ as lookahead_update_
from pyseq.ops.memm import memm_marginals as memm_marginals
from pyseq.ops.memm import memm_nll as memm_nll
from pyseq.ops.memm import memm_viterbi as memm_viterbi

__all__ = [
    "Backend", "Quantized", "code_statistics", "crf_entropy", "crf_log_partition", "crf_marginals", "crf_nll",
    "crf_sample", "crf_score", "explain", "lazy_adam_update_", "lookahead_update_", "memm_marginals", "memm_nll",
    "memm_viterbi", "nearest_code", "quantize", "straight_through", "viterbi",
]  # fmt: skip
