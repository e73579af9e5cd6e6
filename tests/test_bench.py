"""The bench's promises: nothing wrong is timed, nothing is typed by hand, nothing crashes a run."""

import csv
import importlib
import importlib.util
import itertools
import math
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

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
CAPPED = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is capped and measured on Linux")

FAKE = """
import torch
from _runner import Mode, Provider, Room, Unavailable, Work, Workload


def square(x):
    return {"value": x["x"] ** 2, "grad x": 2 * x["x"]}


def good(x):
    return lambda: square(x)


def bad(x):
    return lambda: {"value": x["x"] ** 2, "grad x": 2.001 * x["x"]}


def absent(x):
    raise Unavailable("no such machine")


def broken(x):
    raise KeyError("oops")


ROOM = Room(
    workloads=[Workload("small", {"N": 50}, quick=True), Workload("large", {"N": 500})],
    inputs=lambda workload, device: {"x": torch.linspace(1, 2, workload.sizes["N"], device=device)},
    modes=[Mode("square", square, square, lambda x: Work(units=50, fmas=50, bytes=400))],
    providers=[
        Provider("peer", "torch", {"square": good}),
        Provider("ours", "pyseq", {"square": SETUP}, ours=True),
        Provider("absent", "", {"square": absent}),
    ],
    unit="numbers",
    baseline="peer",
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
    assert room("good", "--quick", "--csv", str(path)) == 0
    ours = lines_of(path)["ours"]
    assert ours["status"] == "ok"
    assert float(ours["ratio_low"]) <= float(ours["ratio"]) <= float(ours["ratio_high"])
    assert float(ours["error"]) <= float(ours["budget"])
    assert ours["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert "absent unavailable: no such machine" in out
    assert max(map(len, out.splitlines())) <= 120


def test_quick_run_writes_no_results_unless_told(room: Callable[..., int], tmp_path: Path) -> None:
    assert room("good", "--quick") == 0
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("setup", "reason"), [("bad", "wrong: grad x off by 5.0e-04"), ("broken", "raised KeyError: 'oops'")]
)
def test_wrong_provider_is_red_and_gets_no_speedup(
    room: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], setup: str, reason: str
) -> None:
    path = tmp_path / "out.csv"
    assert room(setup, "--quick", "--csv", str(path)) == 1
    ours = lines_of(path)["ours"]
    assert ours["status"].startswith(reason)
    assert ours["median"] == ours["ratio"] == ours["throughput"] == ""
    out, err = capsys.readouterr()
    (row,) = (line for line in out.splitlines() if line.startswith("ours"))
    assert reason in row
    assert "x [" not in row
    assert f"RED fake square small ours: {reason}" in err


def test_nan_and_wrong_shape_are_errors(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    truth = {"value": torch.ones(3)}
    for found in (torch.tensor([1.0, math.nan, 1.0]), torch.ones(2)):
        assert runner.deviation({"value": found}, truth)["value"] == (math.inf, math.inf)
    assert runner.deviation({"value": torch.tensor(3.0)}, truth)["value"] == (0, 0)


def test_interval(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    assert runner.interval([math.log(2)]) == (2, None, None)
    assert runner.interval([math.log(2)] * 4) == pytest.approx((2, 2, 2))
    mean, low, high = runner.interval([0.0, 0.1, 0.2])
    assert math.log(mean) == pytest.approx(0.1)
    assert math.log(high) == pytest.approx(0.1 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert mean / low == pytest.approx(high / mean)


def test_slow_contenders_meet_the_baseline(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    for plan in (runner.Plan(), runner.QUICK):
        rounds = []
        for estimate, baseline in ((1e-4, False), (plan.seconds / 10, False), (100.0, True), (100.0, False)):
            step = runner.Contender(list, estimate, baseline).every(plan)
            rounds.append({i for i in range(plan.rounds) if (i + 1) % step == 0})
        assert rounds[0] == set(range(plan.rounds))
        assert len(rounds[2]) == 3
        assert len(rounds[3]) == 1
        assert all(a >= b for a, b in itertools.pairwise(rounds))


def test_a_stall_does_not_decide_a_round(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    stalls = iter([0.0, 3 * runner.BLOCK, 0.0, 0.0])  # the first is the call before the clock
    contender = runner.Contender(lambda: time.sleep(next(stalls, 0.0)), runner.BLOCK / 2, False)
    contender.run_round(0, "cpu")
    assert len(contender.times[0]) == 3
    assert statistics.median(contender.times[0]) < runner.BLOCK
    dear = runner.Contender(lambda: time.sleep(2 * runner.BLOCK), 20 * runner.BLOCK, False)
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
    found, method = limits.peak_memory(lambda: (torch.ones(size // 4) + 1).sum(), "cpu")  # two at the height
    assert method == "resident set high-water mark"
    assert found == pytest.approx(2 * size, abs=4 << 20)


def row(**values: Any) -> Any:
    report = importlib.import_module("_report")
    where = {"machine": "abacus", "isa": "beads", "threads": "2", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    first = report.Row(
        "fake", "small", "N=50", "square", "ours", "1", "cpu", ours=True, baseline="peer", unit="numbers"
    )
    times = {"median": 1e-3, "q1": 9e-4, "q3": 2e-3, "n": 30, "rounds": 3, "throughput": 5e4, "error": 1e-7}
    ratios = {"ratio": 3.0, "ratio_low": 2.5, "ratio_high": 3.5, "memory": 1 << 20, "units_at_limit": 1e6}
    return replace(first, **{"where": where, **times, **ratios, **values})


def test_new_lines_come_first_and_replace_their_own_only(bench: Any, tmp_path: Path) -> None:
    report = importlib.import_module("_report")
    path = tmp_path / "new" / "out.csv"
    old = [row(provider="peer", ratio=1.0), row(), row(where={**row().where, "threads": "1"})]
    report.upsert(path, old)
    assert report.read(path) == old
    report.upsert(path, [row(median=2e-3), row(workload="large", status="did not finish: over 1 s a call")])
    found = report.read(path)
    assert [(r.provider, r.workload, r.where["threads"], r.median) for r in found] == [
        ("ours", "small", "2", 2e-3),
        ("ours", "large", "2", 1e-3),
        ("peer", "small", "2", 1e-3),
        ("ours", "small", "1", 1e-3),
    ]


def test_report_rewrites_between_its_markers(
    room: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = importlib.import_module("_report")
    readme, path = tmp_path / "README.md", tmp_path / "results" / "fake.csv"
    rows = [row(provider="peer", ours=False, ratio=1.0), row(fma_per_s=1e9, copy_bytes_per_s=2e9, limit_source="test")]
    rows.append(row(workload="large", status="wrong: value off by 1", median=None, ratio=None, q1=None, q3=None))
    report.upsert(path, rows)
    assert room("good", "--report") == 2
    assert "has no <!-- bench:fake -->" in capsys.readouterr().err
    before, after = "# Title\n<!-- bench:fake -->", "<!-- /bench:fake -->\nThe end.\n"
    readme.write_text(f"{before}\nstale\n{after}")
    assert room("good", "--report") == 0
    text = readme.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "stale" not in text
    assert "| square | small<br>N=50 | large<br>N=50 | largest error |" in text
    assert "| peer | 1.00 ms | - | 1e-07 |" in text
    assert "| ours | 1.00 ms<br>3x | wrong | 1e-07 |" in text
    assert (
        "abacus; beads; 2 threads; torch 2; peer 1; commit abc; 2026-01-01; limits 1 GFMA/s, copy 2 GB/s (test)" in text
    )
    assert "A fair objection: Squares are easy." in text
    assert "![fake-square](docs/fake-square.png)" in text
    assert (tmp_path / "docs" / "fake-square.png").stat().st_size > 1000
    room("good", "--report")
    assert readme.read_text() == text

    where = {**row().where, "machine": "slide rule", "date": "2025-01-01"}
    report.upsert(path, [row(where=where, median=0.002)])
    page = tmp_path / "docs" / "fake.md"
    assert room("good", "--report") == 2
    assert "fake.md has no <!-- bench:fake -->" in capsys.readouterr().err
    page.write_text(f"{before}\n{after}")
    assert room("good", "--report") == 0
    assert readme.read_text() == text
    assert "slide rule" in page.read_text()
    assert "abacus" not in page.read_text()


def test_difference_that_is_not_significant_is_marked(bench: Any) -> None:
    report = importlib.import_module("_report")
    assert report.speedup(row(ratio=1.1, ratio_low=0.9, ratio_high=1.3)) == "1.1x [0.9, 1.3] ~"
    assert report.speedup(row(ratio=1234.5, ratio_low=1200.0, ratio_high=1300.0)) == "1234x [1200, 1300]"


def test_unknown_room_and_peer_say_what_there_is(
    bench: Any, room: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["attic"]) == 2
    assert "no room attic; there are: chain" in capsys.readouterr().err
    assert room("good", "--against", "nobody") == 2
    assert "--against nobody: no such peer; there are peer, absent" in capsys.readouterr().err


def test_python_bench_lists_the_rooms() -> None:
    done = subprocess.run([sys.executable, "bench", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "chain: loss, decode" in done.stdout
    assert "ner          B=64 T=256 K=9  (quick)" in done.stdout


@pytest.mark.parametrize("mode", [0, 1])
def test_chain_declaration_verifies(bench: Any, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, report = importlib.import_module("_runner"), importlib.import_module("_report")
    monkeypatch.setenv("PYSEQ_BACKEND", "auto")  # restored after the providers set it
    declared = bench.load(BENCH, "chain")
    job, workload = declared.modes[mode], runner.Workload("tiny", {"B": 3, "T": 8, "K": 5})
    inputs = declared.inputs(workload, "cpu")
    assert int(inputs["lengths"][0]) == 8
    assert bool((inputs["lengths"] == inputs["mask"].sum(1)).all())
    verified = []
    for provider in declared.providers:
        if job.name not in provider.setups:
            continue
        check = runner.Check.of(provider.yardstick or job, inputs)
        blank = report.Row("chain", "tiny", "", job.name, provider.name, "", "cpu", baseline="pytorch-crf")
        judged, contender = runner.admit(provider, check, inputs, runner.Plan(call_seconds=300), blank)
        assert judged.status == "ok" or judged.status.startswith("unavailable"), (provider.name, judged.status)
        assert (contender is not None) == (judged.status == "ok")
        verified += [provider.name] * (judged.status == "ok")
    assert {"pyseq reference", "pyseq numba"} <= set(verified)


def test_chain_check_catches_a_slightly_wrong_result(bench: Any) -> None:
    runner = importlib.import_module("_runner")
    declared = bench.load(BENCH, "chain")
    loss, decode = declared.modes
    inputs = declared.inputs(runner.Workload("tiny", {"B": 3, "T": 8, "K": 5}), "cpu")
    check = runner.Check.of(loss, inputs)
    for name in check.truth:
        off = {**check.truth, name: check.truth[name] * (1 + 1e-4)}
        assert check(off)[0].startswith(f"wrong: {name}")
    check = runner.Check.of(decode, inputs)
    path = torch.zeros(3, 8, dtype=torch.int64)
    assert check(path.masked_fill(~inputs["mask"], -1))[0].startswith("wrong: path score")
    assert check([[0] * 3] * 3)[0].startswith("wrong")
