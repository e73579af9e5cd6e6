"""What studies share: a queue of runs whose finished ones are rows of a CSV, and the numbers on their pages.

A run is a dict of named settings, with what tells a quick run from a published one among them. Rows are the only resume
point: a restart skips the runs that have one, and begins the others anew.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyseq.info import cpu_name

Row = dict[str, str]
Run = Mapping[str, Any]
FACTS = ("threads", "machine", "torch", "date")
# Two-sided 95 % quantiles of Student's t for 2, 3, … values; more than six take the last, which is too wide for them
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57)


def facts(threads: int) -> Row:
    """What every row says of where and when it was made; its time is a column of its own."""
    values = (str(threads), cpu_name(), torch.__version__, time.strftime("%Y-%m-%d"))
    return dict(zip(FACTS, values, strict=True))


def text(run: Run) -> Row:
    return {name: str(value) for name, value in run.items()}


def read(path: Path, run: Run) -> list[Row]:
    """Rows that have these settings."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if text(run).items() <= row.items()]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of one run; each must name its facts and how long it took or how fast it was."""
    columns = list(rows[0])
    times = [name for name in columns if name == "seconds" or name.endswith("_per_s")]
    if not times or not set(FACTS) <= set(columns):
        raise ValueError(f"a row must have {', '.join(FACTS)} and seconds or *_per_s, got {', '.join(columns)}")
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        if not new and (header := next(csv.reader(file))) != columns:
            raise ValueError(f"{path.name} has the columns {', '.join(header)}, got {', '.join(columns)}")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def work_off(
    path: Path, queue: Sequence[Run], work: Callable[[Run], list[Row]], workers: int = 1, bars: int = 0
) -> None:
    """Do every run of the queue that has no row; its rows are appended as soon as it ends.

    workers: processes that share the queue; 1 works in this one. bars: lines of the terminal that the runs' own
    progress bars take. A run that fails stops the queue once the runs beside it have their rows.
    """
    waiting = [run for run in queue if not read(path, run)]
    live = sys.stderr.isatty()
    print(f"{len(waiting)} runs to go, {len(queue) - len(waiting)} in {path.name}", flush=True)
    with tqdm(total=len(waiting), unit="run", position=bars, mininterval=0.1 if live else 10, ascii=not live) as bar:
        for rows in map(work, waiting) if workers == 1 else _beside(waiting, work, workers):
            append(path, rows)
            bar.update()


def _beside(waiting: Sequence[Run], work: Callable[[Run], list[Row]], workers: int) -> Iterator[list[Row]]:
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=tqdm.set_lock, initargs=(context.RLock(),)) as pool:
        todo, running, failed = iter(waiting), set[Future[list[Row]]](), list[BaseException]()
        while True:
            while len(running) < workers and not failed and (run := next(todo, None)) is not None:
                running.add(pool.submit(work, run))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    failed.append(error)
                else:
                    yield future.result()
    if failed:
        raise failed[0]


def progress(what: str, steps: int) -> tqdm:
    """A bar for one run, on the line of the worker that does it."""
    worker = current_process().name.rpartition("-")[2]
    place = int(worker) - 1 if worker.isdigit() else 0
    return tqdm(desc=what, total=steps, unit="step", position=place, leave=False, disable=None)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{deviation}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """What we add to them, within each seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean, at 95 % by Student's t; without end for one value."""
    mean, n = statistics.mean(values), len(values)
    reach = STUDENT[min(n, 6) - 2] * statistics.stdev(values) / n**0.5 if n > 1 else float("inf")
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Verdict:
    """What paired gains, above 0 where a claim is right, say of it."""

    gains: list[float]
    of: str = "seeds"  # what the pairs are
    unit: str = "points"
    digits: int = 2

    @property
    def holds(self) -> bool:
        return interval(self.gains)[0] > 0

    def __str__(self) -> str:
        low, high = interval(self.gains)
        contrary = ": the numbers say the contrary" if high < 0 else ""
        doubt = ", which has 0 in it" if low <= 0 <= high else ""
        numbers = f"{spread(self.gains, self.digits)} {self.unit}, N = {len(self.gains)} {self.of}"
        reach = f"{low:.{self.digits}f} to {high:.{self.digits}f}"
        verdict = "holds" if self.holds else f"does not hold{contrary}"
        return f"{verdict} ({numbers}, 95 % interval {reach}{doubt})"


def seen(rows: Sequence[Row], name: str) -> str:
    """The different values of a column."""
    return ", ".join(dict.fromkeys(row[name] for row in rows))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head; the first column is of words, the others of numbers."""
    head, *body = ("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(lines[0]) - 1), *body])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The same for a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(x, widths, strict=True)) for x in lines)


@contextmanager
def figure(path: Path, columns: int = 1, size: tuple[float, float] = (7, 3.6)) -> Iterator[Any]:
    """Axes, several in an array, of a plot that is written to the path in the end."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(1, columns, figsize=size, layout="constrained", sharey=True)
    yield axes
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
