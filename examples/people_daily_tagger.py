"""Train a word segmenter and entity tagger on People's Daily, with a softmax and with a CRF on one encoder.

Both heads see the same seed, encoder, batches and number of steps; they train side by side, each in a process of its
own. Scores are on whole lines of the test split, which is tagged once, by the epoch with the best entity F1 on the
validation split. A token is a character. See `pyseq.data.people_daily`.

"softmax, legal" is the softmax head decoded by Viterbi over the label pairs that the training split has, all others
forbidden: what a CRF adds beyond legal paths is its distance to that row.

Learning rate, dropout and multiplier were chosen on the validation split with the CRF head; the softmax head has the
same settings without a search of its own, so its row may be undersold.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import pyseq
from pyseq.data import ENTITY_TYPES, LABELS, Sentence, SpanScore, entity_spans, people_daily, split_text, word_spans
from pyseq.models import SequenceTagger
from pyseq.ops import crf_nll, viterbi

PADDING, UNKNOWN = 0, 1
Head = Literal["softmax", "crf"]
HEADS: tuple[Head, ...] = ("softmax", "crf")
LEGAL = "softmax, legal"
Paths = tuple[Tensor, Tensor, Tensor]  # transitions, start, end: 0, or -inf for what is forbidden
LABEL_IDS = {label: i for i, label in enumerate(LABELS)}
NAMES = {"nr": "person", "ns": "place", "nt": "organisation"}
COLOURS = {"nr": "\033[1;31m", "ns": "\033[1;32m", "nt": "\033[1;34m"}
RESET = "\033[0m"
SENTENCES = (
    "新华社记者王小明从北京报道：国家主席江泽民昨天会见了美国总统克林顿。",
    "联合国秘书长安南将于二月访问巴格达，同伊拉克外交部长萨哈夫商谈核查问题。",
    "出生在浙江省绍兴市的欧阳海燕和她的丈夫李大为，春节前在上海开了一家书店。",
)
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # the corpus has no half-width characters


@dataclass(frozen=True)
class Settings:
    epochs: int = 3
    embedding: int = 128
    hidden: int = 128
    layers: int = 1
    dropout: float = 0.1
    lr: float = 1e-2
    multiplier: float = 5.0
    batch_chars: int = 2048
    limit: int = 128


QUICK = Settings(epochs=1)
FULL = Settings(epochs=8, hidden=256, dropout=0.3, lr=5e-3)


@dataclass
class Result:
    """What one head reached; LEGAL has the weights of the softmax head."""

    head: str
    weights: dict[str, Any]  # numpy arrays, which travel between processes
    words: SpanScore
    entities: dict[str, SpanScore]
    train_speed: float  # tokens, that is characters, a second
    decode_speed: float
    best_epoch: int


@dataclass(frozen=True)
class Split:
    """Lines of the corpus, cut to pieces of bounded length."""

    sentences: Sequence[Sentence]
    chars: list[Tensor]
    labels: list[Tensor]
    owner: list[int]  # the line that each piece comes from

    @property
    def size(self) -> int:
        return sum(map(len, self.chars))


def encode(text: str, vocabulary: dict[str, int]) -> Tensor:
    return torch.tensor([vocabulary.get(char, UNKNOWN) for char in text], dtype=torch.int64)


def index(sentences: Sequence[Sentence]) -> dict[str, int]:
    """A number for each character seen twice or more; those seen once stand for the unknown."""
    counts = Counter(char for sentence in sentences for char in sentence.text)
    return {char: i for i, char in enumerate((char for char, n in counts.items() if n > 1), UNKNOWN + 1)}


def cut(sentences: Sequence[Sentence], vocabulary: dict[str, int], limit: int) -> Split:
    split = Split(sentences, [], [], [])
    for line, sentence in enumerate(sentences):
        labels = torch.tensor([LABEL_IDS[label] for label in sentence.labels])
        texts = split_text(sentence.text, limit)
        split.chars.extend(encode(text, vocabulary) for text in texts)
        split.labels.extend(labels.split([len(text) for text in texts]))
        split.owner.extend([line] * len(texts))
    return split


def batches(chars: list[Tensor], size: int, generator: torch.Generator | None = None) -> Iterator[list[int]]:
    """Indices of pieces of like length, about `size` characters a batch, in random order where a generator is given."""
    noise = torch.rand(len(chars), generator=generator) if generator else torch.zeros(len(chars))
    order = sorted(range(len(chars)), key=lambda i: len(chars[i]) + float(noise[i]))
    found: list[list[int]] = [[]]
    for i in order:
        if found[-1] and (len(found[-1]) + 1) * len(chars[i]) > size:
            found.append([])
        found[-1].append(i)
    shuffled = torch.randperm(len(found), generator=generator).tolist() if generator else range(len(found))
    return (found[i] for i in shuffled)


def pad(items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Items (B, T), padded with 0, and their mask."""
    lengths = torch.tensor([len(item) for item in items])
    padded = pad_sequence(items, batch_first=True)
    return padded, torch.arange(padded.size(1)) < lengths.unsqueeze(1)


