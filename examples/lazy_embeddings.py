"""Does lazy Adam, which updates only the rows of the batch, help a small sentiment model of Chinese reviews?

Trains word embeddings and an LSTM with dense Adam and lazy ones, then Lookahead over the better of ours, and writes a
row of `docs/evidence/lazy_adam.csv` for each finished run; then steps a table of 20,000,000 rows, a row of
`lazy_adam_large.csv` each; then the page and the figures beside them. A restart skips the runs that have rows; delete
the files to start anew. `--quick` writes to `runs/`.
"""

import argparse
import gc
import importlib
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _study import Row, Run, Verdict, aligned, facts, figure, markdown, paired, read, seen, spread, text, work_off
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam, Optimizer, SparseAdam

from pyseq.data import cut_words, people_daily, reviews
from pyseq.optim import LazyAdam, Lookahead

ROOT = Path(__file__).resolve().parents[1]
DENSE, OURS, OVER = "Adam", ("LazyAdam, skip", "LazyAdam, decay"), "Lookahead over "
SIDES = (DENSE, "SparseAdam", *OURS)
EPOCHS = {"quick": 2, "published": 8}
EVERY = {"quick": 8, "published": 1}  # of so many training texts one is used
MOST_WORDS, LENGTH, WIDTH, BATCH, RATE, K, ALPHA = 20_000, 80, 128, 32, 1e-3, 5, 0.5
BINS, RARE = 11, 2  # by how often a word occurs: once, 2-3, 4-7, ...; the first ones are the rare words
LARGE = {"quick": 1_000_000, "published": 20_000_000}
LARGE_WIDTH, LARGE_BATCH, LARGE_STEPS, DENSE_STEPS = 32, 65_536, 30, 5
LARGE_SIDES = ("LazyAdam, float32", "LazyAdam, bfloat16", "Adam, fused, float32")
SCATTER = 7_368_787  # prime, so that frequent words lie everywhere in the table
MOST_MEMORY, SPARE_MEMORY = 13 * 2**30, 2**30


class Texts(NamedTuple):
    ids: Tensor  # (texts, LENGTH), 0 where a text is over
    lengths: Tensor  # (texts,)
    labels: Tensor  # (texts,) 0 or 1
    parts: dict[str, Tensor]
    counts: Tensor  # (words + 1,) occurrences in the training texts

    @property
    def bins(self) -> Tensor:
        """(words,) by how often they occur."""
        return self.counts[1:].double().log2().long().clamp(max=BINS - 1)


def texts(every: int) -> Texts:
    """The last words of each review, as numbers from 1; words that do not occur in training are left out."""
    data, daily = reviews(), people_daily()
    known = frozenset(word for s in (*daily.train, *daily.valid, *daily.test) for word in s.words)
    cut = [cut_words(review, known) for review in data.texts]
    train = data.train[::every]
    often = Counter(word for i in train.tolist() for word in cut[i][-LENGTH:])
    number = {word: i for i, (word, _) in enumerate(often.most_common(MOST_WORDS), 1)}
    kept = [[number[word] for word in words if word in number][-LENGTH:] for words in cut]
    ids = torch.tensor([own + [0] * (LENGTH - len(own)) for own in kept])
    lengths = torch.tensor([max(1, len(own)) for own in kept])
    parts = {"train": train, "valid": data.valid, "test": data.test}
    counts = ids[train].flatten().bincount(minlength=len(number) + 1)
    return Texts(ids, lengths, data.labels.float(), parts, counts)


