"""Linear chains in Triton: one sequence a program, one launch a direction, the loop over live steps inside.

States are kept as a_k(j) = exp(alpha_k(j)) times a power of two, so that scaling is exact and log Z needs one log.
Each sequence certifies its own float32 sums; where it cannot, the same program repeats it in the float64 exp domain
and, where that fails too, in the float64 log domain with a maximum a destination. See docs/chain.md.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pyseq.kernels import OK
from pyseq.kernels.chain import SCORE, Chain, Gradients, Sampling, reduces
from pyseq.kernels.chain._entropy_triton import entropy_bwd_kernel, entropy_counts_kernel, entropy_fwd_kernel
from pyseq.kernels.chain._memm_triton import local_steps, neighbours
from pyseq.kernels.chain._paths_triton import path_draw_kernel, path_filter_kernel
from pyseq.kernels.chain._triton_kernels import (
    chain_edges_kernel,
    crf_bwd_kernel,
    crf_counts_kernel,
    crf_fwd_kernel,
    viterbi_fwd_kernel,
)

__all__ = ["crf", "entropy", "local_steps", "neighbours", "sample", "viterbi"]
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
FAST, WIDE, LOG = 0, 1, 2  # paths: exp domain at the width of the sums, in float64, log domain


class Config(NamedTuple):
    """Block sizes in closed form from the number of tags and the width of a sum."""

    KP: int  # tags, padded
    BI: int  # rows of edges a step takes at once
    BW: int  # the same in float64
    BL: int  # the same in the log domain
    KEEP: bool  # edges stay in registers
    KEEP_WIDE: bool
    num_warps: int
    tile: int  # of the transition gradient
    tile_warps: int
    kappa: float  # float32: rounding errors of one step, in units of 2^-24; float64: the least sum it takes


def config(num_tags: int, size: int) -> Config:
    """size: bytes of a sum, 4 or 8."""
    padded = max(triton.next_power_of_2(num_tags), 2)
    num_warps = 1 if padded <= 32 else 4 if padded == 64 else 8 if padded <= 256 else 16
    threads = 32 * num_warps
    keep = padded <= (128 if size == 4 else 64)
    rows = padded if keep else 128 * threads // (padded * size)
    wide = padded if padded <= 64 else max(16 * threads // padded, 1)
    logs = min(padded, max(4 * threads // padded, 1))
    own = max(padded * rows // (4 * threads), 1)  # terms that one thread adds in sequence
    depth = own - 1 + (rows // own).bit_length() - 1 + (0 if keep else 2)
    tile = min(max(padded, 16), 64 if size == 4 else 32)
    kappa = depth + 5.0 if size == 4 else 1.0
    return Config(padded, rows, wide, logs, keep, padded <= 64, num_warps, tile, 8 if tile == 64 else 4, kappa)


CHUNK = 32  # steps of one sequence that a product of the transition gradient takes
SCAN = 128  # steps that compaction and scoring take at once
PARTS = 256  # programs that share the transition gradient
TOGETHER, ABREAST = 16, 128  # samples of a program, and the most tags that it looks at at once
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def registers(num_warps: int) -> dict[str, int]:
    """All that a program can have, where ptxas would else spill to make room for a second one."""
    return {} if torch.version.hip else {"maxnreg": min(2048 // num_warps, 255)}


def _scratch(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@contextlib.contextmanager
def _launching(like: Tensor) -> Iterator[None]:
    """On the tensors' own device; the interpreter's NumPy warns where -inf meets -inf, which kernels select away."""
    with torch.cuda.device_of(like) if like.is_cuda else contextlib.nullcontext(), warnings.catch_warnings():
        if INTERPRET:
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


@reduces
def crf(
    chain: Chain, kind: int, check: bool, value: Tensor, grads: Gradients | None, paths: Tensor | None = None
) -> int:
    """paths: FAST, WIDE or LOG, how far each sequence had to go. Nobody checks here: what is out of range makes NaN."""
    emissions, transitions, start, end, tags, mask, lengths, weights = chain
    batch, time, num_tags = emissions.shape
    if batch == 0 or time == 0:
        for out in (value, *(grads or ()), *(() if paths is None else (paths,))):
            out.zero_()
        return OK
    dtype = transitions.dtype
    c = config(num_tags, dtype.itemsize)
    edges, edges64, turned, tape, right, low, count = (None,) * 7
    if kind != SCORE:
        edges, turned = (_scratch(emissions, c.KP, c.KP, dtype=dtype) for _ in range(2))
        edges64 = _scratch(emissions, c.KP, c.KP, dtype=torch.float64) if dtype == torch.float32 else None
    if grads is not None:
        count = _scratch(emissions, batch, dtype=torch.int32)
        if kind != SCORE:
            tape, right = (_scratch(emissions, batch, time, num_tags, dtype=dtype) for _ in range(2))
            low = _scratch(emissions, batch, time, num_tags, dtype=dtype) if dtype == torch.float32 else None
    shift = _scratch(emissions, c.KP, dtype=torch.int32)
    row = _scratch(emissions, batch, c.KP, dtype=torch.float64)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    paths = _scratch(emissions, batch, dtype=torch.int32) if paths is None else paths
    given = (emissions, *emissions.stride()[:2], transitions, start, end)
    common = (*given, tags, shift, row, steps, tape, count, paths, time)
    sizes = {"K": num_tags, "KP": c.KP, "KIND": kind}
    blocks = {"BI": c.BI, "BL": c.BL, "KEEP": c.KEEP, "CHUNK": SCAN, "num_warps": c.num_warps}
    blocks |= registers(c.num_warps) if c.num_warps <= 8 or dtype == torch.float64 else {}
    with _launching(emissions):
        if kind != SCORE:
            block = {"BI": min(c.KP, 16), "BJ": min(c.KP, 64)}
            grid = (triton.cdiv(c.KP, 64),)
            chain_edges_kernel[grid](
                transitions, edges, turned, edges64, shift, K=num_tags, KP=c.KP, **block, **OPTIONS
            )
        out = (mask, lengths, edges, edges64, value, c.kappa)
        wide = {"BW": c.BW, "KEEP_WIDE": c.KEEP_WIDE}
        crf_fwd_kernel[(batch,)](*common, *out, **sizes, **blocks, **wide, **OPTIONS)
        if grads is None:
            return OK
        ends = _scratch(emissions, batch, 2, num_tags, dtype=dtype)
        grad = grads.emissions.zero_()
        out = (weights, turned, right, low, grad, *grad.stride()[:2], ends)
        crf_bwd_kernel[(batch,)](*common, *out, **sizes, **blocks, **OPTIONS)
        tiles = triton.cdiv(c.KP, c.tile) ** 2
        slots = max(min(batch * triton.cdiv(time, CHUNK), PARTS // tiles), 1)
        parts = _scratch(emissions, slots, num_tags, num_tags, dtype=dtype)
        out = (transitions, tags, weights, edges, steps, tape, right, low, count, paths, parts, batch, time)
        block = {"BK": c.tile, "CHUNK": CHUNK, "num_warps": c.tile_warps}
        block |= registers(c.tile_warps) if dtype == torch.float64 else {}
        crf_counts_kernel[(slots, tiles)](*out, **sizes, **block, **OPTIONS)
    for shares, total in ((parts, grads.transitions), (ends[:, 0], grads.start), (ends[:, 1], grads.end)):
        torch.sum(shares, 0, out=total)
    return OK


def viterbi(chain: Chain, check: bool, scores: Tensor, path: Tensor) -> int:
    emissions, transitions, start, end, _, mask, lengths, _ = chain
    batch, time, num_tags = emissions.shape
    path.fill_(-1)
    if batch == 0 or time == 0:
        scores.zero_()
        return OK
    c = config(num_tags, 8)
    row = _scratch(emissions, batch, c.KP, dtype=torch.float64)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    back = _scratch(emissions, batch, time, num_tags, dtype=torch.uint8 if num_tags <= 256 else torch.int16)
    given = (emissions, *emissions.stride()[:2], transitions, start, end, mask, lengths)
    blocks = {"K": num_tags, "KP": c.KP, "BI": c.BW, "CHUNK": SCAN, "num_warps": c.num_warps}
    with _launching(emissions):
        viterbi_fwd_kernel[(batch,)](*given, row, steps, back, scores, path, time, **blocks, **OPTIONS)
    return OK


def _by_destination(transitions: Tensor, end: Tensor | None) -> Tensor:
    """Scores (K + 1, K) in float64, those of the end last."""
    last = torch.zeros_like(transitions[0]) if end is None else end
    return torch.cat((transitions.mT, last.unsqueeze(0))).double()


def sample(sampling: Sampling, check: bool, paths: Tensor) -> int:
    """Nobody checks here: of a length out of range there are no samples."""
    emissions, transitions, start, end, mask, lengths, seed = sampling
    batch, time, num_tags = emissions.shape
    count = paths.size(1)
    paths.fill_(-1)
    if batch == 0 or time == 0:
        return OK
    c = config(num_tags, 8)
    row = _scratch(emissions, batch, c.KP, dtype=torch.float64)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    alpha = _scratch(emissions, batch, time, num_tags, dtype=torch.float64)
    found = _scratch(emissions, batch, dtype=torch.int32)
    into = _by_destination(transitions, end)
    given = (emissions, *emissions.stride()[:2], transitions, start, end, mask, lengths)
    sizes = {"K": num_tags, "KP": c.KP, "BL": c.BL, "CHUNK": SCAN, "num_warps": c.num_warps}
    abreast = min(c.KP, ABREAST)
    blocks = {"K": num_tags, "BS": TOGETHER, "BK": abreast, "num_warps": max(abreast // 16, 1)}
    grid = (batch, triton.cdiv(count, TOGETHER))
    with _launching(emissions):
        path_filter_kernel[(batch,)](
            *given, row, steps, alpha, found, time, **sizes, **registers(c.num_warps), **OPTIONS
        )
        path_draw_kernel[grid](seed, into, alpha, found, steps, paths, time, count, **blocks, **OPTIONS)
    return OK


def entropy(chain: Chain, check: bool, value: Tensor, grads: Gradients | None) -> int:
    """Nobody checks here: a length out of range makes NaN."""
    emissions, transitions, start, end, _, mask, lengths, weights = chain
    batch, time, num_tags = emissions.shape
    if batch == 0 or time == 0:
        for out in (value, *(grads or ())):
            out.zero_()
        return OK
    padded = max(triton.next_power_of_2(num_tags), 2)
    num_warps = 1 if padded <= 16 else 4 if padded == 32 else 8 if padded <= 256 else 16
    into = _by_destination(transitions, end)
    steps = None if mask is None else _scratch(emissions, batch, time, dtype=torch.int32)
    alpha = _scratch(emissions, batch, time, num_tags, dtype=torch.float64)
    tape = batch, time + 1, num_tags + 1
    sums, mixed = (_scratch(emissions, *tape, dtype=torch.float64) for _ in range(2))
    likeliest = _scratch(emissions, *tape, dtype=torch.int16)
    count = _scratch(emissions, batch, dtype=torch.int32)
    tapes = alpha, sums, mixed, likeliest, count
    together = min(padded, (256 if padded <= 256 else 128) * num_warps // padded)  # destinations
    sizes = {"K": num_tags, "KP": padded, "BJ": together, "num_warps": num_warps} | registers(num_warps)
    with _launching(emissions):
        given = (emissions, *emissions.stride()[:2], into, start, mask, lengths, steps)
        entropy_fwd_kernel[(batch,)](*given, *tapes, value, time, CHUNK=SCAN, **sizes, **OPTIONS)
        if grads is None:
            return OK
        adjoints = tuple(_scratch(emissions, *tape, dtype=torch.float64) for _ in range(3))
        ends = _scratch(emissions, batch, 2, num_tags, dtype=torch.float64)
        grad = grads.emissions.zero_()
        out = (*adjoints, grad, *grad.stride()[:2], ends)
        entropy_bwd_kernel[(batch,)](into, weights, steps, *tapes, *out, time, **sizes, **OPTIONS)
        tile = min(max(padded, 16), 32)
        tiles = triton.cdiv(num_tags, tile) ** 2
        slots = max(min(batch * triton.cdiv(time, CHUNK), PARTS // tiles), 1)
        parts = _scratch(emissions, slots, num_tags, num_tags, dtype=torch.float64)
        block = {"K": num_tags, "BK": tile, "CHUNK": CHUNK, "num_warps": 4}
        entropy_counts_kernel[(slots, tiles)](into, *tapes, *adjoints, parts, batch, time, **block, **OPTIONS)
    for shares, total in ((parts, grads.transitions), (ends[:, 0], grads.start), (ends[:, 1], grads.end)):
        total.copy_(torch.sum(shares, 0))
    return OK
