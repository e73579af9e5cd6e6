"""What a measurement leaves: a line of the CSV, and how its numbers are compared and written."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

KEY = ("room", "workload", "mode", "provider", "device", "baseline", "threads", "machine")
UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1, " "))
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # by degrees of freedom; the last serves beyond
Ratio = tuple[float | None, float | None, float | None]  # with its 95 % interval


@dataclass(frozen=True)
class Row:
    """A line of the CSV. status: `ok`, or why there are no times; times in seconds, memory in bytes. by_round: the
    median of each round. where: the machine and the versions, the same in all rows of a case."""

    room: str
    workload: str
    sizes: str
    mode: str
    provider: str
    version: str
    device: str
    ours: bool = False
    status: str = "ok"
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    n: int | None = None
    rounds: int | None = None
    unit: str = ""
    throughput: float | None = None
    baseline: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    limit: str = ""
    of_limit: float | None = None
    units_at_limit: float | None = None
    error: float | None = None
    budget: float | None = None
    memory: int | None = None
    fma_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    limit_source: str = ""
    by_round: dict[int, float] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> bool:
        """One of ours that is wrong, raised or did not finish; a rival that did is shown, and no fault of ours."""
        return self.ours and self.status != "ok" and not self.missing

    @property
    def missing(self) -> bool:
        return self.status.startswith("unavailable")

    @property
    def timed(self) -> bool:
        return self.status == "ok" and self.median is not None


COLUMNS = {f.name: f.type for f in fields(Row) if f.name != "where"}


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}:{_written(x)}" for key, x in value.items())
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def flat(row: Row) -> dict[str, str]:
    values = asdict(row)
    return {name: _written(values[name]) for name in COLUMNS} | row.where


def parsed(line: dict[str, str]) -> Row:
    values = {name: _value(line.get(name) or "", kind) for name, kind in COLUMNS.items()}
    return Row(**values, where={k: v for k, v in line.items() if k not in COLUMNS})


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
    if kind == dict[int, float]:
        return {int(key): float(x) for key, x in (pair.split(":") for pair in text.split())}
    return None if text == "" else get_args(kind)[0](text)


def read(path: Path) -> list[Row]:
    if not path.exists():
        raise ValueError(f"{path} does not exist yet: run python bench {path.stem} first")
    with path.open(newline="") as file:
        return [parsed(line) for line in csv.DictReader(file)]


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Put these first, in place of the lines of the same provider, case, machine and settings; then the others."""
    new = {tuple(line[k] for k in KEY): line for line in map(flat, rows)}
    old = {tuple(line[k] for k in KEY): line for line in map(flat, read(path))} if path.exists() else {}
    lines = {**new, **{key: line for key, line in old.items() if key not in new}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(name for line in lines.values() for name in line)
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())


def interval(logs: Sequence[float]) -> Ratio:
    """Geometric mean and Student's 95 % interval; none from a single round."""
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None
    half = T95[min(len(logs) - 1, len(T95)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def over(row: Row, rival: Row) -> Ratio:
    """How many times faster than a rival: the mean over rounds in which both ran. Without such rounds the ratio of the
    medians, without an interval."""
    shared = row.by_round.keys() & rival.by_round.keys() if row.where == rival.where else set()
    if shared:
        return interval([math.log(rival.by_round[r] / row.by_round[r]) for r in sorted(shared)])
    if rival.provider == row.baseline and row.ratio is not None:
        return row.ratio, row.ratio_low, row.ratio_high
    return (rival.median or 0.0) / (row.median or math.inf), None, None


def number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def scaled(x: float | None, unit: str = "") -> str:
    if x is None:
        return "-"
    size, prefix = next(((s, p) for s, p in UNITS if abs(x) >= s), (1, " "))
    return f"{x / size:.3g}{prefix}{unit}".rstrip()


def seconds(x: float | None) -> str:
    if x is None:
        return "-"
    size, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if x >= s), (1e-6, "us"))
    return f"{x / size:.{0 if x / size >= 100 else 1 if x / size >= 10 else 2}f} {unit}"


def megabytes(x: int | None) -> str:
    return "-" if x is None else f"{x / 2**20:.1f} MiB"


def times_faster(ratio: Ratio, interval: bool = True) -> str:
    """With a tilde where the interval, shown or not, does not exclude equality."""
    mean, low, high = ratio
    if mean is None or low is None or high is None:
        return "-" if mean is None else f"{number(mean)}x"
    shown = f" [{number(low)}, {number(high)}]" if interval else ""
    return f"{number(mean)}x{shown}{'' if low > 1 or high < 1 else ' ~'}"


def speedup(row: Row, interval: bool = True) -> str:
    """Over the room's baseline."""
    if row.provider == row.baseline and row.ratio is not None:
        return "1"
    return times_faster((row.ratio, row.ratio_low, row.ratio_high), interval)


def of_limit(row: Row) -> str:
    if row.of_limit is None:
        return "-"
    return f"{100 * row.of_limit:.2g} % {row.limit}" if row.of_limit >= 0.001 else f"<0.1 % {row.limit}"


def error(row: Row) -> str:
    return "-" if row.error is None else f"{row.error:.0e}" if row.error else "0"


def threads(rows: Sequence[Row]) -> str:
    return f"{rows[0].where['threads']} thread{'s' * (rows[0].where['threads'] != '1')}"


def limits(rows: Sequence[Row]) -> str:
    """Medians over the cases of a run."""
    known = [row for row in rows if row.fma_per_s is not None and row.copy_bytes_per_s is not None]
    if not known:
        return ""
    fma = statistics.median(row.fma_per_s or 0.0 for row in known)
    copy = statistics.median(row.copy_bytes_per_s or 0.0 for row in known)
    return f"limits {scaled(fma, 'FMA/s')}, copy {scaled(copy, 'B/s')} ({known[0].limit_source})"


def case_table(rows: Sequence[Row]) -> str:
    """One case for a terminal of 120 columns; refused providers are left out, failed ones keep their reason."""
    rows = [row for row in rows if not row.missing]
    if not rows:
        return ""
    first = rows[0]
    versus = f"over {first.baseline} [95 %]"
    cells = [["provider", "median", "IQR", "N", f"{first.unit}/s", versus, "of limit", "error", "memory"]]
    for row in rows:
        if row.timed:
            spread = seconds(row.q3 - row.q1) if row.q1 and row.q3 and row.n != 1 else "-"
            times = [seconds(row.median), spread, str(row.n), scaled(row.throughput)]
            cells.append([row.provider, *times, speedup(row), of_limit(row), error(row), megabytes(row.memory)])
    name, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    name = max(name, *(len(row.provider) for row in rows))
    lines = [
        who.ljust(name) + "".join(f"  {x:>{w}}" for x, w in zip(rest, widths, strict=True)) for who, *rest in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    failed = [f"{row.provider.ljust(name)}  {row.status}"[:120] for row in rows if not row.timed]
    title = f"{first.room} {first.mode}, {first.workload} {first.sizes}, {first.device}, {threads(rows)}"
    return "\n".join([f"{title}; {limits(rows)}", *lines, *failed])
