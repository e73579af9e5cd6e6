"""Softmax, HMM, MEMM, Bi-MEMM or CRF: which head finds more words and entities on one encoder, and what does it cost?

Trains each head on People's Daily over a weak and a strong encoder and writes a row of `docs/evidence/chain_heads.csv`
for each finished run, then the page and the figures beside it. A restart skips the runs that have rows; delete the file
to start anew. `--quick` writes to `runs/`.
"""

import argparse
import textwrap
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from multiprocessing import current_process
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from _study import Row, Run, Verdict, aligned, facts, figure, interval, markdown, paired, read, seen, spread, work_off
from _study import text as texts
from people_daily_tagger import UNKNOWN, batches, encode, index, pad
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from pyseq.data import LABELS, Sentence, SpanScore, entity_spans, people_daily, word_spans
from pyseq.models import SequenceTagger
from pyseq.nn import CRF, HMM, MEMM, crf_parameter_groups, tag_constraints

ROOT = Path(__file__).resolve().parents[1]
CELLS = tuple((task, encoder) for task in ("words", "entities") for encoder in ("weak", "strong"))
NAMES = [f"{task}, {encoder}" for task, encoder in CELLS]
SOFTMAX, FORWARD, BOTH, FIELD, COUNTED, LEGAL = "softmax", "MEMM", "Bi-MEMM", "CRF", "HMM", ", legal"
FORMS = tuple(head + form for head in (SOFTMAX, FORWARD, BOTH, FIELD) for form in ("", LEGAL))
TRAINED = tuple(form for form in FORMS if form != SOFTMAX + LEGAL)  # which is another way to decode the softmax
PRESETS = {  # one in `every` training lines, one in `tested` others
    "quick": {"every": 24, "tested": 20, "epochs": 3},
    "published": {"every": 2, "tested": 1, "epochs": 8},
}
LONGEST, BATCH = 256, 2048  # characters, of a training line and of a batch
RATE, MULTIPLIER, DROPOUT, CLIP, SMOOTHING = 5e-3, 5.0, 0.2, 5.0, 0.01
WIDTH = {"weak": 64, "strong": 128}  # of embeddings; twice that in a convolution and in an LSTM of two directions
REPEATS = 5  # of decoding alone
BELOW, TIE, HALF, QUARTER = 0.1, 0.25, (0.25, 0.75), 25.0
SCORES = ("epoch", "valid", "test", "curve", "accuracy", "raw_test", "raw_differs", "forced_accuracy", "transitions")
TIMES = ("train_cpu_s", "head_cpu_s", "decode_cpu_s", "decode_head_cpu_s", "seconds")

Constraints = tuple[Tensor, Tensor, Tensor]
Decode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Scored = list[tuple[list[int], Tensor, Tensor]]  # batches: places in the split, emissions, mask


class Split(NamedTuple):
    chars: list[Tensor]
    tags: list[Tensor]
    lines: list[list[str]]  # labels

    def batches(self) -> Scored:
        return [(places, *pad([self.chars[i] for i in places])) for places in batches(self.chars, BATCH)]

    def f1(self, labels: Sequence[str], paths: list[Tensor]) -> float:
        score, spans = SpanScore(), word_spans if labels[0] == "B" else entity_spans
        for line, path in zip(self.lines, paths, strict=True):
            score.update(spans(line), spans([labels[tag] for tag in path.tolist()]))
        return score.f1

    def accuracy(self, paths: list[Tensor]) -> float:
        return float((torch.cat(paths) == torch.cat(self.tags)).double().mean())


class Data(NamedTuple):
    labels: tuple[str, ...]
    constraints: Constraints
    symbols: int
    train: Split
    valid: Split
    test: Split


@cache
def load(task: str, every: int, tested: int) -> Data:
    """Labels are of a character's place in the word, BMES, or in the entity, BIO with its type."""
    corpus, part = people_daily(), 0 if task == "words" else 2
    labels = tuple(dict.fromkeys(label.partition("|")[part] for label in LABELS))
    train = [sentence for sentence in corpus.train[::every] if len(sentence.text) <= LONGEST]
    vocabulary, number = index(train), {label: i for i, label in enumerate(labels)}

    def split(sentences: Sequence[Sentence]) -> Split:
        lines = [[label.partition("|")[part] for label in sentence.labels] for sentence in sentences]
        tags = [torch.tensor([number[label] for label in line]) for line in lines]
        return Split([encode(sentence.text, vocabulary) for sentence in sentences], tags, lines)

    constraints = tag_constraints(labels, "BMES" if task == "words" else "BIO")
    parts = (split(part) for part in (train, corpus.valid[::tested], corpus.test[::tested]))
    return Data(labels, constraints, len(vocabulary) + UNKNOWN + 1, *parts)