class Sentiment(nn.Module):
    """Embedding as the post's (uniform, ±0.05), an LSTM, and a linear head on its state after the last word."""

    def __init__(self, words: int, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(words + 1, WIDTH, padding_idx=0, sparse=sparse)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.words.weight[1:].uniform_(-0.05, 0.05)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        states = self.lstm(self.words(ids[:, : int(lengths.max())]))[0]
        logits: Tensor = self.head(states[torch.arange(len(ids)), lengths - 1]).squeeze(1)
        return logits


def optimizers(side: str, model: Sentiment) -> list[Optimizer]:
    table = model.words.weight
    rest = [p for p in model.parameters() if p is not table]
    if side == "Adam":
        return [Adam([table, *rest], RATE, fused=True)]
    if side == "SparseAdam":
        return [SparseAdam([table], RATE), Adam(rest, RATE, fused=True)]
    lazy = LazyAdam([table, *rest], RATE, semantics="decay" if side.endswith("decay") else "skip", count_rows=True)
    return [Lookahead(lazy, k=K, alpha=ALPHA) if side.startswith(OVER) else lazy]


@torch.no_grad()
def accuracy(model: Sentiment, data: Texts, part: str) -> float:
    right = 0
    for some in data.parts[part][data.lengths[data.parts[part]].argsort()].split(256):
        right += int(((model(data.ids[some], data.lengths[some]) > 0) == (data.labels[some] > 0)).sum())
    return right / len(data.parts[part])


def work(run: Run, threads: int) -> list[Row]:
    """Train once. The row has the validation curve, the test accuracy of its best epoch, and of words by how often they
    occur the number, the mean updates of a row, and how far rows came from where they began."""
    torch.set_num_threads(threads)
    began, side = time.perf_counter(), str(run["side"])
    data = texts(run["every"])
    torch.manual_seed(run["seed"])
    model = Sentiment(len(data.counts) - 1, sparse=side != DENSE)
    table = model.words.weight
    start, changed, steps = table.detach().clone(), torch.zeros(len(table)), 0
    using = optimizers(side, model)
    curve: list[float] = []
    best: Row = {}
    training = 0.0
    for epoch in range(1, run["epochs"] + 1):
        for batch in data.parts["train"][torch.randperm(len(data.parts["train"]))].split(BATCH):
            before = table.detach().clone() if side == DENSE else None
            now = time.process_time()
            for optimizer in using:
                optimizer.zero_grad()
            logits = model(data.ids[batch], data.lengths[batch])
            binary_cross_entropy_with_logits(logits, data.labels[batch]).backward()
            for optimizer in using:
                optimizer.step()
            training += time.process_time() - now
            steps += 1
            if before is not None:
                changed += (table.detach() != before).any(1)
        with using[0].slow_weights() if isinstance(using[0], Lookahead) else nullcontext():
            curve.append(accuracy(model, data, "valid"))
            if curve[-1] > max(curve[:-1], default=-1):
                scores = (f"{curve[-1]:.5f}", f"{accuracy(model, data, 'test'):.5f}")
                best = dict(zip(("epoch", "valid", "test"), (str(epoch), *scores), strict=True))
    inner = using[0].optimizer if isinstance(using[0], Lookahead) else using[0]
    counted = isinstance(inner, LazyAdam)
    updates = inner.state[table]["touches"].double() if counted else changed.double()
    moved = (table.detach() - start).norm(dim=1).double()
    return [
        {
            **text(run),
            **best,
            "curve": listed(curve),
            "steps": str(steps),
            "words": listed(data.bins.bincount(minlength=BINS).tolist(), 0),
            "updates": listed(by_bin(updates[1:], data.bins), 3) if counted or side == DENSE else "",
            "moved": listed(by_bin(moved[1:], data.bins)),
            "cpu_seconds": f"{training / run['epochs']:.2f}",
            "seconds": f"{time.perf_counter() - began:.1f}",
            **facts(threads),
        }
    ]


def by_bin(values: Tensor, bins: Tensor) -> list[float]:
    """Means; 0 of no words."""
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, values)
    return (sums / bins.bincount(minlength=BINS).clamp(min=1)).tolist()


def listed(values: Sequence[float], digits: int = 5) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def numbers(words: str) -> list[float]:
    return [float(word) for word in words.split()]


def free_memory() -> int:
    """Bytes; where the system does not say, as if there were plenty."""
    gc.collect()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 2 * MOST_MEMORY
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def copy_speed() -> float:
    """Bytes read and written a second, by the extension where it is built."""
    try:
        return float(importlib.import_module("pyseq._C").copy_bandwidth(torch.get_num_threads(), 0.5))
    except ImportError:
        pass
    a, b = torch.ones(2**27), torch.zeros(2**27)
    times = []
    for _ in range(5):
        now = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - now)
    return 2 * 4 * a.numel() / min(times)


