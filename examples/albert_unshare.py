"""Is ALBERT better off with its layers un-shared when it is fine-tuned, as https://kexue.fm/archives/7187 says?

Pre-trains a small ALBERT on the text of People's Daily, then fine-tunes it shared, un-shared, and with attention or
feed-forward layers alone un-shared, for sentiment and for named entities. Writes a row of `docs/evidence/albert.csv`
for each finished run, then the page and the figure beside it. A restart skips the runs that have rows; delete the file
to start anew. The pre-trained weights stay in `runs/albert`. `--quick` writes to `runs/`.
"""

import argparse
import random
import textwrap
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from _study import Row, Run, Verdict, aligned, facts, figure, markdown, paired, progress, read, seen, spread, work_off
from _study import text as texts
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    logging,
)  # fmt: skip

from pyseq import surgery
from pyseq.data import ENTITY_TYPES, SpanScore, entity_spans, people_daily, reviews

ROOT = Path(__file__).resolve().parents[1]
PAD, UNKNOWN, FIRST, LAST, MASK, SPECIAL = 0, 1, 2, 3, 4, 5
LENGTH = 64  # of a sequence, with its first and last token
SIZES = {
    "embedding_size": 64,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 768,
}
SHARED, APART, ATTENTION, FORWARD = "shared", "un-shared", "attention un-shared", "feed-forward un-shared"
PATTERNS: dict[str, Any] = {APART: None, ATTENTION: "*.attention", FORWARD: ["*.ffn", "*.ffn_output"]}
TASKS = ("sentiment", "entities")
SEEDS = {SHARED: 3, APART: 3, ATTENTION: 1, FORWARD: 1}
LABELS = ("O", *(f"{place}-{kind}" for kind in ENTITY_TYPES for place in "BI"))
PRESETS = {  # steps of each of three stages of pre-training; sequences to fine-tune on, and one in `tested` to score on
    "quick": {"steps": 10, "sequences": 160, "tested": 40, "epochs": 2},
    "published": {"steps": 900, "sequences": 6000, "tested": 1, "epochs": 3},
}
STAGES, PRE_BATCH, PRE_RATE, BATCH, RATE = 3, 64, 1e-3, 32, 3e-4
FIELDS = ("loss", "parameters", "first", "best", "best_epoch", "test", "drift", "epoch_cpu_s", "epoch_s", "seconds")


class Split(NamedTuple):
    """Token sequences with their labels: one a sequence, or one a token."""

    tokens: list[Tensor]
    labels: list[Any]

    def some(self, every: int) -> "Split":
        return Split(self.tokens[::every], self.labels[::every])


def plain(text: str) -> str:
    """Full-width characters as others write them, character by character."""
    return "".join(x if len(x) == 1 else c for c in text for x in [unicodedata.normalize("NFKC", c)])


@cache
def vocabulary() -> dict[str, int]:
    """Characters that occur twice in the training texts."""
    world, opinions = people_daily(), reviews()
    seen_often = Counter(plain("".join(x.text for x in world.train)))
    seen_often.update(plain("".join(opinions.texts[i] for i in opinions.train.tolist())))
    return {c: i for i, c in enumerate(sorted(c for c, n in seen_often.items() if n > 1), SPECIAL)}


def tokens(text: str) -> Tensor:
    known = vocabulary()
    return torch.tensor([FIRST, *(known.get(c, UNKNOWN) for c in plain(text)[: LENGTH - 2]), LAST])


@cache
def task(name: str, sequences: int) -> tuple[Split, Split, Split]:
    """Train, validation and test; the same training sequences for every run."""
    if name == "sentiment":
        data = reviews()
        parts = [Split([tokens(data.texts[i]) for i in part.tolist()], data.labels[part].tolist())
                 for part in (data.train, data.valid, data.test)]  # fmt: skip
    else:
        world = people_daily()
        parts = []
        for lines in (world.train, world.valid, world.test):
            labels = [[x.partition("|")[2] for x in line.labels][: LENGTH - 2] for line in lines]
            parts.append(Split([tokens(line.text) for line in lines], labels))
    train, valid, test = parts
    chosen = random.Random(0).sample(range(len(train.tokens)), min(sequences, len(train.tokens)))
    return Split([train.tokens[i] for i in chosen], [train.labels[i] for i in chosen]), valid, test


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Up over a tenth of the steps, then down to 0."""
    warm = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm)))


def masked(x: Tensor, known: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of 15 % of the characters 80 % masked, 10 % others, 10 % left; labels -100 elsewhere."""
    chance, what = (torch.rand(x.shape, generator=generator) for _ in range(2))
    chosen = (chance < 0.15) & (x >= SPECIAL)
    labels = x.masked_fill(~chosen, -100)
    other = torch.randint(SPECIAL, known, x.shape, generator=generator)
    x = x.masked_fill(chosen & (what < 0.8), MASK)
    return torch.where(chosen & (what >= 0.9), other, x), labels