class Convolution(nn.Module):
    """The weak encoder: a character sees one neighbour on each side."""

    def __init__(self, symbols: int, tags: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.convolution = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.dropout = nn.Dropout(DROPOUT)
        self.project = nn.Linear(2 * width, tags)

    def forward(self, chars: Tensor, mask: Tensor) -> Tensor:
        x = self.dropout(self.embedding(chars)) * mask.unsqueeze(2)
        emissions: Tensor = self.project(self.dropout(self.convolution(x.mT).relu().mT))
        return emissions


class Softmax(nn.Module):
    def nll(self, emissions: Tensor, tags: Tensor, mask: Tensor, reduction: str = "token_mean") -> Tensor:
        return cross_entropy(emissions[mask], tags[mask])

    def viterbi(self, emissions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores, tags = emissions.max(2)
        return (scores * mask).sum(1), tags


class Tagger(nn.Module):
    """Equal seeds have equal encoders."""

    encoder: nn.Module
    head: Softmax | MEMM | CRF

    def __init__(self, encoder: str, head: str, data: Data) -> None:
        super().__init__()
        self.constraints = data.constraints if head.endswith(LEGAL) else None
        tags, width, kind = len(data.labels), WIDTH[encoder], head.removesuffix(LEGAL)
        if encoder == "weak":
            self.encoder = Convolution(data.symbols, tags, width)
        else:
            sizes = {"embedding": width, "hidden": width}
            self.encoder = SequenceTagger(data.symbols, tags, **sizes, dropout=DROPOUT, head="softmax")
        if kind == SOFTMAX:
            self.head = Softmax()
        elif kind == FIELD:
            self.head = CRF(tags, True, constraints=self.constraints)
        else:
            self.head = MEMM(tags, True, "both" if kind == BOTH else "forward", constraints=self.constraints)

    @torch.no_grad()
    def emissions(self, split: Split) -> tuple[Scored, float]:
        """And the CPU time."""
        self.eval()
        inputs, began = split.batches(), time.process_time()
        found = [(places, self.encoder(chars, mask), mask) for places, chars, mask in inputs]
        return found, time.process_time() - began


def raw_viterbi(transitions: Tensor, constraints: Constraints | None) -> Decode:
    """Of emissions and transitions as they are."""
    crf = CRF(len(transitions), True, constraints=constraints)
    for parameter, value in zip(crf.parameters(), (0.0, 0.0, transitions), strict=True):
        parameter.data.copy_(torch.as_tensor(value))
    return crf.viterbi


@torch.no_grad()
def decoded(scored: Scored, decode: Decode, repeats: int = 1) -> tuple[list[Tensor], float]:
    """The path of each line, and the CPU time."""
    began = time.process_time()
    for _ in range(repeats):
        paths = [decode(emissions, mask)[1] for _, emissions, mask in scored]
    seconds = (time.process_time() - began) / repeats
    found: dict[int, Tensor] = {}
    for (places, _, mask), path in zip(scored, paths, strict=True):
        found |= {i: tags[live] for i, tags, live in zip(places, path, mask, strict=True)}
    return [found[i] for i in range(len(found))], seconds


def forced(head: MEMM, constraints: Constraints | None, split: Split, scored: Scored) -> float:
    """Accuracy of each step's best tag when its neighbour's true tag is given; mean over directions."""
    ones = torch.ones_like(head.transitions, dtype=torch.bool)
    start, pairs, end = (torch.where(x, 0.0, -inf) for x in constraints or (ones[0], ones, ones[0]))
    transitions, right = head.transitions.detach() + pairs, []
    for places, emissions, mask in scored:
        tags, scores = pad([split.tags[i] for i in places])[0], emissions.clone()
        scores[:, 0] += start
        scores[torch.arange(len(places)), mask.sum(1) - 1] += end
        ahead, back = scores.clone(), scores
        ahead[:, 1:] += transitions[tags[:, :-1]]
        back[:, :-1] += torch.where(mask[:, 1:, None], transitions.T[tags[:, 1:]], 0.0)
        for side in (ahead, back) if head.direction == "both" else (ahead,):
            right.append((side.argmax(2) == tags)[mask])
    return float(torch.cat(right).double().mean())


def row(run: Run, head: str, threads: int, found: dict[str, Any]) -> Row:
    """What was not measured stays empty."""
    shown = {name: f"{x:.5f}" if isinstance(x, float) else str(x) for name, x in found.items()}
    return {**texts(run), "head": head, **dict.fromkeys((*SCORES, *TIMES), ""), **shown, **facts(threads)}


def listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{x:.5f}" for x in numbers)


def count(data: Data) -> dict[str, Any]:
    """Fit the HMM."""
    hmm = HMM(len(data.labels), data.symbols, batch_first=True, constraints=data.constraints)
    (chars, mask), (tags, _) = pad(data.train.chars), pad(data.train.tags)
    began = time.process_time()
    hmm.fit(chars, tags, mask, smoothing=SMOOTHING)
    whole = time.process_time() - began
    (valid, _), (test, decoding) = (decoded(x.batches(), hmm.viterbi, REPEATS) for x in (data.valid, data.test))
    found: dict[str, Any] = dict(zip(TIMES, (whole, whole, decoding, decoding), strict=False))
    found |= {"epoch": 0, "valid": data.valid.f1(data.labels, valid), "test": data.test.f1(data.labels, test)}
    transitions = listed(hmm.transition_logits.flatten().tolist())
    return {**found, "accuracy": data.test.accuracy(test), "transitions": transitions}


def work(run: Run, threads: int) -> list[Row]:
    """Train once. A row for each way of decoding: test F1 of its epoch with the best validation F1, times in CPU
    seconds, of an epoch and of the test split, and for MEMMs what decoding without their normalisers gives."""
    torch.set_num_threads(threads)
    began, data = time.perf_counter(), load(run["task"], run["every"], run["tested"])
    if run["head"] == COUNTED:
        return [row(run, COUNTED, threads, {**count(data), "seconds": f"{time.perf_counter() - began:.1f}"})]
    torch.manual_seed(run["seed"])
    model = Tagger(run["encoder"], run["head"], data)
    head = model.head
    ways: dict[str, Decode] = {run["head"]: head.viterbi}
    if run["head"] == SOFTMAX:
        ways[SOFTMAX + LEGAL] = raw_viterbi(torch.zeros(2 * [len(data.labels)]), data.constraints)
    best, times = train(run, data, model, ways)
    rows = []
    for name, decode in ways.items():
        found = {**best[name], **times}
        model.load_state_dict(found.pop("weights"))
        scored, encoding = model.emissions(data.test)
        paths, decoding = decoded(scored, decode, REPEATS)
        found |= {"test": data.test.f1(data.labels, paths), "accuracy": data.test.accuracy(paths)}
        found |= {"decode_head_cpu_s": decoding, "decode_cpu_s": encoding + decoding}
        if isinstance(head, MEMM):
            raw, _ = decoded(scored, raw_viterbi(head.transitions.detach(), model.constraints))
            found["raw_test"] = data.test.f1(data.labels, raw)
            found["raw_differs"] = mean(float(not torch.equal(a, b)) for a, b in zip(raw, paths, strict=True))
            found["forced_accuracy"] = forced(head, model.constraints, data.test, scored)
        if not isinstance(head, Softmax):
            found["transitions"] = listed(head.transitions.flatten().tolist())
        rows.append(row(run, name, threads, {**found, "seconds": f"{time.perf_counter() - began:.1f}"}))
    return rows


def train(
    run: Run, data: Data, model: Tagger, ways: dict[str, Decode]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Of each way to decode the best epoch and its weights; CPU seconds of an epoch, of the whole model and of the
    head's loss with its gradients."""
    epochs, (chars, labels, _), head = run["epochs"], data.train, model.head
    steps = epochs * sum(1 for _ in batches(chars, BATCH))
    plain: list[dict[str, Any]] = [{"params": [*model.parameters()], "lr": RATE}]
    groups = plain if isinstance(head, Softmax) else crf_parameter_groups(model, RATE, MULTIPLIER)
    rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05, cycle_momentum=False)
    for decode in ways.values():  # what is compiled, is so on first use
        decoded(model.emissions(Split(chars[:8], [], []))[0], decode)
    head.nll(torch.zeros(1, 1, len(data.labels), requires_grad=True), torch.full((1, 1), len(data.labels) - 1),
             torch.ones(1, 1, dtype=torch.bool), "token_mean")  # fmt: skip
    best: dict[str, dict[str, Any]] = {name: {"valid": -1.0} for name in ways}
    curves: dict[str, list[float]] = {name: [] for name in ways}
    torch.manual_seed(run["seed"])
    generator, times = torch.Generator().manual_seed(run["seed"]), {"train_cpu_s": 0.0, "head_cpu_s": 0.0}
    worker = current_process().name.rpartition("-")[2]
    place = int(worker) - 1 if worker.isdigit() else 0
    name = ", ".join(str(run[what]) for what in ("task", "encoder", "head", "seed"))
    with tqdm(desc=name, total=steps, unit="step", position=place, leave=False, disable=None) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            for places in batches(chars, BATCH, generator):
                (some, mask), (tags, _) = pad([chars[i] for i in places]), pad([labels[i] for i in places])
                began = time.process_time()
                optimizer.zero_grad()
                emissions = model.encoder(some, mask)
                cut, before = emissions.detach().requires_grad_(), time.process_time()
                head.nll(cut, tags, mask, "token_mean").backward()
                times["head_cpu_s"] += (time.process_time() - before) / epochs
                emissions.backward(cut.grad)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                times["train_cpu_s"] += (time.process_time() - began) / epochs
                schedule.step()
                bar.update()
            scored, _ = model.emissions(data.valid)
            for way, decode in ways.items():
                curves[way].append(data.valid.f1(data.labels, decoded(scored, decode)[0]))
                if curves[way][-1] > best[way]["valid"]:
                    best[way] |= {"valid": curves[way][-1], "epoch": epoch, "weights": deepcopy(model.state_dict())}
            bar.set_postfix_str(f"valid F1 {100 * curves[str(run['head'])][-1]:.1f}")
    return {way: {**found, "curve": listed(curves[way])} for way, found in best.items()}, times


@dataclass(frozen=True)
class Claim(Verdict):
    """That a mean difference lies between two bounds."""

    low: float = 0.0
    high: float = inf

    @property
    def holds(self) -> bool:
        low, high = interval(self.gains)
        return self.low < low and high < self.high

    @property
    def contrary(self) -> bool:
        low, high = interval(self.gains)
        return high < self.low or low > self.high

    def __str__(self) -> str:
        word = "**holds**" if self.holds else "contrary" if self.contrary else "does not hold"
        low, high = (f"{x:.{self.digits}f}" for x in interval(self.gains))
        return f"{word}: {mean(self.gains):.{self.digits}f} ({low} to {high})"


def of(rows: Sequence[Row], cell: tuple[str, str], head: str) -> list[Row]:
    """The runs of one head, by seed."""
    own = [x for x in rows if (x["task"], x["encoder"], x["head"]) == (*cell, head)]
    return sorted(own, key=lambda x: int(x["seed"]))


def values(rows: Sequence[Row], cell: tuple[str, str], head: str, name: str = "test") -> list[float]:
    """Scores and shares in percent, times in seconds."""
    return [float(x[name]) * (1 if name in TIMES else 100) for x in of(rows, cell, head)]


def claims(rows: Sequence[Row]) -> dict[str, dict[str, list[Claim]]]:
    """Of each claim, for each pair of heads, a verdict a cell."""

    def less(ours: str, theirs: str, column: str = "test", low: float = 0.0) -> list[Claim]:
        pairs = [(values(rows, cell, ours), values(rows, cell, theirs, column)) for cell in CELLS]
        return [Claim(paired(*pair), low=low) for pair in pairs]

    def forms(ours: str, theirs: str, low: float = 0.0) -> dict[str, list[Claim]]:
        return {f"{ours} less {theirs}{x}": less(ours + x, theirs + x, low=low) for x in ("", LEGAL)}

    def bounded(found: list[Claim]) -> list[Claim]:
        bounds = [HALF if encoder == "weak" else (-TIE, TIE) for _, encoder in CELLS]
        return [replace(claim, low=a, high=b) for claim, (a, b) in zip(found, bounds, strict=True)]

    def faster(head: str, column: str) -> list[Claim]:
        pairs = [(values(rows, cell, FIELD, column), values(rows, cell, head, column)) for cell in CELLS]
        return [Claim([100 * (a / b - 1) for a, b in zip(*x, strict=True)], digits=0, low=QUARTER) for x in pairs]

    halves = f"within {TIE} points) and CRF is half a point better with a weak one ({HALF[0]} to {HALF[1]})"
    speeds = (("an epoch", TIMES[0]), ("its head alone", TIMES[1]))
    return {
        "Bi-MEMM is better than MEMM": forms(BOTH, FORWARD),
        "MEMM is better than softmax": forms(FORWARD, SOFTMAX),
        f"CRF is never worse than Bi-MEMM (by {BELOW} points or more)": forms(FIELD, BOTH, -BELOW),
        f"CRF and Bi-MEMM tie with a strong encoder ({halves}": {
            name: bounded(found) for name, found in forms(FIELD, BOTH).items()
        },
        f"MEMMs train {QUARTER:.0f} % faster than a CRF": {
            f"{head}, {what}, %": faster(head, column) for what, column in speeds for head in (FORWARD, BOTH)
        },
        "Exact decoding is better than raw Viterbi (not published, see below)": {
            head + form: less(head + form, head + form, "raw_test") for head in (FORWARD, BOTH) for form in ("", LEGAL)
        },
    }


def scores_table(rows: Sequence[Row]) -> list[list[str]]:
    lines = [[head, *(spread(values(rows, cell, head), 2) for cell in CELLS)] for head in FORMS]
    counted = [spread(values(rows, (task, "none"), COUNTED), 2) for task, _ in CELLS]
    return [["", *NAMES], *lines, [COUNTED, *counted]]


def costs_table(rows: Sequence[Row]) -> list[list[str]]:
    lines = [["", *(f"{what}: {name}" for what in ("training", "decoding") for name in NAMES)]]
    for head in FORMS:
        times = [mean(values(rows, cell, head, name)) for half in (0, 2) for cell in CELLS for name in TIMES[half:][:2]]
        lines.append([head, *(f"{a:.2f}, {b:.3f}" for a, b in zip(times[::2], times[1::2], strict=True))])
    return lines


def markov_table(rows: Sequence[Row]) -> list[list[str]]:
    columns = ("test", "raw_test", "raw_differs", "forced_accuracy", "accuracy")
    lines = [["", "exact, F1", "raw, F1", "lines that differ", "accuracy, neighbour given", "accuracy, decoded"]]
    for cell, name in zip(CELLS, NAMES, strict=True):
        for head in (FORWARD, FORWARD + LEGAL, BOTH, BOTH + LEGAL):
            lines.append([f"{name}: {head}", *(spread(values(rows, cell, head, column), 2) for column in columns)])
    return lines


def matrices(rows: Sequence[Row], cell: tuple[str, str], head: str) -> Tensor:
    """Of the words, (seeds, 4, 4)."""
    found = [[float(x) for x in line["transitions"].split()] for line in of(rows, cell, head)]
    return torch.tensor(found).view(-1, 4, 4)


def plausible(rows: Sequence[Row]) -> str:
    """In how many runs each legal weight is above the illegal ones of its row."""
    pairs = tag_constraints([*"BMES"], "BMES")[1]
    found = torch.cat([matrices(rows, cell, head) for cell in CELLS[:2] for head in (FIELD, FORWARD, BOTH)])
    right = found.masked_fill(~pairs, inf).amin(2) > found.masked_fill(pairs, -inf).amax(2)
    return f"{int(right.all(1).sum())} of {len(found)}"


def page(rows: list[Row], name: str) -> str:
    """Markdown, its verdicts computed from the rows."""
    short, parts, every = [], [], list[Claim]()
    for claim, pairs in claims(rows).items():
        found = [verdict for verdicts in pairs.values() for verdict in verdicts]
        holds, contrary = sum(x.holds for x in found), sum(x.contrary for x in found)
        short.append(f"- {claim}: shown in {holds} of {len(found)} comparisons, the contrary in {contrary}.")
        parts.append(f"{claim}:\n\n{markdown([['', *NAMES], *([pair, *map(str, x)] for pair, x in pairs.items())])}")
        every += found
    bullets = "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in short)
    tables = "\n\n".join(parts)
    whole, alone = ({h: mean(mean(values(rows, c, h, t)) for c in CELLS) for h in FORMS} for t in TIMES[:2])
    most = 100 * alone[FIELD] / (whole[FIELD] - alone[FIELD])
    fused = (
        f"pyseq's CRF is fused: its loss and gradients take {alone[FIELD]:.2f} CPU seconds an epoch, those of MEMM "
        f"{alone[FORWARD]:.2f}, of Bi-MEMM {alone[BOTH]:.2f}, of softmax {alone[SOFTMAX]:.2f} (means over tasks and "
        f"encoders). A head that cost nothing would make the mean epoch {most:.1f} % faster than with the CRF, so "
        f"{QUARTER:.0f} % {'cannot' if most < QUARTER else 'can'} be reached here; the claim is about slower CRFs."
    )
    machine, threads, version, date, epochs, preset, kept = (
        seen(rows, column) for column in ("machine", "threads", "torch", "date", "epochs", "preset", "every")
    )
    seeds = len({line["seed"] for line in rows})
    minutes = sum(float(line["seconds"]) for line in rows if line["head"] != SOFTMAX) / 60
    return f"""# Heads of taggers: softmax, HMM, MEMM, Bi-MEMM, CRF

{bullets}

All but the last were claimed by a blog post, of segmentation and entities with BERT, without numbers. Of the
{len(every)} verdicts below {sum(x.holds for x in every)} are "holds" and {sum(x.contrary for x in every)} "contrary".

{tables}

Mean paired differences over {seeds} seeds in points of test F1; for speed, how much more the CRF takes in percent. In
brackets the 95 % interval by Student's t. "Holds": it lies where the claim wants it, above 0 if nothing is said;
"contrary": wholly outside, also where a difference is larger than claimed; "does not hold": neither, these numbers do
not show it. One in forty may "hold" by chance.

## Scores

{markdown(scores_table(rows))}

Test F1 in percent of whole words and entities, mean ± standard deviation over {seeds} seeds, of the epoch with the best
validation F1, chosen for each row by itself. "Legal": with the constraints of the tag scheme (`nn.tag_constraints`,
BMES for words and BIO for entities), in loss and decoding of MEMM, Bi-MEMM and CRF; of softmax in decoding alone, by
Viterbi, with the training of the line above. Heads without them may break the scheme, as in the claims. A MEMM
with constraints learns only to tell apart the tags that may follow. The HMM counts characters and tags, legally,
once, and sees no encoder.

![F1 above a softmax head with legal paths]({name}.png)

## What MEMMs decode

{markdown(markov_table(rows))}

In percent. "Exact": `nn.MEMM.viterbi`, the path with the least loss. "Raw": Viterbi on emissions and transitions, as in
a CRF and in much code, without the local normalisers, over the same paths. "Neighbour given": the best tag of each
step when the true one before is known (or after; Bi-MEMM: mean of both), which is what training looks at.

![Learned transitions of the words' heads]({name}_transitions.png)

Weights of heads without constraints, mean over the seeds; in brackets: illegal. In {plausible(rows)} runs each legal
weight is above the illegal ones of its row. Constants of a row or a column may as well be in the emissions.

## Costs

{markdown(costs_table(rows))}

CPU seconds of training an epoch and of decoding the test split, of the whole model and, after the comma, of the head
alone: its loss and gradients, or its paths. CPU time, for other runs went on beside.

{textwrap.fill(fused, 120)}

## How it was done

People's Daily as `pyseq.data.people_daily` splits it; a token is a character. Weak encoder: an embedding of
{WIDTH["weak"]}, one convolution of width 3 and {2 * WIDTH["weak"]} channels, a linear layer. Strong: an embedding of
{WIDTH["strong"]}, an LSTM of {WIDTH["strong"]} in each direction, a linear layer (`models.SequenceTagger`).
Dropout {DROPOUT}; batches of {BATCH:,} characters; Adam, rate {RATE} with warm-up and cosine decay; gradients clipped
at {CLIP}; {epochs} epochs. Transitions learn {MULTIPLIER:g} times faster (`nn.crf_parameter_groups`), as the encoder's
rate is not small. Losses are means over characters. Equal seeds have equal encoders and batches. A CRF scores the
first and the last tag, a MEMM does not. HMM: {SMOOTHING} added to each count.

Cut, to fit 70 minutes on two cores: one in {kept} training lines, those longer than {LONGEST} characters left out (the
test has them), {epochs} epochs, {seeds} seeds, one rate and multiplier, no pretrained encoder, which the claims have.
A fair objection: rate and multiplier were chosen for a CRF, by another study. A look at multipliers of 1, 5 and
25 (one seed, the weak encoder, an eighth of the lines, 6 epochs) found 25 better for the CRF's entities, by 1.7 points
of validation F1, 1 for MEMM's words, by 1.0, and 5 within 0.7 of the best elsewhere. Few seeds give wide intervals.

Preset: {preset}. {machine}; threads a run: {threads}; torch {version}; {date}; {minutes:.0f} minutes of runs.
Each run is a row of [{name}.csv]({name}.csv), softmax two; `make study STUDY=chain_heads` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "size": 8}
    with figure(path, columns=len(CELLS), size=(11, 3.6)) as axes:
        for panel, cell, name in zip(axes, CELLS, NAMES, strict=True):
            base = values(rows, cell, SOFTMAX + LEGAL)
            for place, head in enumerate((FORWARD, BOTH, FIELD)):
                for at, form, colour in ((place - 0.2, "", "tab:orange"), (place + 0.2, LEGAL, "tab:blue")):
                    gains, label = paired(values(rows, cell, head + form), base), form[2:] or "free"
                    panel.plot([at] * len(gains), gains, "o", color=colour, alpha=0.6, label=None if place else label)
                    panel.hlines(mean(gains), at - 0.15, at + 0.15, color=colour)
                    panel.annotate(f"{mean(gains):.1f}", (at, max(gains)), (0, 6), **above)
            free = mean(paired(values(rows, cell, SOFTMAX), base))
            panel.set_title(f"{name} encoder\n(softmax, free: {free:.1f})", size=9)
            panel.axhline(0, color="black", linewidth=0.8)
            panel.set_xticks(range(3), [FORWARD, BOTH, FIELD])
            panel.margins(0.1, 0.12)
            panel.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("F1 above softmax with legal paths, points", size=9)
        axes[0].legend(fontsize=8)
    pairs = tag_constraints([*"BMES"], "BMES")[1]
    shown = [(cell, head) for cell in CELLS[:2] for head in (FIELD, FORWARD, BOTH)]
    means = [matrices(rows, cell, head).mean(0) for cell, head in shown]
    most = max(float(x.abs().max()) for x in means)
    with figure(path.with_name(f"{path.stem}_transitions.png"), columns=len(shown), size=(13, 2.9)) as axes:
        for panel, (cell, head), matrix in zip(axes, shown, means, strict=True):
            panel.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1.5 * most, vmax=1.5 * most)
            for i, j in torch.cartesian_prod(torch.arange(4), torch.arange(4)).tolist():
                number = f"{matrix[i, j]:.1f}" if pairs[i, j] else f"({matrix[i, j]:.1f})"
                panel.text(j, i, number, ha="center", va="center", size=8)
            panel.set_title(f"{head}, {cell[1]} encoder", size=9)
            panel.set_xticks(range(4), [*"BMES"])
            panel.set_yticks(range(4), [*"BMES"])
            panel.set_xlabel("to", size=9)
        axes[0].set_ylabel("from", size=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few lines, 3 epochs, 2 seeds, into runs/: two minutes")
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default: 1)")
    parser.add_argument("--csv", type=Path, help="instead of docs/evidence/chain_heads.csv")
    args = parser.parse_args()
    preset, seeds = ("quick", args.seeds or 2) if args.quick else ("published", args.seeds or 3)
    path: Path = args.csv or ROOT / ("runs/chain_heads-quick.csv" if args.quick else "docs/evidence/chain_heads.csv")
    shared = {"preset": preset, **PRESETS[preset]}
    kinds = [(cell, head, seed) for seed in range(seeds) for cell in CELLS for head in TRAINED]
    kinds += [((task, "none"), COUNTED, 0) for task in ("words", "entities")]
    queue = [{**shared, "task": c[0], "encoder": c[1], "head": head, "seed": seed} for c, head, seed in kinds]
    work_off(path, queue, partial(work, threads=args.threads), args.workers, bars=args.workers)
    rows = [line for line in read(path, shared) if int(line["seed"]) < seeds]
    print("\n" + aligned(scores_table(rows)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, path.stem), encoding="utf-8")
    print(f"\nThe page: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
