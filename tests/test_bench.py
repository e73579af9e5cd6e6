"""The bench's promises: nothing wrong is timed, nothing is typed by hand, nothing crashes a run."""

import csv
import importlib
import importlib.util
import itertools
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyseq.kernels import _cpu
from pyseq.ops._backend import settings

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
ROOMS = sorted(path.stem for path in BENCH.glob("[!_]*.py"))
CAPPED = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is capped and measured on Linux")

FAKE = """
import torch
from _runner import Mode, Provider, Room, Unavailable, Work, Workload, ours

from pyseq.ops._backend import settings


def square(x):
    return {"value": x["x"] ** 2, "grad x": 2 * x["x"]}


def good(x):
    return lambda: square(x)


def forced(x):
    def call():
        assert settings.backend == "reference"
        return square(x)

    call()
    return call


def bad(x):
    return lambda: {"value": x["x"] ** 2, "grad x": 2.001 * x["x"]}


def absent(x):
    raise Unavailable("no such machine")


def broken(x):
    raise KeyError("oops")


MODE = Mode("square", square, square, lambda x: Work(units=50, fmas=50, bytes=400))
ROOM = Room(
    workloads=[Workload("small", {"N": 50}, quick=True), Workload("large", {"N": 500})],
    inputs=lambda workload, device: {"x": torch.linspace(1, 2, workload.sizes["N"], device=device)},
    modes=[MODE],
    providers=[
        Provider("peer", "torch", {"square": good}),
        Provider("wrong peer", "torch", {"square": bad}),
        Provider("other job", "torch", {"square": good}, yardstick=MODE),
        *ours({"square": SETUP}, "reference"),
        *ours({"square": SETUP}, "reference", variant=" (fast)"),
        Provider("absent", "", {"square": absent}),
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
    try:
        spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
        assert spec is not None
        assert spec.loader is not None
        main = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(main)
        yield main
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(BENCH))


@pytest.fixture
def room(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a fake room whose own provider has the setup of that name."""
    runner = importlib.import_module("_runner")
    monkeypatch.setattr(bench, "QUICK", runner.Plan(rounds=3, seconds=0.1, call_seconds=5.0))
    monkeypatch.setattr(runner, "BLOCK", 1e-3)
    monkeypatch.setattr(runner, "fma_peak", lambda device, seconds: 1e9)
    monkeypatch.setattr(runner, "copy_bandwidth", lambda device, seconds: 1e9)

    def run(setup: str, *words: str) -> int:
        (tmp_path / "fake.py").write_text(FAKE.replace("SETUP", setup))
        return bench.main(["fake", *words], folder=tmp_path, root=tmp_path)  # type: ignore[no-any-return]

    return run


def lines_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {line["provider"]: line for line in csv.DictReader(file)}


def test_right_provider_gets_times_and_a_speedup(
    room: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.csv"
    assert room("forced", "--quick", "--csv", str(path)) == 0
    assert settings.backend == "auto"  # as it was
    lines = lines_of(path)
    ours = lines["pyseq reference"]
    assert ours["status"] == "ok"
    assert float(ours["ratio_low"]) <= float(ours["ratio"]) <= float(ours["ratio_high"])
    assert float(ours["error"]) <= float(ours["budget"])
    assert ours["torch"] == torch.__version__
    assert float(ours["of_limit"]) > 0
    assert lines["other job"]["of_limit"] == ""  # the limits are those of another job
    assert lines["wrong peer"]["status"].startswith("wrong: grad x off by 5.0e-04")
    assert lines["wrong peer"]["ratio"] == ""
    assert "absent" not in lines
    out = capsys.readouterr().out
    assert "absent unavailable: no such machine" in out
    assert max(map(len, out.splitlines())) <= 120
    assert not (tmp_path / "results").exists()  # a quick run writes only where it is told


@pytest.mark.parametrize(
    ("setup", "reason"), [("bad", "wrong: grad x off by 5.0e-04"), ("broken", "raised KeyError: 'oops'")]
)
def test_wrong_provider_of_ours_is_red_and_gets_no_speedup(
    room: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], setup: str, reason: str
) -> None:
    path = tmp_path / "out.csv"
    assert room(setup, "--quick", "--csv", str(path)) == 1
    ours = lines_of(path)["pyseq reference"]
    assert ours["status"].startswith(reason)
    assert ours["median"] == ours["ratio"] == ours["throughput"] == ""
    out, err = capsys.readouterr()
    (row,) = (line for line in out.splitlines() if line.startswith("pyseq reference  "))
    assert reason in row
    assert "x [" not in row
    assert f"RED fake square small pyseq reference: {reason}" in err