def seen_paths(split: Split) -> Paths:
    """Label pairs, first and last labels that no piece of the split has, forbidden."""
    transitions, *ends = (torch.full((len(LABELS),) * rank, -math.inf) for rank in (2, 1, 1))
    for labels in split.labels:
        transitions[labels[:-1], labels[1:]] = 0
        ends[0][labels[0]] = ends[1][labels[-1]] = 0
    return transitions, ends[0], ends[1]


def predict(
    model: SequenceTagger, chars: list[Tensor], size: int, legal: Paths | None = None
) -> tuple[list[list[str]], float]:
    """The labels of each piece, and characters decoded a second; legal: for Viterbi over the head's scores."""
    model.eval()
    found: list[list[str]] = [[]] * len(chars)
    seconds = 0.0
    for batch in batches(chars, size):
        padded, mask = pad([chars[i] for i in batch])
        start = time.perf_counter()
        if legal is None:
            tags = model.decode(padded, mask)
        else:
            with torch.no_grad():
                tags = viterbi(model(padded, mask), *legal, mask)[1]
        seconds += time.perf_counter() - start
        for i, row in zip(batch, tags.tolist(), strict=True):
            found[i] = [LABELS[tag] for tag in row[: len(chars[i])]]
    return found, sum(map(len, chars)) / seconds


def evaluate(
    model: SequenceTagger, split: Split, size: int, legal: Paths | None = None
) -> tuple[SpanScore, dict[str, SpanScore], float]:
    """Scores of words, of entities by type ("all" for their sum), and decoding speed; on whole lines."""
    found, speed = predict(model, split.chars, size, legal)
    lines: list[list[str]] = [[] for _ in split.sentences]
    for line, labels in zip(split.owner, found, strict=True):
        lines[line].extend(labels)
    words = SpanScore()
    entities = {kind: SpanScore() for kind in ("all", *ENTITY_TYPES)}
    for sentence, labels in zip(split.sentences, lines, strict=True):
        gold = sentence.labels
        words.update(word_spans(gold), word_spans(labels))
        truth, guess = entity_spans(gold), entity_spans(labels)
        for kind, score in entities.items():
            score.update(*([span for span in spans if kind in ("all", span[0])] for spans in (truth, guess)))
    return words, entities, speed


def build(head: Head, settings: Settings, vocabulary: dict[str, int]) -> SequenceTagger:
    return SequenceTagger(
        len(vocabulary) + UNKNOWN + 1,
        len(LABELS),
        embedding=settings.embedding,
        hidden=settings.hidden,
        layers=settings.layers,
        dropout=settings.dropout,
        head=head,
    )


