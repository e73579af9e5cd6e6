"""Does a CRF head find more entities than a softmax head on one encoder, beyond legal paths, and what does it cost?

Trains both heads of `people_daily_tagger.py` on three seeds and writes a row of `docs/people-daily.csv` for each
finished run, then the page and the figure beside it. A restart skips the runs that are in the CSV; delete it to start
anew.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from _study import Row, Run, aligned, facts, figure, markdown, paired, read, seen, spread, text, work_off
from people_daily_tagger import FULL, HEADS, LEGAL, QUICK, Result, Settings, study

from pyseq.data import ENTITY_TYPES

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCORES = ("word_f1", "entity_precision", "entity_recall", "entity_f1", *(f"{kind}_f1" for kind in ENTITY_TYPES))
KINDS = {"word": "words", "entity": "entities", "nr": "persons", "ns": "places", "nt": "organisations"}
COLOURS = {"softmax": "tab:orange", LEGAL: "tab:green", "crf": "tab:blue"}


def row(result: Result, seed: int, settings: Settings, threads: int) -> Row:
    total, kinds = result.entities["all"], [result.entities[kind].f1 for kind in ENTITY_TYPES]
    scores = (result.words.f1, total.precision, total.recall, total.f1, *kinds)
    return {
        "head": result.head,
        "seed": str(seed),
        **text(asdict(settings)),
        "best_epoch": str(result.best_epoch),
        **{name: f"{score:.5f}" for name, score in zip(SCORES, scores, strict=True)},
        "train_tokens_per_s": f"{result.train_speed:.0f}",
        "decode_tokens_per_s": f"{result.decode_speed:.0f}",
        **facts(threads),
    }


def work(run: Run, settings: Settings, threads: int) -> list[Row]:
    results = study(run["head"], settings, run["seed"], threads)
    return [row(result, run["seed"], settings, threads) for result in results]


def values(rows: list[Row], head: str, name: str) -> list[float]:
    """In the order of the seeds."""
    return [float(line[name]) for line in sorted(rows, key=lambda line: int(line["seed"])) if line["head"] == head]


def table(rows: list[Row]) -> list[list[str]]:
    """Mean and standard deviation over the seeds, and of what a CRF adds within a seed, and where it does."""
    lines = [["", *COLOURS, "CRF less softmax", "CRF less legal"]]
    for name in (*SCORES, "train_tokens_per_s", "decode_tokens_per_s"):
        digits = 0 if name.endswith("_s") else 4
        found = [values(rows, head, name) for head in COLOURS]
        gains = [paired(found[-1], other) for other in found[:-1]]
        shown = [f"{spread(x, digits)} ({sum(y > 0 for y in x)} of {len(x)})" for x in gains]
        kind, _, what = name.partition("_")
        label = f"{KINDS[kind]}, {what.replace('f1', 'F1')}" if kind in KINDS else f"tokens/s, {kind}"
        lines.append([label, *(spread(x, digits) for x in found), *shown])
    return lines


def page(rows: list[Row], settings: Settings, name: str) -> str:
    """Markdown."""
    machine, threads, torch, date = (seen(rows, column) for column in ("machine", "threads", "torch", "date"))
    return f"""# A CRF head against a softmax head on one encoder

Claim: on the same encoder a CRF head finds more entities than a softmax head, and not only because its paths are
legal. Data: People's Daily, January 1998, as `pyseq.data.people_daily` splits it. Both heads see the same seed, initial
encoder, batches and number of steps; the test split is tagged once, by the epoch with the best entity F1 on the
validation split. "{LEGAL}" is the same softmax head, decoded by Viterbi over the label pairs of the training split. F1
is of whole words and whole entities, seqeval's definition. Mean ± standard deviation over the seeds; in brackets the
seeds in which the CRF has more. A token is a character.

{markdown(table(rows))}

![F1 of both heads on every seed]({name}.png)

A fair objection: learning rate, dropout and the multiplier of the head's rate were chosen on the validation split
with the CRF head, so the softmax head may be undersold. The two heads train side by side on shared cores: compare their
speeds with each other, not with another table.

{settings}. {machine}; threads a run: {threads}; torch {torch}; {date}.
Each run is a row of [{name}.csv]({name}.csv); `make study` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    seeds = len({line["seed"] for line in rows})
    with figure(path) as axes:
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
    queue = [{"head": head, "seed": seed, **asdict(settings)} for seed in range(args.seeds) for head in HEADS]
    print(settings)
    work_off(path, queue, partial(work, settings=settings, threads=args.threads), workers=len(HEADS), bars=len(HEADS))
    rows = [line for line in read(path, asdict(settings)) if int(line["seed"]) < args.seeds]
    print("\n" + aligned(table(rows)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, settings, path.stem), encoding="utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