def test_backend_and_level_are_in_force_in_a_block_only(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    provider = runner.Provider("pyseq numba", "pyseq", {}, backend="numba")
    with provider.in_force():
        assert settings.backend == "numba"
    assert (settings.backend, _cpu.LEVEL) == ("auto", 0)
    extension = pytest.importorskip("pyseq._C")
    with pytest.raises(runner.Unavailable, match="no higher level"), replace(provider, level=4).in_force():
        pass
    if extension.cpu_level() > 2:
        with replace(provider, level=2).in_force():
            assert _cpu.LEVEL == 2


def test_nan_and_wrong_shape_are_errors(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    truth = {"value": torch.ones(3)}
    for found in (torch.tensor([1.0, math.nan, 1.0]), torch.ones(2)):
        assert runner.deviation({"value": found}, truth)["value"] == (math.inf, math.inf)
    assert runner.deviation({"value": torch.tensor(3.0)}, truth)["value"] == (0, 0)


def test_interval(bench: Any) -> None:
    rows = importlib.import_module("_rows")
    assert rows.interval([math.log(2)]) == (2, None, None)
    assert rows.interval([math.log(2)] * 4) == pytest.approx((2, 2, 2))
    mean, low, high = rows.interval([0.0, 0.1, 0.2])
    assert math.log(mean) == pytest.approx(0.1)
    assert math.log(high) == pytest.approx(0.1 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert mean / low == pytest.approx(high / mean)


def test_ratio_to_any_rival_pairs_rounds_of_one_run(bench: Any) -> None:
    rows = importlib.import_module("_rows")
    ours, rival = row(by_round={0: 1.0, 1: 2.0, 3: 1.0}), row(provider="other", by_round={0: 2.0, 1: 4.0, 2: 9.0})
    assert rows.over(ours, rival) == pytest.approx((2, 2, 2))
    later = replace(rival, where={**rival.where, "date": "2026-01-01 10:00"}, median=7e-3)
    assert rows.over(ours, later) == (7, None, None)  # another run: medians, and no interval
    assert rows.over(row(), row(provider="peer", median=9.0)) == (3.0, 2.5, 3.5)  # rounds unknown: as the run had it


def test_slow_contenders_meet_the_baseline(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    nobody = runner.Provider("nobody", "", {})
    for plan in (runner.Plan(), runner.QUICK):
        rounds = []
        for estimate, baseline in ((1e-4, False), (plan.seconds / 10, False), (100.0, True), (100.0, False)):
            step = runner.Contender(nobody, list, estimate, baseline).every(plan)
            rounds.append({i for i in range(plan.rounds) if (i + 1) % step == 0})
        assert rounds[0] == set(range(plan.rounds))
        assert len(rounds[2]) == 3
        assert len(rounds[3]) == 1
        assert all(a >= b for a, b in itertools.pairwise(rounds))


def test_a_stall_does_not_decide_a_round(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    nobody = runner.Provider("nobody", "", {})
    stalls = iter([0.0, 3 * runner.BLOCK, 0.0, 0.0])  # the first is the call before the clock
    contender = runner.Contender(nobody, lambda: time.sleep(next(stalls, 0.0)), runner.BLOCK / 2)
    contender.run_round(0, "cpu")
    assert len(contender.times[0]) == 3
    assert statistics.median(contender.times[0]) < runner.BLOCK
    dear = runner.Contender(nobody, lambda: time.sleep(2 * runner.BLOCK), 20 * runner.BLOCK)
    dear.run_round(0, "cpu")
    assert len(dear.times[0]) == 1


def test_caps_end_a_call_that_takes_too_long(bench: Any) -> None:
    limits = importlib.import_module("_limits")
    with pytest.raises(TimeoutError, match=r"over 0\.05 s"), limits.caps(0.05, 8 << 30, "cpu"):
        time.sleep(5)


@CAPPED
def test_caps_refuse_a_call_that_takes_too_much(bench: Any) -> None:
    limits = importlib.import_module("_limits")
    with pytest.raises(RuntimeError, match="allocate"), limits.caps(5, 1 << 28, "cpu"):
        torch.empty(1 << 30)
    assert torch.empty(1 << 28).numel() == 1 << 28  # lifted again


@CAPPED
def test_peak_memory_sees_what_is_freed_before_the_end(bench: Any) -> None:
    limits = importlib.import_module("_limits")
    size = 32 << 20
    found = limits.peak_memory(lambda: (torch.ones(size // 4) + 1).sum(), "cpu")  # two at the height
    assert found == pytest.approx(2 * size, abs=4 << 20)


def row(**values: Any) -> Any:
    rows = importlib.import_module("_rows")
    where = {"machine": "abacus", "isa": "beads", "threads": "2", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    first = rows.Row(
        "fake", "small", "N=50", "square", "pyseq reference", "1", "cpu", ours=True, baseline="peer", unit="numbers"
    )
    times = {"median": 1e-3, "q1": 9e-4, "q3": 2e-3, "n": 30, "rounds": 3, "throughput": 5e4, "error": 1e-7}
    ratios = {"ratio": 3.0, "ratio_low": 2.5, "ratio_high": 3.5, "memory": 1 << 20, "units_at_limit": 1e6}
    return replace(first, **{"where": where, **times, **ratios, **values})


def test_new_lines_come_first_and_replace_their_own_only(bench: Any, tmp_path: Path) -> None:
    rows = importlib.import_module("_rows")
    path = tmp_path / "new" / "out.csv"
    old = [
        row(provider="peer", ratio=1.0, by_round={0: 0.5, 3: 1e-6}),
        row(),
        row(where={**row().where, "threads": "1"}),
    ]
    rows.upsert(path, old)
    assert rows.read(path) == old
    rows.upsert(path, [row(median=2e-3), row(workload="large", status="did not finish: over 1 s a call")])
    found = rows.read(path)
    assert [(r.provider, r.workload, r.where["threads"], r.median) for r in found] == [
        ("pyseq reference", "small", "2", 2e-3),
        ("pyseq reference", "large", "2", 1e-3),
        ("peer", "small", "2", 1e-3),
        ("pyseq reference", "small", "1", 1e-3),
    ]


def test_report_rewrites_between_its_markers(
    room: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, readme, page = importlib.import_module("_rows"), tmp_path / "README.md", tmp_path / "docs" / "fake.md"
    old = {**row().where, "machine": "slide rule", "date": "2025-12-31 23:59"}
    measured = [
        row(provider="peer", ours=False, ratio=1.0, median=4e-3, by_round={0: 4e-3, 1: 4e-3}),
        row(provider="wrong peer", ours=False, status="wrong: value off by 1", median=None, ratio=None),
        row(provider="other job", ours=False, median=1e-4),  # faster, but no rival
        row(provider="absent", ours=False, version="7", median=2e-3, by_round={0: 2e-3, 1: 2e-3}),  # the fastest
        row(by_round={0: 1e-3, 1: 1e-3}, fma_per_s=1e9, copy_bytes_per_s=2e9, limit_source="test"),
        row(provider="pyseq reference (fast)", median=5e-4),  # no headline: a variant
        row(workload="large", status="wrong: value off by 1", median=None, ratio=None),
        row(where=old, median=0.002),
        row(where=old, device="cuda", median=0.5e-3),
    ]
    assert room("good", "--report") == 2
    assert "run python bench first" in capsys.readouterr().err
    rows.upsert(tmp_path / "results" / "fake.csv", measured)
    readme.write_text("# Title\n")
    assert room("good", "--report") == 2
    assert "README.md has no <!-- bench -->" in capsys.readouterr().err
    before, after = "# Title\n<!-- bench -->", "<!-- /bench -->\nThe end.\n"
    readme.write_text(f"{before}\nstale\n{after}")
    page.write_text(f"{before}\nstale\n{after}".replace("bench", "bench:fake"))
    assert room("good", "--report") == 0
    text = readme.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "stale" not in text
    assert "| `ops.square`, N=50 | absent 2.00 ms | reference 1.00 ms | 2x [2, 2] | 1e-07 |" in text
    assert "| `ops.square` on cuda, N=50 | none ran | reference 500 us | - | 1e-07 |" in text
    assert "fake: abacus; beads; 2 threads; absent 7; torch 2; commit abc; 2026-01-01.\n" in text
    assert "A fair objection to fake: Squares are easy." in text
    assert (tmp_path / "docs" / "bench.png").stat().st_size > 1000
    full = page.read_text()
    assert "| square | small<br>N=50 | large<br>N=50 | largest error |" in full
    assert "| peer | 4.00 ms | - | 1e-07 |" in full
    assert "| pyseq reference | 1.00 ms<br>3x | wrong | 1e-07 |" in full
    assert "; limits 1 GFMA/s, copy 2 GB/s (test).\n" in full
    assert re.findall("### .*", full) == ["### abacus, 2 threads", *["### slide rule, 2 threads"] * 2]  # latest first


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in ROOMS)])
def test_pages_say_what_the_results_say(bench: Any, tmp_path: Path, page: str) -> None:
    """`python bench --report` has been run since the results, the rooms or the report changed."""
    report, rows = importlib.import_module("_report"), importlib.import_module("_rows")
    results = {path.stem: path for path in sorted((BENCH / "results").glob("*.csv"))}
    (tmp_path / "docs").mkdir()
    for name in ("README.md", *(f"docs/{name}.md" for name in results)):
        shutil.copy(ROOT / name, tmp_path / name)
    report.write(tmp_path, {name: (bench.load(BENCH, name), rows.read(path)) for name, path in results.items()})
    assert (tmp_path / page).read_text() == (ROOT / page).read_text()


def test_difference_that_is_not_significant_is_marked(bench: Any) -> None:
    rows = importlib.import_module("_rows")
    assert rows.speedup(row(ratio=1.1, ratio_low=0.9, ratio_high=1.3)) == "1.1x [0.9, 1.3] ~"
    assert rows.speedup(row(ratio=1234.5, ratio_low=1200.0, ratio_high=1300.0)) == "1234x [1200, 1300]"


def test_unknown_room_and_peer_say_what_there_is(
    bench: Any, room: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["attic"]) == 2
    assert f"no room attic; there are: {', '.join(ROOMS)}" in capsys.readouterr().err
    assert room("good", "--against", "nobody") == 2
    assert "--against nobody: no such peer; there are peer, wrong peer, other job, absent" in capsys.readouterr().err


def test_python_bench_lists_the_rooms() -> None:
    done = subprocess.run([sys.executable, "bench", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[0] != " "] == ROOMS


def small(declared: Any) -> Any:
    """The first quick workload, no size above 8."""
    first = next(workload for workload in declared.workloads if workload.quick)
    return replace(first, sizes={name: min(size, 8) for name, size in first.sizes.items()})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ROOMS)
def test_room_verifies(bench: Any, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the bench times no interpreter
    runner, rows = importlib.import_module("_runner"), importlib.import_module("_rows")
    declared = bench.load(BENCH, name)
    inputs = declared.inputs(small(declared), device)
    workloads = {workload.name for workload in declared.workloads}
    modes = {mode.name: mode for mode in declared.modes}
    assert all(mode in modes and workload in workloads for mode, workload in declared.headlines.values())
    assert any(provider.name == declared.baseline for provider in declared.providers)
    for mode in modes.values():
        verified = set()
        for provider in declared.providers:
            if mode.name in provider.setups:
                check = runner.Check.of(provider.yardstick or mode, inputs)
                blank = rows.Row(name, "", "", mode.name, provider.name, "", device, baseline=declared.baseline)
                judged, contender = runner.admit(provider, check, inputs, runner.Plan(), blank)
                assert judged.status == "ok" or judged.missing, (provider.name, judged.status)
                assert (contender is not None) == (judged.status == "ok")
                verified |= {provider.name} if contender else set()
        assert {"pyseq reference", "pyseq numba" if device == "cpu" else "pyseq triton"} <= verified


@pytest.mark.parametrize("name", ROOMS)
def test_room_notices_a_slightly_wrong_result(bench: Any, name: str) -> None:
    runner = importlib.import_module("_runner")
    declared = bench.load(BENCH, name)
    inputs = declared.inputs(small(declared), "cpu")
    others = {key: x.flip(0) if x.is_floating_point() else x for key, x in inputs.items()}
    for mode in declared.modes:
        check = runner.Check.of(mode, inputs)
        assert check(mode.plain(inputs))[0] == "ok"
        assert check(mode.plain(others))[0].startswith("wrong")
        as_is = replace(check, mode=replace(mode, view=lambda inputs, found: found))
        for key, true in check.truth.items():
            off = {**check.truth, key: true * (1 + 1e-4) if true.is_floating_point() else ~true}
            assert as_is(off)[0].startswith(f"wrong: {key}")
