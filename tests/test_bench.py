"""The bench's promises: nothing wrong is timed, nothing is typed by hand, nothing crashes a run."""

import csv
import gc
import importlib
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyseq.kernels import _cpu
from pyseq.ops._backend import settings

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
ROOMS = sorted(path.stem for path in BENCH.glob("[!_]*.py"))
Run = Callable[..., int]  # of the fake room
Capture = pytest.CaptureFixture[str]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is capped and measured on Linux")

FAKE = """
import torch
from _runner import Mode, Provider, Room, Unavailable, Work, Workload, ours
from pyseq import _C
from pyseq.kernels import _cpu
from pyseq.ops._backend import settings

def square(x, factor=2.0):
    return {"value": x["x"] ** 2, "grad x": factor * x["x"]}

def good(x):
    return lambda: square(x)

def bad(x):
    return lambda: square(x, 2.001)

LEVEL = 2 if _C.cpu_level() > 2 else 0

def forced(x):
    def call():
        assert (settings.backend, _cpu.LEVEL) == ("reference", LEVEL)
        return square(x)
    call()
    return call

def raising(error):
    def setup(x):
        raise error
    return {"square": setup}

MODE = Mode("square", square, square, lambda x: Work(units=50, fmas=50, bytes=400))
ROOM = Room(
    workloads=[Workload("small", {"N": 50}, quick=True), Workload("large", {"N": 500})],
    inputs=lambda workload, device: {"x": torch.linspace(1, 2, workload.sizes["N"], device=device)},
    modes=[MODE],
    providers=[
        Provider("peer", "torch", {"square": good}),
        Provider("wrong peer", "torch", {"square": bad}),
        Provider("other job", "torch", {"square": good}, yardstick=MODE),
        *ours({"square": forced}, "reference", level=LEVEL),
        *ours({"square": good}, "reference", variant=" (AVX9)", level=9),
        *ours({"square": bad}, "reference", variant=" (bad)"),
        *ours(raising(KeyError("oops")), "reference", variant=" (broken)"),
        Provider("absent", "", raising(Unavailable("no such machine"))),
    ],
    unit="numbers",
    baseline="peer",
    headlines={"`ops.square`": ("square", "small")},
    objection="Squares are easy.",
)
"""


