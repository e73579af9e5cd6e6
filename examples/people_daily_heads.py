"""Does a CRF head find more entities than a softmax head on one encoder, beyond legal paths, and what does it cost?

Trains both heads of `people_daily_tagger.py` on three seeds and writes a row of `docs/people-daily.csv` for each
finished run, then the page and the figure beside it. A restart skips the runs that are in the CSV; delete it to start
anew.
"""

import argparse
import csv
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from people_daily_tagger import FULL, HEADS, LEGAL, QUICK, Result, Settings, study
from tqdm import tqdm

from pyseq.data import ENTITY_TYPES
from pyseq.info import cpu_name

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCORES = ("word_f1", "entity_precision", "entity_recall", "entity_f1", *(f"{kind}_f1" for kind in ENTITY_TYPES))
KINDS = {"word": "words", "entity": "entities", "nr": "persons", "ns": "places", "nt": "organisations"}
COLOURS = {"softmax": "tab:orange", LEGAL: "tab:green", "crf": "tab:blue"}
Row = dict[str, str]


def settled(settings: Settings) -> Row:
    return {name: str(value) for name, value in asdict(settings).items()}


def row(result: Result, seed: int, settings: Settings, threads: int) -> Row:
    total, kinds = result.entities["all"], [result.entities[kind].f1 for kind in ENTITY_TYPES]
    scores = (result.words.f1, total.precision, total.recall, total.f1, *kinds)
    return {
        "head": result.head,
        "seed": str(seed),
        **settled(settings),
        "best_epoch": str(result.best_epoch),
        **{name: f"{score:.5f}" for name, score in zip(SCORES, scores, strict=True)},
        "train_tokens_per_s": f"{result.train_speed:.0f}",
        "decode_tokens_per_s": f"{result.decode_speed:.0f}",
        "threads": str(threads),
        "machine": cpu_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def read(path: Path, settings: Settings) -> list[Row]:
    """Rows of these settings."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if settled(settings).items() <= line.items()]


def append(path: Path, line: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def values(rows: list[Row], head: str, name: str) -> list[float]:
    """In the order of the seeds."""
    return [float(line[name]) for line in sorted(rows, key=lambda line: int(line["seed"])) if line["head"] == head]


def spread(x: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(x):,.{digits}f}" if len(x) > 1 else ""
    return f"{statistics.mean(x):,.{digits}f}{deviation}"


def table(rows: list[Row]) -> list[list[str]]:
    """Mean and standard deviation over the seeds, and of what a CRF adds within a seed, and where it does."""
    lines = [["", *COLOURS, "CRF less softmax", "CRF less legal"]]
    for name in (*SCORES, "train_tokens_per_s", "decode_tokens_per_s"):
        digits = 0 if name.endswith("_s") else 4
        found = [values(rows, head, name) for head in COLOURS]
        gains = [[b - a for a, b in zip(other, found[-1], strict=True)] for other in found[:-1]]
        shown = [f"{spread(x, digits)} ({sum(y > 0 for y in x)} of {len(x)})" for x in gains]
        kind, _, what = name.partition("_")
        label = f"{KINDS[kind]}, {what.replace('f1', 'F1')}" if kind in KINDS else f"tokens/s, {kind}"
        lines.append([label, *(spread(x, digits) for x in found), *shown])
    return lines


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(x, widths, strict=True)) for x in lines)


def page(rows: list[Row], settings: Settings, name: str) -> str:
    """Markdown."""
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in table(rows))
    seen = {k: ", ".join(dict.fromkeys(line[k] for line in rows)) for k in ("machine", "threads", "torch", "date")}
    return f"""# A CRF head against a softmax head on one encoder

Claim: on the same encoder a CRF head finds more entities than a softmax head, and not only because its paths are
legal. Data: People's Daily, January 1998, as `pyseq.data.people_daily` splits it. Both heads see the same seed, initial
encoder, batches and number of steps; the test split is tagged once, by the epoch with the best entity F1 on the
validation split. "{LEGAL}" is the same softmax head, decoded by Viterbi over the label pairs of the training split. F1
is of whole words and whole entities, seqeval's definition. Mean ± standard deviation over the seeds; in brackets the
seeds in which the CRF has more. A token is a character.

{head}
|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

![F1 of both heads on every seed]({name}.png)

A fair objection: learning rate, dropout and the multiplier of the head's rate were chosen on the validation split
with the CRF head, so the softmax head may be undersold. The two heads train side by side on shared cores: compare their
speeds with each other, not with another table.

{settings}. {seen["machine"]}; threads a run: {seen["threads"]}; torch {seen["torch"]}; {seen["date"]}.
Each run is a row of [{name}.csv]({name}.csv); `make study` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    seeds = len({line["seed"] for line in rows})
    for place, (head, colour) in enumerate(COLOURS.items()):
        for i, kind in enumerate(KINDS):
            scores = [100 * x for x in values(rows, head, f"{kind}_f1")]
            at, mean = i + 0.27 * (place - 1), statistics.mean(scores)
            axes.plot([at] * len(scores), scores, "o", color=colour, alpha=0.6, label=head if i == 0 else None)
            axes.hlines(mean, at - 0.1, at + 0.1, color=colour)
            axes.annotate(f"{mean:.1f}", (at, max(scores)), (0, 6), textcoords="offset points", ha="center", size=8)
    axes.set_xticks(range(len(KINDS)), list(KINDS.values()))
    axes.set_xlim(-0.6, len(KINDS) - 0.4)
    axes.set_ylabel("F1 on the test split, %")
    axes.set_title(f"People's Daily: one encoder, two heads, {seeds} seeds", size=10)
    axes.margins(y=0.1)
    axes.legend(loc="lower right")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch a run, written only to --csv")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each head (default: 3)")
    parser.add_argument("--epochs", type=int, help="passes over the training split, instead of the preset's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run; two run at a time (default: 1)")
    parser.add_argument("--csv", type=Path, help="instead of docs/people-daily.csv")
    args = parser.parse_args()
    if args.seeds < 1 or (args.epochs is not None and args.epochs < 1):
        parser.error("--seeds and --epochs must be at least 1")
    if args.quick and args.csv is None:
        parser.error("--quick needs --csv: the published table has full runs only")
    settings = QUICK if args.quick else FULL
    settings = settings if args.epochs is None else replace(settings, epochs=args.epochs)
    path: Path = args.csv or DOCS / "people-daily.csv"
    done = {(line["head"], int(line["seed"])) for line in read(path, settings)}
    queue = [(head, seed) for seed in range(args.seeds) for head in HEADS if (head, seed) not in done]
    print(f"{len(queue)} runs to go, {len(done)} in {path.name}; {settings}", flush=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(len(HEADS), context, initializer=tqdm.set_lock, initargs=(context.RLock(),)) as pool:
        running = {pool.submit(study, head, settings, seed, args.threads): seed for head, seed in queue}
        for future in as_completed(running):
            for result in future.result():
                append(path, row(result, running[future], settings, args.threads))
    rows = [line for line in read(path, settings) if int(line["seed"]) < args.seeds]
    print("\n" + aligned(table(rows)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, settings, path.stem), encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