def large(run: Run, threads: int) -> list[Row]:
    """Steps of one optimizer on one table, other rows in each; dense Adam is computed where it does not fit."""
    torch.set_num_threads(threads)
    began, speed, free = time.perf_counter(), copy_speed(), free_memory()
    rows, lazy = int(run["rows"]), run["optimizer"] != LARGE_SIDES[-1]
    dtype = torch.bfloat16 if run["optimizer"].endswith("bfloat16") else torch.float32
    one = rows * LARGE_WIDTH * dtype.itemsize
    held = (3 if lazy else 4) * one  # weights and two averages; a dense gradient
    random = torch.Generator().manual_seed(0)

    def batch() -> Tensor:
        """Zipf: a word's odds are those of 1 / its rank."""
        share = torch.rand(LARGE_BATCH, generator=random, dtype=torch.float64)
        ranks: Tensor = torch.pow(rows, share).long().clamp(max=rows)
        return ranks * SCATTER % rows

    fits = held <= min(MOST_MEMORY, free - SPARE_MEMORY)
    if lazy and not fits:
        raise MemoryError(
            f"{run['optimizer']} needs {held / 1e9:.1f} GB and some, {free / 1e9:.1f} are free: --large-rows"
        )
    distinct = [len(batch().unique()) for _ in range(5)]
    if lazy:
        traffic = statistics.mean(distinct) * LARGE_WIDTH * dtype.itemsize * 6
        traffic += LARGE_BATCH * (LARGE_WIDTH * dtype.itemsize + 8)
    else:
        traffic = 7 * one
    if fits:
        times = timed(torch.empty(rows, LARGE_WIDTH, dtype=dtype), batch, lazy)
    else:
        times = [traffic / speed]
    return [
        {
            **text(run),
            "how": "measured" if fits else "computed",
            "steps": str(len(times) if fits else 0),
            "table_and_averages_bytes": str(3 * one),
            "gradient_bytes": str(LARGE_BATCH * (LARGE_WIDTH * dtype.itemsize + 8) if lazy else one),
            "distinct_rows": f"{statistics.mean(distinct):.0f}",
            "moved_bytes": f"{traffic:.0f}",
            "ms": f"{1e3 * statistics.median(times):.3f}",
            "least_ms": f"{1e3 * min(times):.3f}",
            "most_ms": f"{1e3 * max(times):.3f}",
            "copy_gb_per_s": f"{speed / 1e9:.2f}",
            "free_gb": f"{free / 1e9:.1f}",
            "seconds": f"{time.perf_counter() - began:.1f}",
            **facts(threads),
        }
    ]


def timed(values: Tensor, batch: Any, lazy: bool) -> list[float]:
    """Seconds of each step, without its gradient's making."""
    table = nn.Parameter(values.uniform_(-0.05, 0.05))
    if lazy:
        state_dtype = torch.bfloat16 if table.dtype == torch.bfloat16 else torch.float32
        optimizer: Optimizer = LazyAdam([table], RATE, state_dtype=state_dtype)
        for name in ("exp_avg", "exp_avg_sq"):  # memory that was never written is slow once
            optimizer.state[table][name].fill_(0)
    else:
        optimizer = Adam([table], RATE, fused=True)
    gradient = torch.randn(LARGE_BATCH, LARGE_WIDTH, dtype=torch.float32).to(table.dtype)
    if not lazy:
        table.grad = torch.zeros_like(table)
        table.grad.fill_(0)
    times = []
    for _ in range(1 + (LARGE_STEPS if lazy else DENSE_STEPS)):
        if lazy:
            rows = batch().unsqueeze(0)
            table.grad = torch.sparse_coo_tensor(rows, gradient, table.shape, check_invariants=False)
        elif table.grad is not None:
            table.grad.index_add_(0, batch(), gradient)
        now = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - now)
    return times[1:]