@pytest.fixture(scope="module")
def bench() -> Any:
    """The folder's modules, as `python bench` would see them; its __main__ under another name."""
    sys.path.insert(0, str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that spin on a busy machine make a test last minutes
    gc.freeze()  # the bench collects garbage before it times: not through all that other tests have left
    try:
        spec: Any = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
        main = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(main)
        names = ("limits", "report", "rows", "runner")
        yield SimpleNamespace(main=main, **{name: importlib.import_module(f"_{name}") for name in names})
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
        sys.path.remove(str(BENCH))


@pytest.fixture
def room(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the fake room."""
    monkeypatch.setattr(bench.runner, "BLOCK", 1e-3)
    monkeypatch.setattr(bench.runner, "copy_bandwidth", lambda device, seconds: 1e9)
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda *words: bench.main.main(["fake", *words], folder=tmp_path, root=tmp_path)


def row(**values: Any) -> Any:
    where = {"machine": "abacus", "isa": "beads", "threads": "2", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    names = {"room": "fake", "workload": "small", "sizes": "N=50", "mode": "square", "provider": "pyseq reference"}
    more = {"version": "1", "device": "cpu", "ours": True, "baseline": "peer", "unit": "numbers", "where": where}
    times = {"median": 1e-3, "q1": 9e-4, "q3": 2e-3, "n": 30, "rounds": 3, "throughput": 5e4, "error": 1e-7}
    ratios = {"ratio": 3.0, "ratio_low": 2.5, "ratio_high": 3.5, "memory": 1 << 20, "units_at_limit": 1e6}
    return importlib.import_module("_rows").Row(**{**names, **more, **times, **ratios, **values})


def test_right_gets_times_and_a_speedup_and_wrong_is_red(room: Run, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "out.csv"
    assert room("--quick", "--csv", str(path)) == 1
    assert (settings.backend, _cpu.LEVEL) == ("auto", 0)  # as they were
    with path.open(newline="") as file:
        lines = {line["provider"]: line for line in csv.DictReader(file)}
    ours = lines["pyseq reference"]
    assert ours["status"] == "ok"
    assert float(ours["ratio_low"]) <= float(ours["ratio"]) <= float(ours["ratio_high"])
    assert float(ours["error"]) <= float(ours["budget"])
    assert ours["torch"] == torch.__version__
    assert float(ours["of_limit"]) > 0
    assert lines["other job"]["of_limit"] == ""  # the limits are those of another job
    assert "absent" not in lines
    out, err = capsys.readouterr()
    assert "absent unavailable: no such machine" in out
    assert "pyseq reference (AVX9) unavailable: this CPU has no higher level" in out
    assert max(map(len, out.splitlines())) <= 120
    off = "wrong: grad x off by 5.0e-04"
    failed = {"wrong peer": off, "pyseq reference (bad)": off, "pyseq reference (broken)": "raised KeyError: 'oops'"}
    for who, reason in failed.items():
        assert lines[who]["status"].startswith(reason)
        assert lines[who]["median"] == lines[who]["ratio"] == lines[who]["throughput"] == ""
        (shown,) = (line for line in out.splitlines() if line.startswith(f"{who}  "))
        assert reason in shown
        assert "x [" not in shown
        assert (f"RED fake square small {who}: {reason}" in err) == (who != "wrong peer")
    assert "small pyseq reference:" not in err
    assert not (tmp_path / "results").exists()  # a quick run writes only where it is told


def test_nan_and_wrong_shape_are_errors(bench: Any) -> None:
    truth = {"value": torch.ones(3)}
    for found in (torch.tensor([1.0, math.nan, 1.0]), torch.ones(2)):
        assert bench.runner.deviation({"value": found}, truth)["value"] == (math.inf, math.inf)
    assert bench.runner.deviation({"value": torch.tensor(3.0)}, truth)["value"] == (0, 0)


def test_ratios_and_their_intervals(bench: Any) -> None:
    rows = bench.rows
    assert rows.interval([math.log(2)]) == (2, None, None)
    mean, low, high = rows.interval([0.0, 0.1, 0.2])
    assert math.log(mean) == pytest.approx(0.1)
    assert math.log(high) == pytest.approx(0.1 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert mean / low == pytest.approx(high / mean)
    ours, rival = row(by_round={0: 1.0, 1: 2.0, 3: 1.0}), row(provider="other", by_round={0: 2.0, 1: 4.0, 2: 9.0})
    assert rows.over(ours, rival) == pytest.approx((2, 2, 2))  # over the rounds in which both ran
    later = replace(rival, where={**rival.where, "date": "2026-01-01 10:00"}, median=7e-3)
    assert rows.over(ours, later) == (7, None, None)  # another run: medians, and no interval
    assert rows.over(row(), row(provider="peer", median=9.0)) == (3.0, 2.5, 3.5)  # rounds unknown: as the run had it
    assert rows.speedup(row(ratio=1.1, ratio_low=0.9, ratio_high=1.3)) == "1.1x [0.9, 1.3] ~"  # not significant
    assert rows.speedup(row(ratio=1234.5, ratio_low=1200.0, ratio_high=1300.0)) == "1234x [1200, 1300]"


def test_slow_contenders_meet_the_baseline(bench: Any) -> None:
    for plan in (bench.runner.Plan(), bench.runner.QUICK):
        rounds = []
        for estimate, baseline in ((1e-4, False), (plan.seconds / 10, False), (100.0, True), (100.0, False)):
            step = bench.runner.Contender(None, list, estimate, baseline).every(plan)
            rounds.append({i for i in range(plan.rounds) if (i + 1) % step == 0})
        assert set(range(plan.rounds)) == rounds[0] >= rounds[1] >= rounds[2] >= rounds[3]
        assert [len(rounds[2]), len(rounds[3])] == [3, 1]


def test_a_stall_does_not_decide_a_round(bench: Any) -> None:
    nobody, block = bench.runner.Provider("nobody", "", {}), bench.runner.BLOCK
    stalls = iter([0.0, 3 * block])  # the first is the call before the clock
    contender = bench.runner.Contender(nobody, lambda: time.sleep(next(stalls, 0.0)), block / 2)
    contender.run_round(0, "cpu")
    assert len(contender.times[0]) == 3
    assert statistics.median(contender.times[0]) < block


@LINUX
def test_caps_and_peak_memory(bench: Any) -> None:
    caps, size = bench.limits.caps, 32 << 20
    with pytest.raises(TimeoutError, match=r"over 0\.05 s"), caps(0.05, 8 << 30, "cpu"):
        time.sleep(5)
    with pytest.raises(RuntimeError, match="allocate"), caps(5, 1 << 28, "cpu"):
        torch.empty(1 << 30)
    assert torch.empty(1 << 28).numel() == 1 << 28  # lifted again
    found = bench.limits.peak_memory(lambda: (torch.ones(size // 4) + 1).sum(), "cpu")  # two at the height
    assert found == pytest.approx(2 * size, abs=4 << 20)


def test_new_lines_come_first_and_replace_their_own_only(bench: Any, tmp_path: Path) -> None:
    rows, path, one = bench.rows, tmp_path / "new" / "out.csv", {**row().where, "threads": "1"}
    old = [row(provider="peer", ratio=1.0, by_round={0: 0.5, 3: 1e-6}), row(), row(where=one)]
    rows.upsert(path, old)
    assert rows.read(path) == old
    new = [row(median=2e-3), row(workload="large", status="did not finish: over 1 s a call")]
    rows.upsert(path, new)
    assert rows.read(path) == [*new, old[0], old[2]]


def test_report_rewrites_between_its_markers(bench: Any, room: Run, tmp_path: Path, capsys: Capture) -> None:
    """What its tables say of most rows is in the committed pages, see below."""
    assert room("--report") == 2
    assert "run python bench first" in capsys.readouterr().err
    measured = [
        row(provider="peer", ours=False, ratio=1.0, median=4e-3, by_round={0: 4e-3, 1: 4e-3}),
        row(provider="other job", ours=False, median=1e-4),  # faster, but no rival
        row(provider="absent", ours=False, version="7", median=2e-3, by_round={0: 2e-3, 1: 2e-3}),  # the fastest
        row(by_round={0: 1e-3, 1: 1e-3}, fma_per_s=1e9, copy_bytes_per_s=2e9, limit_source="test"),
        row(where={**row().where, "machine": "slide rule", "date": "2025-12-31 23:59"}, device="cuda", median=0.5e-3),
    ]
    bench.rows.upsert(tmp_path / "results" / "fake.csv", measured)
    (tmp_path / "README.md").write_text("# Title\n")
    assert room("--report") == 2
    assert "README.md has no <!-- bench -->" in capsys.readouterr().err
    pages = {
        "README.md": [
            "| `ops.square`, N=50 | absent 2.00 ms | reference 1.00 ms | 2x [2, 2] | 1e-07 |",
            "| `ops.square` on cuda, N=50 | none ran | reference 500 us | - | 1e-07 |",
            "fake: abacus; beads; 2 threads; absent 7; torch 2; commit abc; 2026-01-01.\n",
        ],
        "docs/fake.md": ["; limits 1 GFMA/s, copy 2 GB/s (test).\n\n### slide rule, 2 threads"],  # latest first
    }
    before, after = "# Title\n<!-- {} -->\n", "\n<!-- /{} -->\nThe end.\n"
    for page, name in zip(pages, ("bench", "bench:fake"), strict=True):
        (tmp_path / page).write_text(f"{before}stale{after}".replace("{}", name))
    assert room("--report") == 0
    for (page, lines), name in zip(pages.items(), ("bench", "bench:fake"), strict=True):
        text = (tmp_path / page).read_text()
        assert text.startswith(before.replace("{}", name))
        assert text.endswith(after.replace("{}", name))
        assert "stale" not in text
        assert [line for line in lines if line not in text] == []
    assert (tmp_path / "docs" / "bench.png").stat().st_size > 1000


def test_pages_say_what_the_results_say(bench: Any, tmp_path: Path) -> None:
    """`python bench --report` has been run since the results, the rooms or the report changed."""
    results = {path.stem: path for path in sorted((BENCH / "results").glob("*.csv"))}
    pages = ["README.md", *(f"docs/{bench.main.load(BENCH, name).page or name}.md" for name in results)]
    (tmp_path / "docs").mkdir()
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    measured = {name: (bench.main.load(BENCH, name), bench.rows.read(path)) for name, path in results.items()}
    bench.report.write(tmp_path, measured)
    assert [page for page in pages if (tmp_path / page).read_text() != (ROOT / page).read_text()] == []


def test_rooms_and_peers_are_named(bench: Any, room: Run, capsys: Capture) -> None:
    listed = subprocess.check_output([sys.executable, "bench", "--list"], cwd=ROOT, text=True)
    assert [line.split(":")[0] for line in listed.splitlines() if line[0] != " "] == ROOMS
    assert bench.main.main(["attic"]) == 2
    assert f"no room attic; there are: {', '.join(ROOMS)}" in capsys.readouterr().err
    assert room("--against", "nobody") == 2
    assert "--against nobody: no such peer; there are peer, wrong peer, other job, absent" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ROOMS)
def test_room_verifies(bench: Any, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its providers on its first quick workload, no size above 8; and a slightly wrong result is noticed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the bench times no interpreter
    runner, declared = bench.runner, bench.main.load(BENCH, name)
    modes, workloads = {mode.name: mode for mode in declared.modes}, {w.name: w for w in declared.workloads}
    assert all(mode in modes and workload in workloads for mode, workload in declared.headlines.values())
    assert any(provider.name == declared.baseline for provider in declared.providers)
    first = next(workload for workload in workloads.values() if workload.quick)
    inputs = declared.inputs(replace(first, sizes={key: min(size, 8) for key, size in first.sizes.items()}), device)
    first_key = next(key for key, x in inputs.items() if x.is_floating_point())
    others = {**inputs, first_key: -inputs[first_key]}
    for mode in modes.values():
        verified = set()
        for provider in (p for p in declared.providers if mode.name in p.setups):
            check = runner.Check.of(provider.yardstick or mode, inputs)
            blank = bench.rows.Row(name, "", "", mode.name, provider.name, "", device, baseline=declared.baseline)
            judged, contender = runner.admit(provider, check, inputs, runner.Plan(), blank)
            assert judged.status == "ok" or judged.missing, (provider.name, judged.status)
            assert (contender is not None) == (judged.status == "ok")
            verified |= {provider.name} if contender else set()
        wanted = {"pyseq reference", "pyseq numba" if device == "cpu" else "pyseq triton"}
        if mode is not declared.modes[0]:
            wanted &= {provider.name for provider in declared.providers if mode.name in provider.setups}
        assert wanted <= verified
        check = runner.Check.of(mode, inputs)
        assert check(mode.plain(inputs))[0] == "ok"
        assert check(mode.plain(others))[0].startswith("wrong")
        as_is = replace(check, mode=replace(mode, view=lambda inputs, found: found))
        for key, true in check.truth.items():
            share = max(1e-4, 4 * max(check.plain[key]))  # samples are as far off as a hundred draws
            off = {**check.truth, key: true * (1 + share) if true.is_floating_point() else ~true}
            assert as_is(off)[0].startswith(f"wrong: {key}")
