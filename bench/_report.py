"""Rows to the terminal, to the CSV, and from the CSV to the README's tables and the plots in docs/."""

import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

KEY = ("room", "workload", "mode", "provider", "device", "baseline", "threads", "machine")
UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1, " "))


@dataclass(frozen=True)
class Row:
    """A line of the CSV. status: `ok`, or why there are no times; times in seconds, memory in bytes."""

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
    memory_method: str = ""
    fma_per_s: float | None = None
    copy_bytes_per_s: float | None = None
    limit_source: str = ""
    where: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> bool:
        """A wrong or raising provider, whoever wrote it, or one of ours that did not finish."""
        return self.status.startswith(("wrong", "raised")) or (self.ours and self.status != "ok")


COLUMNS = [f.name for f in fields(Row) if f.name != "where"]


def flat(row: Row) -> dict[str, str]:
    values = {k: v for k, v in asdict(row).items() if k != "where"}
    text = {k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return {**text, **row.where}


def parsed(line: dict[str, str]) -> Row:
    kinds = {f.name: f.type for f in fields(Row)}
    values = {name: _value(line.get(name, ""), kinds[name]) for name in COLUMNS}
    return Row(**values, where={k: v for k, v in line.items() if k not in COLUMNS})


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
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


def speedup(row: Row, interval: bool = True) -> str:
    """With a tilde where the interval, shown or not, does not exclude equality."""
    if row.ratio is None:
        return "-"
    if row.provider == row.baseline:
        return "1"
    if row.ratio_low is None or row.ratio_high is None:
        return f"{number(row.ratio)}x"
    same = "" if row.ratio_low > 1 or row.ratio_high < 1 else " ~"
    shown = f" [{number(row.ratio_low)}, {number(row.ratio_high)}]" if interval else ""
    return f"{number(row.ratio)}x{shown}{same}"


def of_limit(row: Row) -> str:
    if row.of_limit is None:
        return "-"
    return f"{100 * row.of_limit:.2g} % {row.limit}" if row.of_limit >= 0.001 else f"<0.1 % {row.limit}"


def error(row: Row) -> str:
    return "-" if row.error is None else f"{row.error:.0e}" if row.error else "0"


def threads(rows: Sequence[Row]) -> str:
    count = rows[0].where["threads"]
    return f"{count} thread" if count == "1" else f"{count} threads"


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
    rows = [row for row in rows if not row.status.startswith("unavailable")]
    if not rows:
        return ""
    first = rows[0]
    versus = f"over {first.baseline} [95 %]"
    cells = [["provider", "median", "IQR", "N", f"{first.unit}/s", versus, "of limit", "error", "memory"]]
    cells += [_columns(row) for row in rows]
    full = [line for line in cells if len(line) > 2]
    widths = [max(len(line[i]) for line in full) for i in range(len(full[0]))]
    name = max(len(line[0]) for line in cells)
    lines = [
        line[0].ljust(name) + "".join("  " + x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))
        if line in full
        else f"{line[0].ljust(name)}  {line[1]}"[:120]
        for line in cells
    ]
    title = f"{first.room} {first.mode}, {first.workload} {first.sizes}, {first.device}, {threads(rows)}"
    return "\n".join([f"{title}; {limits(rows)}", lines[0], "-" * len(lines[0]), *lines[1:]])


def _columns(row: Row) -> list[str]:
    """Name and reason alone where there are no times."""
    if row.status != "ok" or row.q1 is None or row.q3 is None:
        return [row.provider, row.status]
    spread = seconds(row.q3 - row.q1) if row.n != 1 else "-"
    times = [seconds(row.median), spread, str(row.n), scaled(row.throughput)]
    return [row.provider, *times, speedup(row), of_limit(row), error(row), megabytes(row.memory)]


def machine_line(rows: Sequence[Row]) -> str:
    """Where and with what; several values where the rows come from several runs."""

    def seen(name: str) -> str:
        return ", ".join(dict.fromkeys(row.where[name] for row in rows if row.where.get(name)))

    rivals = dict.fromkeys(f"{row.provider} {row.version}" for row in rows if not row.ours and row.version)
    tools = [f"{name} {seen(name)}" for name in ("python", "torch", "numba", "triton") if seen(name)]
    parts = [seen("machine"), seen("isa"), threads(rows), *tools, *rivals, f"commit {seen('commit')}", seen("date")]
    return "; ".join(part for part in [*parts, limits(rows)] if part)


