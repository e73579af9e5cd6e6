"""Which rows of a table an optimizer's steps may have moved."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from pyseq.optim._state import Wrapper
from pyseq.optim.lazy import Lazy
from pyseq.optim.lazy_adam import LazyAdam

PLAIN = {Tensor, torch.nn.Parameter}
FEW = 4  # a table of so many rows for each that moved is not worth passing over as a whole


class Moved:
    """Rows that steps of a lazy optimizer moved since somebody took them; a byte a row.

    Of float32 and float64 tables on the CPU, as long as nobody else writes to them.
    """

    def __init__(self) -> None:
        self._marks: dict[Tensor, Tensor] = {}  # bool (rows,); none: any row may have moved
        self._written: dict[Tensor, tuple[int, int]] = {}
        self._steps: list[tuple[dict[str, Any], Tensor, Tensor | None]] = []

    def before(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        """A step."""
        self._steps = []
        if not _is_lazy(optimizer):
            return
        for group in groups:
            for p in group["params"]:
                wide = p.dtype in (torch.float32, torch.float64)
                if p.dim() == 2 and wide and p.device.type == "cpu" and type(p) in PLAIN:
                    self._steps.append((group, p, p.grad))
                    if self._written.get(p) != _written(p):
                        self._marks.pop(p, None)

    def after(self, optimizer: Optimizer, grads_are_new: bool) -> None:
        """The same step; grads_are_new: it made them."""
        for group, p, grad in self._steps:
            if p in self._marks:
                rows = _rows(optimizer, group, p, p.grad if grads_are_new else grad)
                if rows is None:
                    del self._marks[p]
                elif rows.dtype == torch.bool:
                    self._marks[p] |= rows
                else:
                    self._marks[p].index_fill_(0, rows, True)
            self._written[p] = _written(p)

    def take(self, p: Tensor) -> Tensor | None:
        """int64: rows that moved; None: any, or so many that all are as good."""
        marks = self._marks.get(p)
        if marks is None:
            if p in self._written:
                self._marks[p] = torch.zeros(p.size(0), dtype=torch.bool)
            return None
        rows = marks.nonzero().view(-1)
        marks.index_fill_(0, rows, False)
        return rows if len(rows) * FEW < len(marks) else None

    def settled(self, p: Tensor) -> None:
        """What was written to the table by whoever took its rows is no news."""
        if p in self._written:
            self._written[p] = _written(p)


def _written(p: Tensor) -> tuple[int, int]:
    return p.data_ptr(), p._version


def _is_lazy(optimizer: Optimizer) -> bool:
    if isinstance(optimizer, Wrapper):
        return isinstance(optimizer, Lazy) or _is_lazy(optimizer.optimizer)
    return isinstance(optimizer, LazyAdam | SparseAdam)


def _rows(optimizer: Optimizer, group: dict[str, Any], p: Tensor, grad: Tensor | None) -> Tensor | None:
    """int64, or bool of all rows: of those that a step moved; None: any."""
    if isinstance(optimizer, Lazy):
        return optimizer.moved[p] if p in optimizer.moved else _rows(optimizer.optimizer, group, p, grad)
    if not isinstance(optimizer, LazyAdam | SparseAdam):
        return None
    if grad is None:
        return torch.empty(0, dtype=torch.int64)
    if grad.is_sparse:
        return grad._indices()[0]
    return (grad != 0).any(1) if isinstance(optimizer, LazyAdam) and group["lazy"] else None
