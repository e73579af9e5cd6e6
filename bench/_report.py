"""From the CSVs to the README's table and figure, and to the tables of each room's page."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from _rows import Row, error, limits, megabytes, number, of_limit, over, seconds, speedup, threads, times_faster
from _runner import Room

Measured = Mapping[str, tuple[Room, Sequence[Row]]]
IMAGE = Path("docs", "bench.png")
SUMMARY = (
    "Medians of a call. Times faster: the mean over rounds in which both ran side by side, with its 95 % interval. "
    "Error: ours against float64, of values and gradients, relative to the largest. Who fails that check is not timed."
)
LEGEND = (
    "Median of a call, and times faster than {}: the mean over rounds in which both ran side by side, for a machine's "
    "speed drifts and medians of different hours are no pair; ~ where the 95 % interval includes 1. Largest error, of "
    "values and gradients, against float64 relative to the largest value. No row was timed that is off by more than "
    "twice the error of plain float32 torch and a rounding."
)


class Headline(NamedTuple):
    """An op at the workload that stands for it; our backends and the rivals that do the same job, fastest first."""

    op: str
    ours: list[Row]
    rivals: list[Row]


def runs(rows: Iterable[Row], baseline: str) -> list[list[Row]]:
    """Rows by device, threads and machine: the latest day first, and of a day the most threads."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.baseline == baseline:
            found.setdefault((row.device, row.where["threads"], row.where["machine"]), []).append(row)
    return sorted(found.values(), key=lambda run: (max(map(day, run)), int(run[0].where["threads"])), reverse=True)


def day(row: Row) -> str:
    return row.where["date"][:10]


def headlines(measured: Measured) -> list[Headline]:
    """Of each room and device, by the latest run."""
    out = []
    for room, rows in measured.values():
        mine = {p.name for p in room.providers if p.typical}
        rivals = {p.name for p in room.providers if p.backend is None and p.yardstick is None}
        latest = {run[0].device: run for run in reversed(runs(rows, room.baseline))}
        for device, run in sorted(latest.items()):
            timed = sorted((row for row in run if row.timed), key=lambda row: row.median or 0.0)
            for op, (mode, workload) in room.headlines.items():
                case = [row for row in timed if (row.mode, row.workload) == (mode, workload)]
                ours = [row for row in case if row.provider in mine]
                if ours:
                    op = op if device == "cpu" else f"{op} on {device}"
                    out.append(Headline(op, ours, [row for row in case if row.provider in rivals]))
    return out


