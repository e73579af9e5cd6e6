import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOM = "lookahead"
EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = {"threads": "1", "machine": "m", "torch": "t", "date": "d"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("tqdm", reason="studies show progress: pip install tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_queue_resumes_where_it_fell_and_skips_what_is_done(load: Any, tmp_path: Path) -> None:
    study, worked = load("_study"), []
    path, queue = tmp_path / "new" / "runs.csv", [{"preset": "quick", "seed": seed} for seed in range(4)]

    def work(run: dict[str, Any]) -> list[dict[str, str]]:
        worked.append(run["seed"])
        if worked == [0, 1, 2]:
            raise RuntimeError("the machine fell")
        return [{**study.text(run), "score": str(run["seed"] / 2), "seconds": "1", **FACTS}]

    with pytest.raises(RuntimeError, match="fell"):
        study.work_off(path, queue, work)
    study.work_off(path, queue, work)
    study.work_off(path, queue, work)
    assert worked == [0, 1, 2, 2, 3]
    assert [row["score"] for row in study.read(path, {"preset": "quick"})] == ["0.0", "0.5", "1.0", "1.5"]
    assert study.read(path, {"preset": "published"}) == []
    with pytest.raises(ValueError, match=r"runs.csv has the columns preset, .*, got seconds"):
        study.append(path, [{"seconds": "1", **FACTS}])
    for missing in ("seconds", "machine"):
        row = {name: value for name, value in {"seconds": "1", **FACTS}.items() if name != missing}
        with pytest.raises(ValueError, match="a row must have threads, machine, torch, date and seconds"):
            study.append(path, [row])


def test_numbers(load: Any) -> None:
    study = load("_study")
    assert study.spread([1.0, 2.0, 4.5], 2) == "2.50 ± 1.80"
    assert study.spread([1234.5], 1) == "1,234.5"
    assert study.paired([3.0, 5.0], [1.0, 6.0]) == [2.0, -1.0]
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))
    assert study.interval([1.0]) == (-float("inf"), float("inf"))
    assert study.markdown([["", "a"], ["x", "1"]]) == "|  | a |\n|---|---:|\n| x | 1 |"


def fabricated(example: ModuleType, gain: float) -> Iterator[dict[str, str]]:
    """Lookahead adds so many points everywhere; nothing else tells the two apart but noise."""
    noise = random.Random(0)
    for name, rates in example.RATES.items():
        for lookahead, rate, seed in ((x, rate, seed) for x in (False, True) for rate in rates for seed in range(4)):
            score = f"{0.9 + 0.02 * (rate == rates[1]) + noise.gauss(0, 0.001) + gain * lookahead:.5f}"
            kinds = {f"{kind}_{what}": score for kind in ("fast", "slow") for what in ("valid", "test", "curve")}
            run = {"optimizer": name, "lookahead": str(lookahead), "rate": str(rate), "seed": str(seed)}
            yield {**run, "preset": "p", "epochs": "1", **kinds, "seconds": "60", **FACTS}


@pytest.mark.parametrize(("gain", "words"), [(0.03, "holds ("), (0.0, "does not hold ("), (-0.03, "does not hold: ")])
def test_words_follow_the_numbers(load: Any, gain: float, words: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the study draws: pip install matplotlib")
    example = load("mnist_lookahead")
    rows = [*fabricated(example, gain)]
    page = example.page(rows, "runs")
    best, rest = page.partition("less sensitive")[::2]
    assert best.count(f": {words}") == 3
    assert ": holds (" not in rest
    assert rest.count("does not hold") == 6
    assert ("shown for SGD and Adam and AdamW." if gain > 0 else "shown for no optimizer.") in page
    assert f"Of the\n9 verdicts below {3 * (gain > 0)} are" in page
    assert page.count("N = 4 seeds") == 6
    example.plot(rows, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000
