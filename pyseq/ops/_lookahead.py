"""The raw op of the lookahead room."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.lookahead import Pairs
from pyseq.ops._backend import Backends, tensors_in
from pyseq.ops._check import FLOATS
from pyseq.ops._library import Raw, Unfit
from pyseq.reference import lookahead as reference


class Options(NamedTuple):
    alpha: float
    backend: str


def _numba_limits(pairs: Pairs) -> list[str]:
    half = {str(x.dtype) for x in tensors_in(pairs) if x.dtype in (torch.bfloat16, torch.float16)}
    return [f"numba serves float32 and float64, got {min(half)}"] if half else []


BACKENDS = Backends("lookahead", Pairs, {"cpu": ("cpp", "numba"), "cuda": ("triton",)}, {"numba": _numba_limits})


def update(pairs: Pairs, alpha: float, backend: str = "auto") -> None:
    """Of pairs that may be wrong: C++ looks at them itself, which takes a fifth of the time, the others trust."""
    if next(tensors_in(pairs), None) is None:
        return check(pairs)
    with torch.no_grad():
        direct, _, chosen = BACKENDS.way(backend, pairs)
        if not (direct and chosen == "cpp"):
            check(pairs)
        _update(pairs, Options(alpha, chosen), direct)


def check(pairs: Pairs) -> None:
    """ValueError for other numbers, shapes or devices, TypeError for other dtypes."""
    if len(pairs.fast) != len(pairs.slow):
        raise ValueError(f"fast and slow must be equally many, got {len(pairs.fast)} and {len(pairs.slow)}")
    for i, (x, y) in enumerate(zip(*pairs, strict=True)):
        for name, z in (("fast", x), ("slow", y)):
            if not isinstance(z, Tensor) or z.layout is not torch.strided or z.is_nested:
                raise TypeError(f"{name}[{i}] must be a dense tensor, got {_kind(z)}")
        if x.shape != y.shape:
            raise ValueError(f"fast[{i}] and slow[{i}] must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"fast[{i}] must be of a float dtype, got {x.dtype}")
        if y.dtype != x.dtype and (x.element_size() > 2 or y.dtype != torch.float32):
            wanted = f"{x.dtype} or torch.float32" if x.element_size() == 2 else str(x.dtype)
            raise TypeError(f"slow[{i}] must be of dtype {wanted} beside fast[{i}], got {y.dtype}")
        if x.device != y.device or x.device != pairs.fast[0].device:
            where = f"{pairs.fast[0].device}, {x.device} and {y.device}"
            raise ValueError(f"all tensors must be on one device, got fast[0], fast[{i}] and slow[{i}] on {where}")


def _kind(x: object) -> str:
    return f"one of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__


def _kernel(pairs: Pairs, options: Options) -> None:
    if options.backend != "reference":
        if _served(pairs, options):
            return
        check(pairs)
        flat, pairs = _flattened(pairs)
        if flat.fast:
            _update.launch("update", flat, options.backend, options.alpha)
    reference.lookahead_update_(pairs.fast, pairs.slow, options.alpha)


def _served(pairs: Pairs, options: Options) -> bool:
    try:
        _update.launch("update", pairs, options.backend, options.alpha)
    except Unfit:
        return False
    return True


def _flattened(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Pairs that lie alike in memory without gaps, as vectors, and the others."""
    flat, others = Pairs([], []), Pairs([], [])
    for x, y in zip(*pairs, strict=True):
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        alike = x.stride() == y.stride() and x.permute(order).is_contiguous()
        for to, z in zip(flat if alike else others, (x, y), strict=True):
            to.append(z.permute(order).view(-1) if alike else z)
    return flat, others


def _fake(pairs: Pairs, options: Options) -> None:
    return None


_update = Raw("lookahead_update_", Pairs, Options, _kernel, _fake, BACKENDS, 0, Pairs._fields)
