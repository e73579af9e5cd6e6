"""The raw op of the lazy_adam room."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyseq.kernels.lazy_adam import BAD_ROW, Tables
from pyseq.ops._backend import Backends, settings, tensors_in
from pyseq.ops._library import Raw, Unfit
from pyseq.reference import lazy_adam as reference

MUTATED = ("params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "last", "touches")
MOST_ROWS = 2**31 - 1


class Options(NamedTuple):
    decay: bool
    row_bias: bool
    maximize: bool
    dense: bool
    check: bool
    backend: str


def _numba_limits(tables: Tables) -> list[str]:
    half = {str(x.dtype) for x in tensors_in(tables[:8]) if x.dtype == torch.bfloat16}
    return [f"numba serves float32 and float64, got {min(half)}"] if half else []


BACKENDS = Backends("lazy_adam", Tables, {"cpu": ("cpp", "numba"), "cuda": ("triton",)}, {"numba": _numba_limits})


def update(tables: Tables, decay: bool, row_bias: bool, maximize: bool, dense: bool, backend: str = "auto") -> None:
    """Of tables that may be wrong: C++ looks at them itself, the others trust."""
    if not tables.params:
        return
    with torch.no_grad():
        direct, values, chosen = BACKENDS.way(backend, tables)
        options = Options(decay, row_bias, maximize, dense, values, chosen)
        if not (direct and chosen == "cpp"):
            check(tables, options)
        _update(tables, options, direct)


def check(tables: Tables, options: Options) -> None:
    """ValueError for other numbers, shapes or devices, TypeError for other dtypes."""
    count, device = len(tables.params), tables.params[0].device
    wanted = {name: count for name in ("exp_avg", "exp_avg_sq", "values", "steps")}
    wanted |= {"last": count} if options.decay else {}
    wanted |= {"touches": count} if options.row_bias else {}
    wanted |= {"indices": 0 if options.dense else count}
    for name, tensors in zip(Tables._fields[:-1], tables[:-1], strict=True):
        if len(tensors) != wanted.get(name, len(tensors)) or len(tensors) not in (0, count):
            raise ValueError(f"{name} must be {wanted.get(name, count)} tensors for {count} params, got {len(tensors)}")
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor) or x.layout is not torch.strided or x.device != device:
                raise ValueError(f"{name}[{i}] must be a dense tensor on {device}, got {_kind(x)}")
    for i, p in enumerate(tables.params):
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise TypeError(
                f"params[{i}] must be of dtype torch.float32, torch.float64 or torch.bfloat16, got {p.dtype}"
            )
        if p.dim() != 2 or p.size(0) > MOST_ROWS:
            raise ValueError(f"params[{i}] must have shape (rows, width) with fewer than 2^31 rows, got {(*p.shape,)}")
        wide = [torch.float64] if p.dtype == torch.float64 else [torch.float32, torch.bfloat16]
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            for x in getattr(tables, name)[i : i + 1]:
                _same(name, i, x, p.shape, [tables.exp_avg[i].dtype] if tables.exp_avg[i].dtype in wide else wide)
        for name in ("last", "touches"):
            for x in getattr(tables, name)[i : i + 1]:
                _same(name, i, x, p.shape[:1], [torch.int32])
        n = p.size(0) if options.dense else tables.indices[i].numel()
        values = [p.dtype] if p.dtype != torch.bfloat16 else [torch.bfloat16, torch.float32]
        _same("values", i, tables.values[i], (n, p.size(1)), values)
        if not options.dense:
            _same("indices", i, tables.indices[i], (n,), [torch.int64])
        _same("steps", i, tables.steps[i], (), [torch.float32])
        if torch.bfloat16 in (p.dtype, tables.exp_avg[i].dtype) and not tables.seeds:
            raise ValueError(f"seeds must be given for params[{i}], whose bfloat16 numbers are rounded at random")
        for x in tables.seeds[i : i + 1]:
            _same("seeds", i, x, (), [torch.int64])


def _same(name: str, i: int, x: Tensor, shape: tuple[int, ...], dtypes: list[torch.dtype]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}[{i}] must have shape {tuple(shape)} beside params[{i}], got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}[{i}] must be of dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")


def _kind(x: object) -> str:
    return f"one of layout {x.layout} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _raise_bad_rows(tables: Tables) -> None:
    for i, (p, rows) in enumerate(zip(tables.params, tables.indices, strict=True)):
        bad = (rows < 0) | (rows >= p.size(0))
        if bad.any():
            raise ValueError(f"params[{i}] has rows 0 to {p.size(0) - 1}, and a gradient for row {int(rows[bad][0])}")


def _kernel(tables: Tables, options: Options) -> None:
    decay, row_bias, maximize, dense, check_values, backend = options
    if not dense and (settings.check or (check_values and backend == "reference")):
        _raise_bad_rows(tables)
    if backend != "reference":
        if any(not x.is_contiguous() for name in MUTATED for x in getattr(tables, name)):
            check(tables, options)
            raise ValueError("params and averages must be contiguous; use contiguous_format for embedding tables")
        try:
            status = _update.launch("update", tables, backend, decay, row_bias, maximize, dense)
        except Unfit:
            check(tables, options)
            raise
        if status == BAD_ROW:
            _raise_bad_rows(tables)
        return
    hyper = tuple(tables.hyper.tolist())
    for i, p in enumerate(tables.params):
        m, v, most, last, touches, rows = (x[i] if x else None for x in tables[1:7])
        step, seed = int(tables.steps[i]), int(tables.seeds[i]) if tables.seeds else 0
        numbers = tables.values[i], step, seed, hyper, decay, row_bias, maximize
        reference.lazy_adam_update_(p, m, v, most, last, touches, rows, *numbers)  # type: ignore[arg-type]


def _fake(tables: Tables, options: Options) -> None:
    return None


_update = Raw("lazy_adam_update_", Tables, Options, _kernel, _fake, BACKENDS, 0, MUTATED)