class Side:
    """The runs of one side, by seed; scores in percent."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.name = name
        self.rows = sorted((row for row in rows if row["side"] == name), key=lambda row: int(row["seed"]))

    def scores(self, what: str = "test") -> list[float]:
        return [100 * float(row[what]) for row in self.rows]

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows]

    def bins(self, name: str) -> list[float]:
        """Mean over the seeds."""
        return [statistics.mean(values) for values in zip(*(numbers(row[name]) for row in self.rows), strict=True)]

    @property
    def curve(self) -> list[float]:
        return [100 * value for value in self.bins("curve")]

    @property
    def rare_moved(self) -> list[float]:
        """How far the rows of rare words came, one a seed."""
        return [rare(numbers(row["moved"]), numbers(row["words"])) for row in self.rows]


def rare(values: Sequence[float], words: Sequence[float]) -> float:
    return sum(v * n for v, n in zip(values[:RARE], words[:RARE], strict=True)) / sum(words[:RARE])


def better(rows: Sequence[Row]) -> str:
    """Of our two the one with the higher mean validation accuracy."""
    return max(OURS, key=lambda name: statistics.mean(Side(rows, name).scores("valid")))


def sides(rows: Sequence[Row]) -> list[Side]:
    names = [*SIDES, *dict.fromkeys(row["side"] for row in rows if row["side"].startswith(OVER))]
    return [Side(rows, name) for name in names]


def claims(found: list[Side]) -> dict[str, dict[str, Verdict]]:
    """Of each claim a verdict for each side that it is about."""
    dense, lazy, over = found[0], found[1:4], found[4]
    inner = next(side for side in lazy if side.name == over.name.removeprefix(OVER))
    seconds = {side.name: paired(dense.column("cpu_seconds"), side.column("cpu_seconds")) for side in (*lazy, over)}
    return {
        "Lazy updates improve the test accuracy over dense Adam": {
            side.name: Verdict(paired(side.scores(), dense.scores())) for side in lazy
        },
        "They improve the best validation accuracy, which is how the post measured": {
            side.name: Verdict(paired(side.scores("valid"), dense.scores("valid"))) for side in lazy
        },
        f"Dense Adam moves the rows of words that occur fewer than {2**RARE} times further": {
            side.name: Verdict(paired(dense.rare_moved, side.rare_moved), unit="of distance", digits=3) for side in lazy
        },
        "Lookahead improves the test accuracy over its inner optimizer": {
            over.name: Verdict(paired(over.scores(), inner.scores()))
        },
        "An epoch takes less CPU time than dense Adam's": {
            name: Verdict(gains, unit="s") for name, gains in seconds.items()
        },
    }


def table(found: list[Side]) -> list[list[str]]:
    lines = [["", "test accuracy, %", "validation accuracy, %", "best epoch", "rare words moved", "CPU s an epoch"]]
    for side in found:
        numbers = [spread(side.scores(what), 2) for what in ("test", "valid")]
        numbers += [spread(side.column("epoch"), 1), spread(side.rare_moved, 3)]
        lines.append([side.name, *numbers, spread(side.column("cpu_seconds"), 2)])
    return lines


def labels() -> list[str]:
    """Of the bins."""
    each = [f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, BINS - 1)]
    return ["1", *each, f"{2 ** (BINS - 1)} and more"]


def rows_table(found: list[Side]) -> list[list[str]]:
    dense, ours = found[0], found[2:4]
    columns = [dense.bins("words"), dense.bins("updates"), ours[0].bins("updates")]
    columns += [side.bins("moved") for side in (dense, *found[1:4])]
    heads = ["a word occurs", "words", "Adam: steps that changed its row", "lazy: steps that saw it"]
    lines = [[*heads, *(f"moved by {side.name}" for side in found[:4])]]
    for label, words, *updates, a, b, c, d in zip(labels(), *columns, strict=True):
        lines.append([label, f"{words:,.0f}", *(f"{x:,.1f}" for x in updates), *(f"{x:.2f}" for x in (a, b, c, d))])
    return lines


def large_table(rows: Sequence[Row]) -> list[list[str]]:
    lines = [["", "table and averages", "gradient", "moved in a step", "ms a step", "", "of copy speed"]]
    for row in rows:
        sizes = [float(row[f"{name}_bytes"]) for name in ("table_and_averages", "gradient", "moved")]
        speed = sizes[2] / float(row["ms"]) / 1e6 / float(row["copy_gb_per_s"])
        span = f"{row['how']}, {row['steps']} steps, {float(row['least_ms']):,.1f} to {float(row['most_ms']):,.1f}"
        how = span if row["how"] == "measured" else "computed"
        size = [f"{x / 1e9:,.3f} GB" for x in sizes]
        lines.append([row["optimizer"], *size, f"{float(row['ms']):,.1f}", how, f"{100 * speed:.0f} %"])
    return lines


def page(rows: list[Row], big: list[Row], name: str) -> str:
    """Markdown, its verdicts computed from the rows."""
    found = sides(rows)
    said = claims(found)
    every = [verdict for verdicts in said.values() for verdict in verdicts.values()]
    words = "\n".join(
        f"- {claim}.\n" + "\n".join(f"  - {name}: {verdict}." for name, verdict in verdicts.items())
        for claim, verdicts in said.items()
    )
    helped, _, further, lookahead, faster = said.values()
    names, because, quicker = (
        "; ".join(name for name, verdict in verdicts.items() if verdict.holds) or "none of them"
        for verdicts in (helped, further, faster)
    )
    machine, threads, version, date, epochs, preset, every_text = (
        seen(rows, column) for column in ("machine", "threads", "torch", "date", "epochs", "preset", "every")
    )
    seeds = len({row["seed"] for row in rows})
    minutes = sum(float(row["seconds"]) for row in (*rows, *big)) / 60
    steps, vocabulary = rows[0]["steps"], sum(numbers(rows[0]["words"]))
    few = sum(numbers(rows[0]["words"])[:RARE])
    inner = found[4].name.removeprefix(OVER)
    used = "all used" if every_text == "1" else f"one in {every_text} used"
    adds = "improves" if lookahead[found[4].name].holds else "is not shown to improve"
    short = (
        f"Does it help here? A better test accuracy than dense Adam's is shown for {names}. That dense Adam moves rare "
        f"words further is shown against {because}, a shorter epoch for {quicker}. Lookahead over the better of ours "
        f"({inner}, by validation) {adds} it. Of the {len(every)} verdicts below "
        f'{sum(verdict.holds for verdict in every)} are "holds".'
    )
    distinct = float(big[0]["distinct_rows"])
    return f"""# Lazy Adam on reviews

