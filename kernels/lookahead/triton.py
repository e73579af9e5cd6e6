"""Triton launcher of the lookahead room: one launch for all tensors of one dtype, through a table of addresses."""

import itertools
import os
from collections import OrderedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyseq.kernels import OK, UNFIT
from pyseq.kernels.lookahead import Pairs

__all__ = ["update"]
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
BLOCK = 256 if INTERPRET else 2048  # elements a program
KEPT = 64  # tables: those of an optimizer's parameters come again at every synchronisation
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_tables: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()


@triton.jit
def _moved(x, y, ALPHA: tl.constexpr, SLOW: tl.constexpr):
    wide: tl.constexpr = tl.float64 if tl.float64 == SLOW else tl.float32
    x, y = x.to(wide), y.to(wide)
    if ALPHA < 0.5:
        y += tl.full((), ALPHA, wide) * (x - y)
    else:
        y = x - (x - y) * tl.full((), 1 - ALPHA, wide)
    return y.to(SLOW)


@triton.jit
def lookahead_kernel(
    p_pairs, p_blocks, ALPHA: tl.constexpr, FAST: tl.constexpr, SLOW: tl.constexpr, ALIGN: tl.constexpr, N: tl.constexpr
):
    """p_pairs: addresses of fast and slow and their elements, for each pair; p_blocks: pair and first element."""
    block = p_blocks + 2 * tl.program_id(0)
    pair, first = p_pairs + 3 * tl.load(block), tl.multiple_of(tl.load(block + 1), N)
    p_fast = tl.multiple_of(tl.load(pair).to(tl.pointer_type(FAST)), ALIGN) + first
    p_slow = tl.multiple_of(tl.load(pair + 1).to(tl.pointer_type(SLOW)), ALIGN) + first
    left = tl.load(pair + 2) - first
    o = tl.arange(0, N)
    if left >= N:  # without a mask, whose edge may lie anywhere, elements move in vectors
        y = _moved(tl.load(p_fast + o), tl.load(p_slow + o), ALPHA, SLOW)
        tl.store(p_slow + o, y)
        tl.store(p_fast + o, y.to(FAST))
    else:
        mask = o < left
        y = _moved(tl.load(p_fast + o, mask), tl.load(p_slow + o, mask), ALPHA, SLOW)
        tl.store(p_slow + o, y, mask)
        tl.store(p_fast + o, y.to(FAST), mask)


def _table(device: torch.device, numbers: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """On the device; copied there without waiting for it."""
    key = device, *numbers
    found = _tables.pop(key, None)
    if found is None:
        blocks = [(i, at) for i, (_, _, count) in enumerate(numbers) for at in range(0, count, BLOCK)]
        rows = (torch.tensor(x, dtype=torch.int64).view(-1) for x in (numbers, blocks))
        a, b = (x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x for x in rows)
        found = a, b
        if len(_tables) >= KEPT:
            _tables.popitem(last=False)
    _tables[key] = found
    return found


def update(pairs: Pairs, alpha: float) -> int:
    if not all(x.is_contiguous() for each in pairs for x in each):
        return UNFIT

    def dtypes(pair: tuple[Tensor, Tensor]) -> str:
        return f"{pair[0].dtype} {pair[1].dtype}"

    given = [pair for pair in zip(*pairs, strict=True) if pair[0].numel()]
    for _, group in itertools.groupby(sorted(given, key=dtypes), key=dtypes):
        fast, slow = zip(*group, strict=True)
        numbers = [(x.data_ptr(), y.data_ptr(), x.numel()) for x, y in zip(fast, slow, strict=True)]
        table, blocks = _table(fast[0].device, numbers)
        align = 16 if all((a | b) % 16 == 0 for a, b, _ in numbers) else 1
        types = _TYPES[fast[0].dtype], _TYPES[slow[0].dtype]
        lookahead_kernel[(len(blocks) // 2,)](table, blocks, alpha, *types, align, BLOCK, num_warps=8)
    return OK
