import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOM = "surgery"
EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = {"threads": "1", "machine": "m", "torch": "t", "date": "d"}


@pytest.fixture
def study(transformers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="studies show progress: pip install tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return transformers("albert_unshare")  # type: ignore[no-any-return]


def fabricated(study: ModuleType, gain: float, harder: float, cost: float) -> Iterator[dict[str, str]]:
    """Un-shared models gain so many points, so many more on entities, at so much more time."""
    noise, settings = random.Random(0), {"preset": "p", "steps": "9", "sequences": "8", "tested": "1", "epochs": "3"}
    numbers = dict.fromkeys(study.FIELDS, "60")
    for stage in range(3):
        yield {**settings, "what": "pretrain", "variant": "", "seed": str(stage), **numbers, **FACTS}
    for what in study.TASKS:
        for variant, seeds in study.SEEDS.items():
            for seed in range(seeds):
                more = {study.APART: gain, study.ATTENTION: 1.25, study.FORWARD: -0.5, study.SHARED: 0.0}[variant]
                more += harder * (what == "entities" and variant == study.APART)
                own = {name: f"{80 + more + noise.gauss(0, 1e-3):.5f}" for name in ("first", "best", "test")}
                own |= {"epoch_cpu_s": str(100 * (cost if variant == study.APART else 1)), "drift": "0.125"}
                yield {**settings, "what": what, "variant": variant, "seed": str(seed), **numbers, **own, **FACTS}


@pytest.mark.parametrize(("gain", "harder", "cost"), [(1.0, 1.0, 1.1), (-1.0, -1.0, 1.2), (2.0, -3.0, 1.0)])
def test_words_follow_the_numbers(
    study: ModuleType, gain: float, harder: float, cost: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "vocabulary", lambda: range(4321))
    rows = [*fabricated(study, gain, harder, cost)]
    *tasks, more, first, second, parts, drifts = study.verdicts(rows)
    for found, wanted in [*((x, gain) for x in tasks[:3]), *((x, gain + harder) for x in tasks[3:]), (more, harder)]:
        assert ("holds (" in found) == (wanted > 0), found
        assert ("the numbers say the contrary" in found) == (wanted < 0), found
        assert f"({wanted:.2f} ± 0.00 points, N = 3 seeds" in found, found
    for found in (first, second):
        assert f"{100 * (cost - 1):.1f} ± 0.0 % more CPU time" in found
        assert ("within" in found) == (cost == 1.1)
    assert parts.count("attention +1.25") == parts.count("feed-forward -0.50") == 2
    assert drifts.count("12.5 %") == 2
    said = study.page(rows, "albert")
    assert "on 4,321 characters" in said
    assert "3 stages of\n9 steps of 64, 3 minutes, loss 60.00" in said
    assert "16 minutes of fine-tuning" in said
    assert "threads a run: 1;" in said
    pytest.importorskip("matplotlib", reason="the study draws: pip install matplotlib")
    study.plot(rows, tmp_path / "albert.png")
    assert (tmp_path / "albert.png").stat().st_size > 10_000


def test_masks_and_labels(study: ModuleType) -> None:
    x = torch.randint(study.SPECIAL, 60, (64, 500), generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, -3:] = study.FIRST, study.PAD
    before = x.clone()
    shown, labels = study.masked(x, 60, torch.Generator().manual_seed(1))
    asked = labels != -100
    assert torch.equal(x, before)
    assert torch.equal(shown[~asked], x[~asked])
    assert torch.equal(labels[asked], x[asked])
    assert asked[:, [0, -3, -2, -1]].sum() == 0
    assert asked[:, 1:-3].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (shown[asked] == study.MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    other = (shown[asked] != study.MASK) & (shown[asked] != x[asked])
    assert other.float().mean() == pytest.approx(0.1, abs=0.02)
    assert shown.min() >= 0
    assert shown[asked][other].min() >= study.SPECIAL
    names = [["O", "B-nr", "I-nr"], ["B-nt"]]
    rows = study.targets(names, 6).tolist()
    assert [[study.LABELS[i] if i >= 0 else "" for i in row] for row in rows] == [
        ["", "O", "B-nr", "I-nr", "", ""],
        ["", "B-nt", "", "", "", ""],
    ]
    assert study.targets([1, 0], 6).tolist() == [1, 0]