def groups(rows: Sequence[Row], baseline: str) -> tuple[list[list[Row]], list[list[Row]]]:
    """Those against a baseline, by device, threads and machine: of each device and threads the machine measured last,
    and the other machines."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.baseline == baseline:
            machines = found.setdefault((row.device, row.where["threads"]), {})
            machines.setdefault(row.where["machine"], []).append(row)
    latest, others = [], []
    for _, machines in sorted(found.items()):
        first, *rest = sorted(machines.values(), key=lambda rows: max(row.where["date"] for row in rows), reverse=True)
        latest.append(first)
        others += rest
    return latest, others


def markdown(rows: Sequence[Row], baseline: str) -> str:
    """One table a mode: a provider a line, a workload a column, and below for the fastest of ours what else matters."""
    out = []
    for mode in dict.fromkeys(row.mode for row in rows):
        of_mode = [row for row in rows if row.mode == mode]
        there = [row for row in of_mode if not row.status.startswith("unavailable")]
        providers = list(dict.fromkeys(row.provider for row in sorted(there, key=lambda row: row.ours)))  # rivals first
        names = list(dict.fromkeys(row.workload for row in of_mode))
        cases = [{row.provider: row for row in of_mode if row.workload == name} for name in names]
        sizes = [next(iter(case.values())).sizes.replace(" ", "<br>") for case in cases]
        table = [[mode, *(f"{name}<br>{size}" for name, size in zip(names, sizes, strict=True)), "largest error"]]
        for provider in providers:
            wrong = [case[provider] for case in cases if provider in case and case[provider].error is not None]
            worst = max(wrong, key=lambda row: row.error or 0.0, default=None)
            table.append([provider, *(_cell(case.get(provider)) for case in cases), error(worst) if worst else "-"])
        timed = [[r for r in case.values() if r.ours and r.status == "ok" and r.median is not None] for case in cases]
        best = [min(case, key=lambda row: row.median or 0.0, default=None) for case in timed]
        table.append(["our fastest, of limit", *("-" if row is None else of_limit(row) for row in best), ""])
        memory = [
            "-" if row is None else _memories(row, case.get(baseline)) for row, case in zip(best, cases, strict=True)
        ]
        table.append(["its extra memory (baseline's)", *memory, ""])
        lines = ["| " + " | ".join(line) + " |" for line in table]
        out += [lines[0], "|---" + "|---:" * (len(table[0]) - 1) + "|", *lines[1:], ""]
    legend = (
        f"Median of a call, and times faster than {baseline}: the mean over rounds in which both ran side by side, for "
        "the machine's speed drifts and medians of different hours are no pair; ~ where the 95 % interval includes 1. "
        "Largest error, of values and gradients, against float64 relative to the largest value. No row was timed that "
        "is off by more than twice the error of plain float32 torch and a rounding."
    )
    return "\n".join([*out, f"{legend} {machine_line(rows)}."])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.status != "ok":
        return row.status.split(":")[0]
    ratio = "" if row.provider == row.baseline or row.ratio is None else f"<br>{speedup(row, interval=False)}"
    return f"{seconds(row.median)}{ratio}"


def _memories(best: Row, base: Row | None) -> str:
    return f"{megabytes(best.memory)} ({megabytes(base.memory if base else None)})"


def plot(rows: Sequence[Row], mode: str, path: Path) -> None:
    """Throughput of each provider with its quartiles, and a black line where the machine's limit lies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.mode == mode and row.status == "ok" and row.throughput is not None]
    timed.sort(key=lambda row: row.ours)
    workloads = list(dict.fromkeys(row.workload for row in timed))
    providers = list(dict.fromkeys(row.provider for row in timed))
    everyone = list(dict.fromkeys(row.provider for row in rows))  # of all modes, so that colours stay
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.85 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        mine = [row for row in timed if row.provider == provider]
        x = [workloads.index(row.workload) + (i - (len(providers) - 1) / 2) * width for row in mine]
        y = [row.throughput or 0.0 for row in mine]
        work = [(row.throughput or 0.0) * (row.median or 0.0) for row in mine]
        below = [t - w / (row.q3 or 1.0) for t, w, row in zip(y, work, mine, strict=True)]
        above = [w / (row.q1 or 1.0) - t for t, w, row in zip(y, work, mine, strict=True)]
        whiskers = [[max(0.0, e) for e in below], [max(0.0, e) for e in above]]
        axes.errorbar(
            x, y, yerr=whiskers, fmt="s" if mine[0].ours else "o", color=f"C{everyone.index(provider)}", label=provider
        )
    for i, name in enumerate(workloads):
        bounds = [row.units_at_limit for row in timed if row.workload == name and row.units_at_limit]
        if bounds:
            axes.hlines(
                bounds[0], i - 0.45, i + 0.45, colors="black", label="limit of the machine, for ours" if i == 0 else ""
            )
    labels = [f"{name}\n{next(row.sizes for row in timed if row.workload == name)}" for name in workloads]
    axes.set_xticks(range(len(workloads)), labels, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel(f"{timed[0].unit} per second" if timed else "")
    axes.set_title(f"{rows[0].room} {mode}: {rows[0].where['machine']}, {threads(rows)}", fontsize=10)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plots(name: str, baseline: str, rows: Sequence[Row], docs: Path) -> list[Path]:
    """docs/<room>-<mode>.png, with the device in the name where it is not the CPU; the most threads measured."""
    largest = {
        group[0].device: group for group in sorted(groups(rows, baseline)[0], key=lambda g: int(g[0].where["threads"]))
    }
    made = []
    for device, group in largest.items():
        for mode in dict.fromkeys(row.mode for row in group):
            made.append(docs / f"{name}-{mode}{'' if device == 'cpu' else '-' + device}.png")
            plot(group, mode, made[-1])
    return made


def rewrite(root: Path, name: str, baseline: str, objection: str, rows: Sequence[Row], images: Sequence[Path]) -> None:
    """Put tables, plots and the objection between the room's markers in the README, and the tables of other machines
    between those in the room's page; ValueError where markers are missing."""
    readme = root / "README.md"
    latest, others = groups(rows, baseline)
    shown = [f"![{path.stem}]({path.relative_to(root).as_posix()})" for path in images]
    tables = [markdown(group, baseline) for group in latest]
    _replace(readme, name, "\n\n".join([*tables, *shown, f"A fair objection: {objection}"]))
    if others:
        _replace(root / "docs" / f"{name}.md", name, "\n\n".join(markdown(group, baseline) for group in others))


def _replace(page: Path, name: str, body: str) -> None:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no {begin} ... {end} to put the table between; add both lines")
    page.write_text(text[: found.start()] + f"{begin}\n{body}\n{end}" + text[found.end() :], encoding="utf-8")
