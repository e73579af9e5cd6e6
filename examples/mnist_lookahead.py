"""Does Lookahead help SGD, Adam and AdamW on MNIST-5000, as Zhang et al. (2019) found on larger tasks?

Trains a small convolutional network with each optimizer alone and inside Lookahead (k = 5, alpha = 0.5), at three rates
and on five seeds, and writes a row of `docs/evidence/lookahead.csv` for each finished run, then the page and the figure
beside it. A restart skips the runs that are in the CSV; delete it to start anew. `--quick` writes to `runs/`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from _study import Row, Run, Verdict, aligned, facts, figure, markdown, paired, read, seen, spread, text, work_off
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyseq.data import digits
from pyseq.optim import Lookahead

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "SGD": lambda parameters, rate: SGD(parameters, rate, momentum=0.9),
    "Adam": lambda parameters, rate: Adam(parameters, rate),
    "AdamW": lambda parameters, rate: AdamW(parameters, rate),
}
RATES = {"SGD": (0.01, 0.03, 0.1), "Adam": (0.001, 0.003, 0.01), "AdamW": (0.001, 0.003, 0.01)}
EPOCHS = {"quick": 3, "published": 20}
BATCH, K, ALPHA = 64, 5, 0.5


def network() -> nn.Sequential:
    """55,338 parameters, no normalisation or dropout: slow weights need no statistics of their own."""
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1))
    blocks = [layer for c in convolutions for layer in (c, nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def work(run: Run, threads: int) -> list[Row]:
    """Train once. Of each kind of weights the row has the validation curve, and the test accuracy of its best epoch."""
    torch.set_num_threads(threads)
    began, data = time.perf_counter(), digits()
    images = data.images.unsqueeze(1) / 255
    images = (images - images[data.train].mean()) / images[data.train].std()
    valid, test = ((images[part], data.labels[part]) for part in (data.valid, data.test))
    torch.manual_seed(run["seed"])
    model = network()
    optimizer = OPTIMIZERS[run["optimizer"]](model.parameters(), run["rate"])
    if run["lookahead"]:
        optimizer = Lookahead(optimizer, k=K, alpha=ALPHA)
    curves: dict[str, list[float]] = {"fast": [], "slow": []}
    best: dict[str, Row] = {
        kind: dict.fromkeys((f"{kind}_epoch", f"{kind}_valid", f"{kind}_test"), "") for kind in curves
    }

    def look(kind: str, epoch: int) -> None:
        curves[kind].append(accuracy(model, *valid))
        if curves[kind][-1] > max(curves[kind][:-1], default=-1):
            scores = (f"{curves[kind][-1]:.4f}", f"{accuracy(model, *test):.4f}")
            best[kind] = dict(zip(best[kind], (str(epoch), *scores), strict=True))

    for epoch in range(1, run["epochs"] + 1):
        for batch in data.train[torch.randperm(len(data.train))].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), data.labels[batch]).backward()
            optimizer.step()
        look("fast", epoch)
        if isinstance(optimizer, Lookahead):
            with optimizer.slow_weights():
                look("slow", epoch)
    drawn = {f"{kind}_curve": " ".join(f"{x:.4f}" for x in curve) for kind, curve in curves.items()}
    seconds = f"{time.perf_counter() - began:.1f}"
    return [{**text(run), **best["fast"], **best["slow"], **drawn, "seconds": seconds, **facts(threads)}]


class Side:
    """The runs of one optimizer, alone or inside Lookahead; scores in percent, of slow weights where there are some."""

    def __init__(self, rows: list[Row], optimizer: str, lookahead: bool) -> None:
        self.name = f"{optimizer} in Lookahead" if lookahead else optimizer
        self.kind = "slow" if lookahead else "fast"
        own = [row for row in rows if row["optimizer"] == optimizer and row["lookahead"] == str(lookahead)]
        own.sort(key=lambda row: int(row["seed"]))
        self.runs = {rate: [row for row in own if float(row["rate"]) == rate] for rate in RATES[optimizer]}
        self.rate = max(self.runs, key=lambda rate: statistics.mean(self.scores(rate, "valid")))

    def scores(self, rate: float, what: str = "test", kind: str = "") -> list[float]:
        """One a seed."""
        return [100 * float(row[f"{kind or self.kind}_{what}"]) for row in self.runs[rate]]

    def curve(self, kind: str) -> list[float]:
        """Validation, mean over the seeds, at the best rate."""
        curves = [[100 * float(x) for x in row[f"{kind}_curve"].split()] for row in self.runs[self.rate]]
        return [statistics.mean(points) for points in zip(*curves, strict=True)]

    @property
    def ranges(self) -> list[float]:
        """Largest less smallest over the rates, one a seed."""
        return [max(x) - min(x) for x in zip(*map(self.scores, self.runs), strict=True)]

    @property
    def range_of_means(self) -> float:
        means = [statistics.mean(self.scores(rate)) for rate in self.runs]
        return max(means) - min(means)

    @property
    def deviations(self) -> list[float]:
        """Sample standard deviation over the seeds, one a rate; 0 of a single seed."""
        return [statistics.stdev(x) if len(x) > 1 else 0.0 for x in map(self.scores, self.runs)]


def compare(rows: list[Row]) -> list[tuple[Side, Side]]:
    return [(Side(rows, name, False), Side(rows, name, True)) for name in OPTIMIZERS]


def claims(pairs: list[tuple[Side, Side]]) -> dict[str, list[Verdict]]:
    """Of each claim a verdict for each optimizer."""
    best = [paired(ours.scores(ours.rate), plain.scores(plain.rate)) for plain, ours in pairs]
    ranges = [paired(plain.ranges, ours.ranges) for plain, ours in pairs]
    deviations = [paired(plain.deviations, ours.deviations) for plain, ours in pairs]
    return {
        "Lookahead improves the best test accuracy": [Verdict(gains, "seeds") for gains in best],
        "Lookahead is less sensitive to the inner rate": [Verdict(gains, "seeds") for gains in ranges],
        "Lookahead has less spread over the seeds": [Verdict(gains, "rates") for gains in deviations],
    }


def table(pairs: list[tuple[Side, Side]]) -> list[list[str]]:
    lines = [["", "low rate", "middle rate", "high rate", "best rate", "fast weights there", "range of the means"]]
    for side in (side for pair in pairs for side in pair):
        scores = [spread(side.scores(rate), 2) for rate in side.runs]
        fast = spread(side.scores(side.rate, kind="fast"), 2)
        lines.append([side.name, *scores, str(side.rate), fast, f"{side.range_of_means:.2f}"])
    return lines


def page(rows: list[Row], name: str) -> str:
    """Markdown, its verdicts computed from the rows."""
    pairs = compare(rows)
    said = claims(pairs)
    verdicts = [verdict for verdicts in said.values() for verdict in verdicts]
    words = "\n".join(
        f"- {claim}.\n"
        + "\n".join(f"  - {pair[0].name}: {verdict}." for pair, verdict in zip(pairs, found, strict=True))
        for claim, found in said.items()
    )
    helped = [pair[0].name for pair, verdict in zip(pairs, next(iter(said.values())), strict=True) if verdict.holds]
    rates = "; ".join(f"{name} {', '.join(map(str, RATES[name]))}" for name in RATES)
    machine, threads, version, date, epochs, preset = (
        seen(rows, column) for column in ("machine", "threads", "torch", "date", "epochs", "preset")
    )
    seeds = len({row["seed"] for row in rows})
    minutes = sum(float(row["seconds"]) for row in rows) / 60
    ends = [side.name for pair in pairs for side in pair if side.rate != sorted(side.runs)[1]]
    return f"""# Lookahead on MNIST-5000