def pretrain(run: Run, folder: Path) -> dict[str, Any]:
    """A stage of masked language modelling on the training lines, from where the stage before ended."""
    known, total = SPECIAL + len(vocabulary()), STAGES * run["steps"]
    text = plain("".join(line.text for line in people_daily().train))
    body = torch.tensor([vocabulary().get(c, UNKNOWN) for c in text])
    body = body[: len(body) // (LENGTH - 2) * (LENGTH - 2)].view(-1, LENGTH - 2)
    edge = torch.ones(len(body), 1, dtype=torch.int64)
    body = torch.cat([FIRST * edge, body, LAST * edge], 1)
    torch.manual_seed(0)
    model = AlbertForMaskedLM(AlbertConfig(
        vocab_size=known, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=PAD, bos_token_id=FIRST, eos_token_id=LAST, **SIZES,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), PRE_RATE, weight_decay=0.01)
    rates = schedule(optimizer, total)
    generator = torch.Generator().manual_seed(0)
    stage = run["seed"]
    if stage:
        kept = torch.load(folder / f"stage_{stage - 1}.pt", weights_only=True)
        for thing, state in ((model, kept["model"]), (optimizer, kept["optimizer"]), (rates, kept["rates"])):
            thing.load_state_dict(state)
        generator.set_state(kept["random"])
    losses = []
    began, cpu = time.perf_counter(), time.process_time()
    with progress(f"pre-training, {stage + 1} of {STAGES}", run["steps"]) as bar:
        for _ in range(run["steps"]):
            some = torch.randint(len(body), (PRE_BATCH,), generator=generator)
            x, labels = masked(body[some], known, generator)
            optimizer.zero_grad()
            loss = model(input_ids=x, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{mean(losses[-100:]):.2f}", refresh=False)
            bar.update()
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rates": rates.state_dict()}
    torch.save(kept | {"random": generator.get_state()}, folder / f"stage_{stage}.pt")
    if stage == STAGES - 1:
        model.save_pretrained(folder / "model")
    cost = {"epoch_s": time.perf_counter() - began, "epoch_cpu_s": time.process_time() - cpu}
    return {"loss": mean(losses[-200:]), "parameters": sum(p.numel() for p in model.parameters()), **cost}


def batches(split: Split, order: Sequence[int]) -> Iterator[tuple[dict[str, Tensor], list[Any]]]:
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        x = pad_sequence([split.tokens[i] for i in some], batch_first=True, padding_value=PAD)
        yield {"input_ids": x, "attention_mask": (x != PAD).long()}, [split.labels[i] for i in some]


def targets(labels: list[Any], width: int) -> Tensor:
    """(B,) or (B, width), -100 where no label is."""
    if not isinstance(labels[0], list):
        return torch.tensor(labels)
    rows = torch.full((len(labels), width), -100)
    for row, line in zip(rows, labels, strict=True):
        row[1 : 1 + len(line)] = torch.tensor([LABELS.index(x) for x in line])
    return rows


@torch.no_grad()
def score(model: nn.Module, split: Split) -> float:
    """Accuracy, or F1 of whole entities, in percent."""
    model.eval()
    entities, right, order = SpanScore(), 0, sorted(range(len(split.tokens)), key=lambda i: len(split.tokens[i]))
    for x, labels in batches(split, order):
        best = model(**x).logits.argmax(-1).tolist()
        if isinstance(labels[0], list):
            for line, found in zip(labels, best, strict=True):
                entities.update(entity_spans(line), entity_spans([LABELS[i] for i in found[1 : 1 + len(line)]]))
        else:
            right += sum(a == b for a, b in zip(labels, best, strict=True))
    return 100 * (entities.f1 if isinstance(split.labels[0], list) else right / len(order))


def tune(run: Run, folder: Path) -> dict[str, Any]:
    """Fine-tune from the pre-trained weights; scores after each epoch, and the test's of the best."""
    train, valid, test = task(run["what"], run["sequences"])
    valid, test = valid.some(run["tested"]), test.some(run["tested"])
    kind: Any = AlbertForSequenceClassification if run["what"] == "sentiment" else AlbertForTokenClassification
    classes = 2 if run["what"] == "sentiment" else len(LABELS)
    torch.manual_seed(run["seed"])
    model = kind.from_pretrained(folder / "model", num_labels=classes)
    if run["variant"] != SHARED:
        model = surgery.unshare(model, PATTERNS[run["variant"]])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    each = -(-len(train.tokens) // BATCH)
    rates = schedule(optimizer, each * run["epochs"])
    torch.manual_seed(run["seed"])  # equal draws, whatever was un-shared
    order = random.Random(run["seed"])
    scores: list[float] = []
    tested, cpu, wall = 0.0, 0.0, 0.0
    with progress(f"{run['what']}, {run['variant']}, {run['seed']}", each * run["epochs"]) as bar:
        for _ in range(run["epochs"]):
            model.train()
            began, cpu_began = time.perf_counter(), time.process_time()
            for x, labels in batches(train, order.sample(range(len(train.tokens)), len(train.tokens))):
                optimizer.zero_grad()
                model(**x, labels=targets(labels, x["input_ids"].size(1))).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rates.step()
                bar.update()
            cpu, wall = cpu + time.process_time() - cpu_began, wall + time.perf_counter() - began
            scores.append(score(model, valid))
            if scores[-1] == max(scores):
                tested = score(model, test)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "first": scores[0], "best": max(scores)}
    found |= {"best_epoch": 1 + scores.index(max(scores)), "test": tested}
    if run["variant"] != SHARED:
        found["drift"] = mean(x.rms for x in surgery.drift_report(model).rows)
    return found | {"epoch_cpu_s": cpu / run["epochs"], "epoch_s": wall / run["epochs"]}


def work(run: Run, threads: int, folder: Path) -> list[Row]:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()  # of weights that the head does not have
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = (pretrain if run["what"] == "pretrain" else tune)(run, folder)
    shown = {name: f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in found.items()}
    shown["seconds"] = f"{time.perf_counter() - began:.1f}"
    return [{**texts(run), **dict.fromkeys(FIELDS, ""), **shown, **facts(threads)}]


def values(rows: Sequence[Row], what: str, variant: str, name: str) -> list[float]:
    """One a seed."""
    own = sorted((x for x in rows if (x["what"], x["variant"]) == (what, variant)), key=lambda x: int(x["seed"]))
    return [float(x[name]) for x in own]


def table(rows: Sequence[Row]) -> list[list[str]]:
    columns = (("best", "best", 2), ("after epoch 1", "first", 2), ("test", "test", 2),
               ("CPU s an epoch", "epoch_cpu_s", 1), ("parameters", "parameters", 0))  # fmt: skip
    lines = [[f"{what}, {variant}", *(spread(values(rows, what, variant, name), n) for _, name, n in columns)]
             for what in TASKS for variant in SEEDS]  # fmt: skip
    return [["", *(head for head, *_ in columns)], *lines]


def gains(rows: Sequence[Row], what: str, name: str, variant: str = APART) -> list[float]:
    n = SEEDS[variant]
    return paired(values(rows, what, variant, name), values(rows, what, SHARED, name)[:n])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say, in sentences."""
    lines = []
    for what in TASKS:
        for name, said in (("best", "at its best on the validation set"), ("test", "on the test set"),
                           ("first", "after the first epoch")):  # fmt: skip
            lines.append(f"Un-shared is better, {what}, {said}: {Verdict(gains(rows, what, name))}.")
    harder = paired(gains(rows, "entities", "best"), gains(rows, "sentiment", "best"))
    lines.append(f"It gains more on entities, the harder task, than on sentiment: {Verdict(harder)}.")
    for what in TASKS:
        pairs = zip(values(rows, what, APART, "epoch_cpu_s"), values(rows, what, SHARED, "epoch_cpu_s"), strict=True)
        more = [100 * (a / b - 1) for a, b in pairs]
        inside = "within" if 3 <= mean(more) <= 15 else "outside"
        lines.append(
            f"An epoch of {what} takes {spread(more, 1)} % more CPU time un-shared, {inside} the post's 3 to 15 %."
        )
    parts = [f"{what}, {variant.removesuffix(' un-shared')} {gains(rows, what, 'best', variant)[0]:+.2f}"
             for what in TASKS for variant in (ATTENTION, FORWARD)]  # fmt: skip
    lines.append(f"Un-shared in part, at its best, one seed: {'; '.join(parts)}.")
    drifts = ", ".join(f"{what} {100 * mean(values(rows, what, APART, 'drift')):.1f} %" for what in TASKS)
    lines.append(f"Copies end apart from their mean by, of its norm: {drifts}.")
    return lines


def page(rows: list[Row], name: str) -> str:
    """Markdown, its verdicts computed from the rows."""
    bullets = "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in verdicts(rows))
    tuned, before = [x for x in rows if x["what"] != "pretrain"], [x for x in rows if x["what"] == "pretrain"]
    machine, threads, version, date, preset = (
        seen(rows, column) for column in ("machine", "threads", "torch", "date", "preset")
    )
    minutes, first = (sum(float(x["seconds"]) for x in part) / 60 for part in (tuned, before))
    return f"""# ALBERT, un-shared for fine-tuning

{bullets}

{markdown(table(rows))}

![Gains]({name}.png)

Accuracy of sentiment and F1 of whole entities, in percent, mean ± standard deviation over {SEEDS[APART]} seeds, one
seed in part un-shared. Best: of {seen(tuned, "epochs")} epochs, on the validation set; test: of that epoch. Parameters:
with the head. Points: one a seed; bars: their means.

## How it was done

`transformers.AlbertModel` of {SIZES["num_hidden_layers"]} layers, width {SIZES["hidden_size"]}, embeddings of
{SIZES["embedding_size"]}, no dropout but before the classifier, on {len(vocabulary()):,} characters. Pre-trained once,
by masked language modelling alone, on the training lines of People's Daily in sequences of {LENGTH}: {STAGES} stages of
{seen(before, "steps")} steps of {PRE_BATCH}, {first:.0f} minutes, loss {float(before[-1]["loss"]):.2f} in the end.
Then, from these weights, `surgery.unshare(model)` or not, and AdamW at {RATE} for all, with warm-up and linear decay,
batches of {BATCH}, gradients clipped at 1: {seen(tuned, "sequences")} training sequences of at most {LENGTH} tokens, of
reviews (`pyseq.data.reviews`) or of People's Daily with its persons, places and organisations. Equal seeds have equal
heads at first, equal batches and equal dropout.

A fair objection: a small model with little pre-training, one rate for both, which favours neither on purpose; the post
fine-tunes published checkpoints of several sizes, and reports no spread. With gradients clipped by their norm a shared
model is clipped more.

Preset: {preset}. {machine}; threads a run: {threads}; torch {version}; {date}; {minutes:.0f} minutes of fine-tuning.
Each run is a row of [{name}.csv]({name}.csv); `make study STUDY=albert_unshare` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    """Gains by un-sharing, one point a seed."""
    kinds = [("first", "after epoch 1"), ("best", "best"), ("test", "test")]
    with figure(path, columns=2, size=(7, 3)) as axes:
        for one, what in zip(axes, TASKS, strict=True):
            for i, (name, _) in enumerate(kinds):
                found = gains(rows, what, name)
                one.plot([i] * len(found), found, "o", color="tab:blue", alpha=0.7)
                one.plot([i - 0.15, i + 0.15], [mean(found)] * 2, color="black")
            one.axhline(0, color="grey", linewidth=0.8)
            one.set_xticks(range(len(kinds)), [said for _, said in kinds])
            one.set_title(what)
        axes[0].set_ylabel("un-shared less shared, points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and sequences, into runs/: two minutes")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, after pre-training (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default: 1)")
    parser.add_argument("--csv", type=Path, help="instead of docs/evidence/albert.csv")
    args = parser.parse_args()
    preset = "quick" if args.quick else "published"
    folder = ROOT / f"runs/albert{'-quick' if args.quick else ''}"
    path: Path = args.csv or (folder / "albert.csv" if args.quick else ROOT / "docs/evidence/albert.csv")
    shared = {"preset": preset, **PRESETS[preset]}
    before = [{**shared, "what": "pretrain", "variant": "", "seed": stage} for stage in range(STAGES)]
    queue = [
        {**shared, "what": what, "variant": v, "seed": seed}
        for what in TASKS
        for v, n in SEEDS.items()
        for seed in range(n)
    ]
    both: Callable[[Run], list[Row]] = partial(work, threads=args.workers * args.threads, folder=folder)
    work_off(path, before, both)
    work_off(path, queue, partial(work, threads=args.threads, folder=folder), args.workers, bars=args.workers)
    rows = [row for run in (*before, *queue) for row in read(path, run)]
    print("\n" + aligned(table(rows)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, path.stem), encoding="utf-8")
    print(f"\nThe page: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
