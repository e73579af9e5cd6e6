"""How often each row of a table was updated."""

from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from pyseq.optim._state import Wrapper, innermost, name_of
from pyseq.optim.lazy import Lazy
from pyseq.optim.lazy_adam import LazyAdam

HEAD = ("table", "rows", "steps", "lazy", "never", "median", "90 %", "most", "updates", "of dense")


class RowCounts(NamedTuple):
    """name: the parameter's, or its number; counts: int64 (rows,) on the CPU; steps: of the table; lazy: False where
    each step updated every row, as dense optimizers do.

    >>> optim.RowCounts("words", torch.tensor([3, 0, 1]), 4, True).counts.sum()
    tensor(4)
    """

    name: str
    counts: Tensor
    steps: int
    lazy: bool


@dataclass(frozen=True, eq=False)
class RowReport:
    """What `row_report` found, a RowCounts for each matrix; `str()` is the table.

    >>> optim.RowReport((optim.RowCounts("words", torch.tensor([3, 0, 1]), 4, True),)).tables[0].steps
    4
    """

    tables: tuple[RowCounts, ...]

    def table(self) -> str:
        """A line a table: rows that were never updated, quantiles over rows, and all updates, also as a part of those
        that a dense optimizer makes in as many steps."""
        lines: list[tuple[str, ...]] = [HEAD]
        for name, counts, steps, lazy in self.tables:
            low, high = torch.quantile(counts.double()[:: len(counts) // 10**7 + 1], torch.tensor([0.5, 0.9]).double())
            updates, dense = int(counts.sum()), steps * len(counts)
            part = f"{100 * updates / dense:.3g} %" if dense else ""
            numbers = (int((counts == 0).sum()), round(float(low)), round(float(high)), int(counts.max()), updates)
            words = ("yes" if lazy else "no", *(f"{x:,}" for x in numbers), part)
            lines.append((_short(name), f"{len(counts):,}", f"{steps:,}", *words))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)

    __str__ = table

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A matplotlib figure, written to path if there is one: updates of rows, most of them first, with logarithmic
        axes, and dashed those of a dense optimizer. ModuleNotFoundError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib", name="matplotlib") from missing
        drawing = Figure(figsize=(6, 3.6), layout="constrained")
        axes = drawing.subplots()
        for name, counts, steps, _ in self.tables:
            ordered = counts[counts > 0].sort(descending=True).values
            if not len(ordered):
                continue
            at = torch.logspace(0, torch.tensor(float(len(ordered))).log10().item(), 500).round().long().unique()
            at = at.clamp(1, len(ordered))
            (line,) = axes.plot(at.numpy(), ordered[at - 1].numpy(), label=_short(name), drawstyle="steps-post")
            axes.plot([1, len(counts)], [steps, steps], "--", color=line.get_color(), linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="row, by updates", ylabel="updates; dashed: if dense")
        axes.legend(fontsize=8, loc="lower left")
        if path is not None:
            drawing.savefig(path, dpi=150)
        return drawing


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"...{name[-17:]}"


def row_report(optimizer: Optimizer) -> RowReport:
    """How often the steps so far have updated each row of each matrix.

    optimizer: `LazyAdam` or `Lazy` with count_rows=True, also inside Lookahead; any other optimizer, and matrices with
    dense gradients in LazyAdam, update every row in every step, and are reported so. A row that a sparse gradient
    names counts once a step.
    Raises ValueError where rows were not counted, or no step was (plain SGD counts none); TypeError for no optimizer.
    Waits for the device; time O(rows).

    >>> words = torch.nn.Embedding(5, 8, sparse=True)
    >>> opt = optim.LazyAdam(words.parameters(), count_rows=True)
    >>> for row in (3, 3, 1):
    ...     words.zero_grad()
    ...     words(torch.tensor([row])).sum().backward()
    ...     opt.step()
    >>> report = optim.row_report(opt)
    >>> report.tables[0].counts
    tensor([0, 1, 0, 2, 0])
    >>> print(report)
    table  rows  steps  lazy  never  median  90 %  most  updates  of dense
        0     5      3   yes      3       0     2     2        3      20 %
    """
    inner = innermost(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"row_report needs an optimizer, got {name_of(optimizer)}")
    lazy = optimizer
    while isinstance(lazy, Wrapper) and not isinstance(lazy, Lazy):
        lazy = lazy.optimizer
    counted = lazy.counts if isinstance(lazy, Lazy) else {}
    unasked = isinstance(lazy, Lazy) and not lazy.count_rows
    if isinstance(inner, SparseAdam) and not counted:
        raise ValueError("SparseAdam does not count rows; LazyAdam with count_rows=True does")
    found = []
    number = -1
    for group in inner.param_groups:
        for name, p in zip(group.get("param_names", group["params"]), group["params"], strict=True):
            number += 1
            state = inner.state.get(p, {})
            steps, counts = int(state.get("step", 0)), state.get("touches")
            if p in counted:
                steps, counts = int(counted[p][-1]), counted[p][:-1]
            if p.dim() != 2 or not steps:
                continue
            unasked |= isinstance(inner, LazyAdam) and counts is None and not counted
            few = counts is not None and bool(counts.any()) and not bool((counts == steps).all())
            counts = counts.cpu().long() if few else torch.full((p.size(0),), steps)
            found.append(RowCounts(name if isinstance(name, str) else str(number), counts, steps, few))
    if unasked:
        raise ValueError(f"rows were not counted; make the {type(optimizer).__name__} with count_rows=True")
    if not found:
        raise ValueError("no matrix was updated yet; report after some steps")
    return RowReport(tuple(found))