Does it help here? A better best test accuracy is shown for {" and ".join(helped) or "no optimizer"}. Of the
{len(verdicts)} verdicts below {sum(verdict.holds for verdict in verdicts)} are "holds".

Claims, after Zhang, Lucas, Hinton and Ba 2019, "Lookahead Optimizer":

{words}

Differences are above 0 where Lookahead is better. A claim "holds" where the 95 % interval of the mean paired difference
(Student's t) lies above 0. "Does not hold" means that these numbers do not show it, not that it is false elsewhere.
Best test accuracy: of the rate with the best mean validation accuracy, chosen for each side by itself, paired by seed.
Sensitivity: largest less smallest test accuracy over the rates within a seed, the plain optimizer's less Lookahead's.
Spread: the standard deviation over the seeds at a rate, likewise, paired by rate.

{markdown(table(pairs))}

Test accuracy in percent, mean ± standard deviation over {seeds} seeds, at the epoch with the best validation accuracy,
by slow weights for Lookahead; "fast weights there": by fast weights, at the best rate and an epoch of their own. Rates
of the inner optimizer: {rates}.

![Validation accuracy over the epochs]({name}.png)

A convolutional network of 55,338 parameters; 3,000 images train, 1,000 validate, 1,000 test, as `pyseq.data.digits`
splits them; {epochs} epochs, batches of {BATCH}; SGD with momentum 0.9, AdamW with decay 0.01; Lookahead with k = {K},
alpha = {ALPHA}, momentum "keep". Both sides of a pair see the same initial weights and batches.

A fair objection: the rates were chosen by a look at plain SGD and Adam on the validation split, and three are few. A
best rate at an end of them may not be the best there is: {", ".join(ends) or "none"}. Rates stay constant; a
schedule that lets them fall quietens the fast weights, which is what averaging does too. One small task says little of
large ones, and one of 1,000 test images is 0.1 points.

Preset: {preset}. {machine}; threads a run: {threads}; torch {version}; {date}; {minutes:.0f} minutes of runs.
Each run is a row of [{name}.csv]({name}.csv); `make study STUDY=lookahead` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    pairs = compare(rows)
    settled = []
    with figure(path, columns=len(pairs), size=(10, 3.6)) as axes:
        for panel, (plain, ours) in zip(axes, pairs, strict=True):
            for side, kind, colour in ((plain, "fast", "orange"), (ours, "fast", "cyan"), (ours, "slow", "blue")):
                curve = side.curve(kind)
                label = f"Lookahead, {kind} weights" if side is ours else "alone"
                panel.plot(range(1, len(curve) + 1), curve, color=f"tab:{colour}", label=f"{label}, rate {side.rate}")
                settled += curve[len(curve) // 5 :]
            panel.set_title(plain.name, size=10)
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.legend(loc="lower right", fontsize=8)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("validation accuracy, %")
        room = max(settled) - min(settled)
        axes[0].set_ylim(min(settled) - 0.5 * room, max(settled) + 0.1 * room)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 epochs, 2 seeds, into runs/: under two minutes")
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 5)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default: 1)")
    parser.add_argument("--csv", type=Path, help="instead of docs/evidence/lookahead.csv")
    args = parser.parse_args()
    preset, seeds = ("quick", args.seeds or 2) if args.quick else ("published", args.seeds or 5)
    path: Path = args.csv or ROOT / ("runs/lookahead-quick.csv" if args.quick else "docs/evidence/lookahead.csv")
    shared = {"preset": preset, "epochs": EPOCHS[preset]}
    queue = [
        {**shared, "optimizer": name, "lookahead": lookahead, "rate": rate, "seed": seed}
        for seed in range(seeds)
        for name, rates in RATES.items()
        for rate in rates
        for lookahead in (False, True)
    ]
    work_off(path, queue, partial(work, threads=args.threads), args.workers)
    rows = [row for run in queue for row in read(path, run)]
    print("\n" + aligned(table(compare(rows))))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, path.stem), encoding="utf-8")
    print(f"\nThe page: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