def draw(root: Path, measured: Measured) -> None:
    """docs/bench.png: how many times faster than the fastest rival each backend is, a headline a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in headlines(measured) if line.rivals]
    if not lines:
        raise ValueError("no rival to compare with in bench/results; run python bench first")
    backends = sorted({row.provider for line in lines for row in line.ours})
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.55 * len(lines)), layout="constrained")
    axes.axvline(1, color="black", label="fastest rival", zorder=0)
    for k, backend in enumerate(backends):
        places = [(i, row) for i, line in enumerate(lines) for row in line.ours if row.provider == backend]
        x = [over(row, lines[i].rivals[0])[0] or 0.0 for i, row in places]
        y = [i + 0.7 * ((k + 0.5) / len(backends) - 0.5) for i, _ in places]
        axes.plot(x, y, "o", label=backend)
        for at in zip(x, y, strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0}
            axes.annotate(f"{number(at[0])}x", at, (6, -3), textcoords="offset points", fontsize=8, bbox=box)
    axes.set_yticks(range(len(lines)), [f"{line.op.replace('`', '')}\n{line.ours[0].sizes}" for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.hlines([i + 0.5 for i in range(len(lines) - 1)], 0, 1, "lightgray", transform=axes.get_yaxis_transform())
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("times faster than the fastest rival")
    figure.legend(ncols=5, loc="outside lower center")
    (root / IMAGE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(root / IMAGE, dpi=150)
    pyplot.close(figure)


def write(root: Path, measured: Measured) -> None:
    """The README's block of all rooms, and in each room's page the tables of every run."""
    table = [["op", "fastest rival", "pyseq", "times faster", "error"]]
    shown: dict[tuple[str, str], list[Row]] = {}
    for op, (ours, *_), rivals in headlines(measured):
        theirs = f"{rivals[0].provider} {seconds(rivals[0].median)}" if rivals else "none ran"
        ratio = times_faster(over(ours, rivals[0])) if rivals else "-"
        best = f"{ours.provider.removeprefix('pyseq ')} {seconds(ours.median)}"
        table.append([f"{op}, {ours.sizes}", theirs, best, ratio, error(ours)])
        shown.setdefault((ours.where["machine"], ours.where["threads"]), []).extend([ours, *rivals[:1]])
    body = [f"![times faster than the fastest rival]({IMAGE.as_posix()})", markdown(table), SUMMARY]
    for rows in shown.values():
        of = "" if len(shown) == 1 else f"{', '.join(dict.fromkeys(row.room for row in rows))}: "
        body.append(f"{of}{machine_line(rows)}.")
    body.append(" ".join(f"A fair objection to {name}: {room.objection}" for name, (room, _) in measured.items()))
    pages = ", ".join(f"[{name}](docs/{room.page or name}.md#measured)" for name, (room, _) in measured.items())
    _replace(root / "README.md", "bench", "\n\n".join([*body, f"All workloads, providers and machines: {pages}."]))
    for name, (room, lines) in measured.items():
        body = [LEGEND.format(room.baseline)]
        for run in runs(lines, room.baseline):
            last = "; ".join(part for part in (machine_line(run), limits(run)) if part)
            body += [f"### {run[0].where['machine']}, {threads(run)}", *tables(run, room.baseline), f"{last}."]
        _replace(root / "docs" / f"{room.page or name}.md", f"bench:{name}", "\n\n".join(body))


def tables(rows: Sequence[Row], baseline: str) -> Iterable[str]:
    """One a mode: a provider a line, a workload a column, and below for the fastest of ours what else matters."""
    for mode in dict.fromkeys(row.mode for row in rows):
        of_mode = [row for row in rows if row.mode == mode and not row.missing]
        sizes = {row.workload: row.sizes.replace(" ", "<br>") for row in of_mode}
        cases = [{row.provider: row for row in of_mode if row.workload == name} for name in sizes]
        table = [[mode, *(f"{name}<br>{size}" for name, size in sizes.items()), "largest error"]]
        for provider in dict.fromkeys(
            row.provider for row in sorted(of_mode, key=lambda row: row.ours)
        ):  # rivals first
            mine = [case.get(provider) for case in cases]
            worst = max((row for row in mine if row), key=lambda row: row.error or 0.0)
            table.append([provider, *map(_cell, mine), error(worst)])
        limit, memory = ["our fastest, of limit"], ["its extra memory (baseline's)"]
        for case in cases:
            ours = [row for row in case.values() if row.ours and row.timed]
            best = min(ours, key=lambda row: row.median or 0.0, default=None)
            base = case[baseline].memory if baseline in case else None
            limit.append(of_limit(best) if best else "-")
            memory.append(f"{megabytes(best.memory)} ({megabytes(base)})" if best else "-")
        yield markdown([*table, [*limit, ""], [*memory, ""]])


def markdown(table: Sequence[Sequence[str]]) -> str:
    first, *rest = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([first, "|---" + "|---:" * (len(table[0]) - 1) + "|", *rest])


def _cell(row: Row | None) -> str:
    if row is None or not row.timed:
        return row.status.split(":")[0] if row else "-"
    ratio = "" if row.provider == row.baseline or row.ratio is None else f"<br>{speedup(row, interval=False)}"
    return seconds(row.median) + ratio


def machine_line(rows: Sequence[Row]) -> str:
    """Where and with what; several values where the rows come from several runs."""

    def seen(name: str) -> str:
        return ", ".join(dict.fromkeys(row.where[name] for row in rows if row.where.get(name)))

    rivals = dict.fromkeys(f"{r.provider} {r.version}" for r in rows if not r.ours and r.version != r.where["torch"])
    tools = [f"{name} {seen(name)}" for name in ("python", "torch", "numba", "triton", "commit") if seen(name)]
    return "; ".join(
        [seen("machine"), seen("isa"), threads(rows), *rivals, *tools, ", ".join(dict.fromkeys(map(day, rows)))]
    )


def _replace(page: Path, name: str, body: str) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no {begin} ... {end} to put the tables between; add both lines")
    page.write_text(text[: found.start()] + f"{begin}\n{body}\n{end}" + text[found.end() :], encoding="utf-8")
