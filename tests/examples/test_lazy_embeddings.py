import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOM = "lazy_adam"
EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = {"threads": "1", "machine": "m", "torch": "t", "date": "d"}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="studies show progress: pip install tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("lazy_embeddings")


def fabricated(study: ModuleType, gain: float) -> Iterator[dict[str, str]]:
    """Lazy sides gain so much over dense Adam in everything, and Lookahead over them; "decay" validates best."""
    noise = random.Random(0)
    over = f"{study.OVER}LazyAdam, decay"
    for side in (*study.SIDES, over):
        times = 0 if side == study.DENSE else 2 if side == over else 1
        for seed in range(3):
            score = 0.8 + noise.gauss(0, 0.001) + gain * times
            valid = score + 0.01 * side.endswith("decay")
            run = {"preset": "p", "epochs": "2", "every": "1", "side": side, "seed": str(seed), "epoch": "2"}
            run |= {"valid": f"{valid:.5f}", "test": f"{score:.5f}", "curve": f"{valid - 0.1:.5f} {valid:.5f}"}
            far = 0.5 + noise.gauss(0, 0.001) - gain * times
            run |= {"steps": "100", "words": study.listed(range(study.BINS, 0, -1), 0)}
            run |= {"updates": study.listed([9.0] * study.BINS) if side != "SparseAdam" else ""}
            run |= {"moved": study.listed([far] * study.BINS)}
            yield {**run, "cpu_seconds": f"{10 * far:.2f}", "seconds": "60", **FACTS}


def tables(study: ModuleType, how: str) -> list[dict[str, str]]:
    sizes = {"table_and_averages_bytes": "6e9", "gradient_bytes": "2e9", "moved_bytes": "14e9", "distinct_rows": "1234"}
    times = {"ms": "700", "least_ms": "650", "most_ms": "800", "copy_gb_per_s": "40.00", "steps": "5"}
    run = {**sizes, **times, "rows": "20000000", "how": how, "seconds": "60", **FACTS}
    return [{**run, "optimizer": name} for name in study.LARGE_SIDES]


@pytest.mark.parametrize(("gain", "words"), [(0.03, "holds ("), (0.0, "does not hold ("), (-0.03, "does not hold: ")])
def test_words_follow_the_numbers(study: ModuleType, gain: float, words: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the study draws: pip install matplotlib")
    rows = [*fabricated(study, gain)]
    assert study.better(rows) == "LazyAdam, decay"
    page = study.page(rows, tables(study, "measured" if gain else "computed"), "runs")
    assert page.count(f": {words}") == (14 if gain else 13)
    short = " ".join(page.partition("The claim tested")[0].split())
    lazy = "SparseAdam; LazyAdam, skip; LazyAdam, decay"
    assert f"is shown for {lazy if gain > 0 else 'none of them'}." in short
    assert f"further is shown against {lazy if gain > 0 else 'none of them'}, a" in short
    assert f"(LazyAdam, decay, by validation) {'improves' if gain > 0 else 'is not shown to improve'} it." in short
    assert f"Of the 14 verdicts below {14 if gain > 0 else 0 if gain else 1} are" in short
    assert page.count("N = 3 seeds") == 14
    assert ("measured, 5 steps, 650.0 to 800.0 | 50 % |" in page) == bool(gain)
    assert ("| 700.0 | computed | 50 % |" in page) == (not gain)
    study.plot(rows, tmp_path / "runs.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("runs.png", "runs_rows.png"))


def test_every_side_trains_and_lazy_ones_leave_other_rows(study: ModuleType) -> None:
    ids, lengths = torch.tensor([[3, 3, 5], [7, 0, 0]]), torch.tensor([3, 1])
    seen = torch.zeros(21).index_fill(0, torch.tensor([3, 5, 7]), 1).bool()
    for side in (*study.SIDES, study.OVER + study.OURS[1]):
        torch.manual_seed(0)
        model = study.Sentiment(20, sparse=side != study.DENSE)
        start = model.words.weight.detach().clone()
        using = study.optimizers(side, model)
        before = start
        for words in (ids, torch.where(ids == 7, 9, ids)):
            before = model.words.weight.detach().clone()
            for optimizer in using:
                optimizer.zero_grad()
            model(words, lengths).sum().backward()
            for optimizer in using:
                optimizer.step()
        assert torch.equal((model.words.weight.detach() != start).any(1), seen.index_fill(0, torch.tensor(9), True))
        assert (model.words.weight[7].detach() != before[7]).any() == (side == study.DENSE), side


def test_numbers_of_words(study: ModuleType) -> None:
    data = study.Texts(*(torch.zeros(0),) * 3, {}, torch.tensor([99, 1, 2, 3, 4, 7, 8, 5000]))
    assert data.bins.tolist() == [0, 1, 1, 2, 2, 3, study.BINS - 1]
    means = study.by_bin(torch.tensor([1.0, 2, 4, 0, 0, 0, 5], dtype=torch.float64), data.bins)
    assert (means[:2], means[-1], len(means)) == ([1.0, 3.0], 5.0, study.BINS)
    assert study.rare([1.0, 3.0, 100.0], [1, 3, 100]) == 2.5
    assert (study.labels()[0], study.labels()[1], study.labels()[-1]) == ("1", "2-3", "1024 and more")
    assert len(study.labels()) == study.BINS