{textwrap.fill(short, 120)}

The claim tested is a blog post's: on IMDB lazy Adam has 84.9 % where Adam has 83.7 %, because dense Adam updates the
rows of rare words too often. It picked the epoch on the split it reports, does not say of how many runs, and its lazy
Adam counted steps too fast.

{words}

Differences are paired by seed and above 0 where the claim is right. A claim "holds" where the 95 % interval of the mean
difference (Student's t) lies above 0; {len(every)} of them are looked at, so one may well "hold" by chance. "Does
not hold" means that these numbers do not show it, not that it is false elsewhere. Test accuracy is that of the epoch
with the best validation accuracy, chosen for each run by itself; that of
Lookahead is its slow weights'.

{markdown(table(found))}

Mean ± standard deviation over {seeds} seeds. "Rare words moved": the distance of a row from where it began to where it
ended, mean over the {few:,.0f} of {vocabulary:,.0f} words that occur fewer than {2**RARE} times. Times are of training
alone, mean over the epochs of a run; CPU time, for other runs went on beside.

![Validation accuracy over the epochs]({name}.png)

## Updates of rows

![Updates of a row against how often its word occurs]({name}_rows.png)

{markdown(rows_table(found))}

Means over words and seeds, of {steps} steps. Occurrences are those in one pass over the training texts. Dense Adam
computes all rows in every step; counted are steps that changed a bit of the row, which go on after the word was seen
until its average has faded. Rows that move further do not show that this is why accuracies differ.

## How it was done

`pyseq.data.reviews`: Chinese reviews without copies, 60 % train ({used}), 20 % validate, 20 %
test. Words are the longest matches with the words of the People's Daily corpus; those that occur in training have a
row, at most {MOST_WORDS:,}, and others are left out. The last {LENGTH} words of a text count. An embedding of width
{WIDTH} (uniform, ±0.05), an LSTM of {WIDTH}, a linear head; batches of {BATCH}, rate {RATE}, {epochs} epochs. Dense
parameters have the same Adam everywhere; Lookahead has k = {K}, alpha = {ALPHA}. All sides of a seed see the same
initial weights and batches. How many epochs was chosen by the validation curves of one run each of Adam and of "skip",
seed 0.

Cut, to fit 25 minutes on two cores: {epochs} epochs where the post had 15, {seeds} seeds, one rate, no dropout, and
reviews instead of IMDB. A fair objection: one rate may suit one optimizer better than another, longer texts and larger
vocabularies may show more, and one of 3,402 test texts is 0.03 points.

## A table of {int(big[0]["rows"]):,} rows

{markdown(large_table(big))}

Width {LARGE_WIDTH}; {LARGE_BATCH:,} gradients a step, their rows Zipf-distributed, {distinct:,.0f} of them different,
and others in each step. The median step of LazyAdam, "skip", and of Adam, without making the gradient, which for dense
Adam is another pass. "Moved": rows read and written once, gradients read once. Copy speed, measured before each:
{seen(big, "copy_gb_per_s")} GB/s. "Computed": bytes over copy speed, where weights, gradient and averages did not fit
into {MOST_MEMORY >> 30} GiB or what was free. Threads: {seen(big, "threads")}.

Preset: {preset}. {machine}; threads a run: {threads}; torch {version}; {date}; {minutes:.0f} minutes of runs.
Each run is a row of [{name}.csv]({name}.csv) or of [{name}_large.csv]({name}_large.csv);
`make study STUDY=lazy_embeddings` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    found = sides(rows)
    with figure(path) as axes:
        for side, colour in zip(found, ("orange", "green", "blue", "cyan", "red"), strict=True):
            axes.plot(range(1, len(side.curve) + 1), side.curve, color=f"tab:{colour}", label=side.name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    steps = int(found[0].rows[0]["steps"])
    with figure(path.with_name(f"{path.stem}_rows.png")) as axes:
        bars = ((found[0], "Adam: steps that changed the row"), (found[2], "LazyAdam: steps that saw it"))
        for i, (side, label) in enumerate(bars):
            places = [x + 0.4 * i - 0.2 for x in range(BINS)]
            axes.bar(places, side.bins("updates"), 0.4, color=("tab:orange", "tab:blue")[i], label=label)
        axes.axhline(steps, color="black", linewidth=0.8, linestyle="--", label=f"all {steps:,} steps, Adam's work")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        ticks = [f"{label}\n{n:,.0f}" for label, n in zip(labels(), found[0].bins("words"), strict=True)]
        axes.set_xticks(range(BINS), [tick.replace(" and more", "+") for tick in ticks], fontsize=7)
        axes.set_xlabel("occurrences of a word in the training texts; below, how many words", size=9)
        axes.set_ylabel("updates of a row")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
        axes.grid(alpha=0.3, axis="y")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few texts, 2 epochs and seeds, into runs/: two minutes")
    parser.add_argument("--seeds", type=int, help="runs of each side (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default: 1)")
    parser.add_argument("--large-threads", type=int, default=2, help="of the steps of a large table (default: 2)")
    parser.add_argument("--large-rows", type=int, help="of that table, 384 bytes each (default: 20,000,000)")
    parser.add_argument("--csv", type=Path, help="instead of docs/evidence/lazy_adam.csv")
    args = parser.parse_args()
    preset, seeds = ("quick", args.seeds or 2) if args.quick else ("published", args.seeds or 3)
    path: Path = args.csv or ROOT / ("runs/lazy_adam-quick.csv" if args.quick else "docs/evidence/lazy_adam.csv")
    shared = {"preset": preset, "epochs": EPOCHS[preset], "every": EVERY[preset]}
    queue: list[Run] = [{**shared, "side": name, "seed": seed} for seed in range(seeds) for name in SIDES]
    train = partial(work, threads=args.threads)
    work_off(path, queue, train, args.workers)
    inner = better([row for run in queue for row in read(path, run)])
    queue += [{**shared, "side": OVER + inner, "seed": seed} for seed in range(seeds)]
    work_off(path, queue, train, args.workers)
    beside = path.with_name(f"{path.stem}_large.csv")
    size = args.large_rows or LARGE[preset]
    tables: list[Run] = [{"preset": preset, "optimizer": name, "rows": size} for name in LARGE_SIDES]
    work_off(beside, tables, partial(large, threads=args.large_threads))
    rows, big = ([row for run in runs for row in read(file, run)] for file, runs in ((path, queue), (beside, tables)))
    print("\n" + aligned(table(sides(rows))) + "\n\n" + aligned(large_table(big)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, big, path.stem), encoding="utf-8")
    print(f"\nThe page: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