def train(
    model: SequenceTagger, settings: Settings, seed: int, train_split: Split, valid_split: Split, bar: Any
) -> tuple[float, int]:
    """Train the model and leave it as in its best epoch; training speed in tokens a second, and that epoch."""
    steps = settings.epochs * sum(1 for _ in batches(train_split.chars, settings.batch_chars))
    groups = model.parameter_groups(settings.lr, settings.multiplier)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step / steps))
    _warm_up(model, train_split)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    best, best_epoch, kept, seconds = -1.0, 0, model.state_dict(), 0.0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for batch in batches(train_split.chars, settings.batch_chars, generator):
            start = time.perf_counter()
            chars, mask = pad([train_split.chars[i] for i in batch])
            tags, _ = pad([train_split.labels[i] for i in batch])
            loss = model.loss(chars, tags, mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - start
            bar.update(sum(len(train_split.chars[i]) for i in batch))
        words, entities, _ = evaluate(model, valid_split, settings.batch_chars)
        f1 = entities["all"].f1
        bar.set_postfix_str(f"epoch {epoch}: valid word F1 {words.f1:.3f}, entity F1 {f1:.3f}")
        if f1 > best:
            best, best_epoch, kept = f1, epoch, deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return settings.epochs * train_split.size / seconds, best_epoch


def _warm_cosine(done: float) -> float:
    return min(done / 0.05, (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def _warm_up(model: SequenceTagger, split: Split) -> None:
    """Compile what compiles on first use, so that no timing has it."""
    chars, labels = split.chars[0].unsqueeze(0), split.labels[0].unsqueeze(0)
    model.loss(chars, labels, chars >= 0).backward()
    model.decode(chars, chars >= 0)
    model.zero_grad()


def study(head: Head, settings: Settings, seed: int, threads: int) -> list[Result]:
    """One head from corpus to test scores, in a process of its own; the softmax head twice, free and legal."""
    torch.set_num_threads(threads)
    live = sys.stderr.isatty()
    place, pause = (HEADS.index(head), 0.1) if live else (0, 10)
    with tqdm(
        desc=f"{head:>7}", unit="token", unit_scale=True, position=place, mininterval=pause, ascii=not live
    ) as bar:
        corpus = people_daily()
        vocabulary = index(corpus.train)
        train_split, valid_split, test_split = (
            cut(sentences, vocabulary, settings.limit) for sentences in (corpus.train, corpus.valid, corpus.test)
        )
        bar.reset(settings.epochs * train_split.size)
        torch.manual_seed(seed)
        model = build(head, settings, vocabulary)
        train_speed, best_epoch = train(model, settings, seed, train_split, valid_split, bar)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    ways: dict[str, Paths | None] = {head: None}
    if head == "softmax":
        ways[LEGAL] = seen_paths(train_split)
    results = []
    for name, legal in ways.items():
        words, entities, decode_speed = evaluate(model, test_split, settings.batch_chars, legal)
        results.append(Result(name, weights, words, entities, train_speed, decode_speed, best_epoch))
    return results


def table(results: Sequence[Result]) -> str:
    """The comparison, one row a head."""
    columns = ["head", "word F1", "entity P", "R", "F1", *(NAMES[kind] for kind in ENTITY_TYPES)]
    rows = [[*columns, "train tokens/s", "decode tokens/s"]]
    for r in results:
        total, kinds = r.entities["all"], [r.entities[kind] for kind in ENTITY_TYPES]
        scores = [r.words.f1, total.precision, total.recall, total.f1, *(score.f1 for score in kinds)]
        speeds = [f"{r.train_speed:,.0f}", f"{r.decode_speed:,.0f}"]
        rows.append([r.head, *(f"{score:.4f}" for score in scores), *speeds])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def show(text: str, labels: Sequence[str], colour: bool) -> str:
    """The text cut into words by spaces, its entities in colour, or in brackets with their type."""
    starts = {first for _, first, _ in word_spans(labels)} - {0}
    spaced = [f" {char}" if i in starts else char for i, char in enumerate(text)]
    for kind, first, stop in entity_spans(labels):
        lead = " " if spaced[first].startswith(" ") else ""
        opening, closing = (COLOURS[kind], RESET) if colour else ("[", f"]{NAMES[kind]}")
        spaced[first] = lead + opening + spaced[first].removeprefix(" ")
        spaced[stop - 1] += closing
    return "".join(spaced)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one epoch a head: under two minutes on two cores")
    size.add_argument("--full", action="store_true", help="a larger model, more epochs: under 40 minutes on two cores")
    parser.add_argument("--epochs", type=int, help="passes over the training split, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and batch order (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a head (default: 1)")
    parser.add_argument("--sentence", action="append", metavar="TEXT", help="tag TEXT, may be repeated")
    parser.add_argument("--checkpoint", metavar="PATH", help="write the CRF tagger, its characters and labels to PATH")
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if args.sentence and not all(sentence.strip() for sentence in args.sentence):
        parser.error("--sentence must not be empty")
    return args


def main() -> None:
    args = parse()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)
    began = time.perf_counter()
    corpus = people_daily()
    vocabulary = index(corpus.train)
    print(
        f"People's Daily, January 1998: {len(corpus.train):,} lines to train on, {len(corpus.valid):,} to validate, "
        f"{len(corpus.test):,} to test; {len(vocabulary):,} characters, {len(LABELS)} labels; threads a head: "
        f"{args.threads}; CRF loss served by {pyseq.explain(crf_nll, torch.zeros(1, 1, 1)).chosen}",
        flush=True,
    )
    context = get_context("spawn")
    with ProcessPoolExecutor(len(HEADS), context, initializer=tqdm.set_lock, initargs=(context.RLock(),)) as pool:
        running = [pool.submit(study, head, settings, args.seed, args.threads) for head in HEADS]
        results = [result for future in running for result in future.result()]
    chosen = ", ".join(f"{r.head} {r.best_epoch}" for r in results if r.head != LEGAL)
    print(f"\nTest split, seed {args.seed}, epoch with the best validation entity F1 ({chosen} of {settings.epochs}):")
    print(table(results))
    tagger = build("crf", settings, vocabulary)
    tagger.load_state_dict({name: torch.from_numpy(value) for name, value in results[-1].weights.items()})
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    legend = " ".join(f"{COLOURS[kind]}{NAMES[kind]}{RESET}" for kind in ENTITY_TYPES) if colour else ""
    print(f"\nTagged by the CRF: {legend}".rstrip())
    for sentence in args.sentence or SENTENCES:
        text = "".join(sentence.split()).translate(FULL_WIDTH)
        found, _ = predict(tagger, [encode(piece, vocabulary) for piece in split_text(text, settings.limit)], 2048)
        print("  " + show(text, [label for labels in found for label in labels], colour))
    if args.checkpoint:
        torch.save({"model": tagger.state_dict(), "vocabulary": vocabulary, "labels": LABELS}, args.checkpoint)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
