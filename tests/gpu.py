"""What a machine with a GPU can tell in five minutes: build, a case for each kernel, the GPU suite, the bench.

Runs with the python3 that has torch and triton there, without a network; uses pytest, hypothesis and pytest-xdist where
they are. The most valuable steps come first, each gets what time is left and is stopped with its children; what it says
is in $OUT, or build/gpu, as it goes, and a summary comes last. Exits with 1 if a kernel was wrong or a step failed,
with 2 where there is no GPU. Rooms offer their cases in `pyseq.testing.<room>.cases(device)`.
"""

import argparse
import contextlib
import csv
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / os.environ.get("OUT", "build/gpu")
SECONDS = 285.0  # of five minutes, for all steps
LINES = 40
MACHINE = """
import platform, sys, numpy, torch, triton
print("Python", platform.python_version(), *(f"{x.__name__} {x.__version__}" for x in (torch, triton, numpy)))
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(", ".join(gpus) or "no GPU: torch sees no CUDA device")
sys.exit(0 if gpus else 2)
"""
OUTCOMES = "PASSED|SKIPPED|FAILED|ERROR"
OUTCOME = re.compile(rf"\[gw\d+\] \[[ \d]+%\] ({OUTCOMES}) |tests/\S+::.* ({OUTCOMES})\b")  # with xdist, and without


class Steps:
    """Runs commands one after the other, or some at once, until the time is up."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.end = environment, time.monotonic() + SECONDS
        self.said: list[str] = []  # a line a step

    def run(self, name: str, *commands: list[str], most: float = SECONDS, keep: float = 0.0, **also: str) -> int | None:
        """The largest exit status; None if the step was stopped. most, keep: seconds for it and for later steps; also:
        more of the environment."""
        log, start, stopped = OUT / f"{name}.txt", time.monotonic(), False
        until = min(start + most, self.end - keep)
        if until < start + 5:
            self.said.append(f"{name}: left out, no time")
            return None
        print(f"== {name}: at most {until - start:.0f} s", flush=True)
        with log.open("ab") as file, log.open(errors="replace") as reader, contextlib.ExitStack() as stack:
            how: dict[str, Any] = {"cwd": ROOT, "env": self.environment | also, "start_new_session": True}
            how |= {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            processes: list[subprocess.Popen[bytes]] = []
            for command in commands:
                processes.append(subprocess.Popen(command, **how))
                stack.callback(kill, processes[-1])
            while any(process.poll() is None for process in processes) and time.monotonic() < until + 5:
                if time.monotonic() > until and not stopped:
                    stopped = True
                    for process in processes:
                        process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
                time.sleep(0.1)
                print(reader.read(), end="", flush=True)
            print(reader.read(), end="", flush=True)
            status = None if stopped else max(abs(process.returncode) for process in processes)
        last = (text_of(f"{name}.txt").strip().splitlines() or [""])[-1]
        ended = "stopped" if status is None else "ok" if status == 0 else f"exit status {status}, {last[:100]!r},"
        self.said.append(f"{name}: {ended} after {time.monotonic() - start:.0f} s")
        return status


def kill(process: "subprocess.Popen[bytes]") -> None:
    """With all its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(rooms: list[str], device: str, first: int, shares: int) -> None:
    """Every so manieth case of the rooms, a line each. An error of the device ends a process: another one goes on."""
    import pyseq.ops  # noqa: F401  (defines the rooms)
    from pyseq.ops._backend import rooms as all_rooms

    every = [
        (f"{room} {name}", call)
        for room in rooms or all_rooms()
        for name, call in importlib.import_module(f"pyseq.testing.{room}").cases(device)
    ]
    if first < shares:
        print(f"CASES {len(every[first::shares])}", flush=True)
    for index in range(first, len(every), shares):
        name, call = every[index]
        print(f"START {name}", flush=True)
        start = time.monotonic()
        try:
            call()
            print(f"RIGHT {name} ({time.monotonic() - start:.1f} s)", flush=True)
        except AssertionError as error:
            print(f"WRONG {name}: {first_line(error)}", flush=True)
        except Exception as error:
            print(f"BROKE {name}: {type(error).__name__}: {first_line(error)}", flush=True)
            again = [__file__, *rooms, "--check", device, "--share", f"{index + shares}/{shares}"]
            os.execv(sys.executable, [sys.executable, *again])


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def checked() -> tuple[str, list[str]]:
    """What the check has said: a line, and what went wrong."""
    said: dict[str, list[str]] = {word: [] for word in ("CASES", "START", "RIGHT", "WRONG", "BROKE")}
    for line in text_of("check.txt").splitlines():
        said.get(line[:5], []).append(line[6:])
    ended = [re.split(r": | \(", line)[0] for word in ("RIGHT", "WRONG", "BROKE") for line in said[word]]
    bad = [f"{word.lower()}: {line}" for word in ("WRONG", "BROKE") for line in said[word]]
    bad += [f"did not end: {name}" for name in said["START"] if name not in ended]
    right, total = len(said["RIGHT"]), sum(map(int, said["CASES"]))
    if right + len(bad) < total:
        bad.append(f"never begun: {total - right - len(bad)}")
    return f"{right} of {total} kernel cases right", bad


def tested() -> tuple[str, list[str]]:
    """What pytest has said, also if it was stopped."""
    counts, bad, total = dict.fromkeys(OUTCOMES.split("|"), 0), [], ""
    for line in text_of("suite.txt").splitlines():
        if m := OUTCOME.match(line):
            counts[m[1] or m[2]] += 1
        elif re.match(r"(FAILED|ERROR) tests/", line):
            bad.append(line)
        elif m := re.match(r"=+ (\d+ .*|no tests ran) in [\d.]+s", line):
            total = m[1]
    return total or ", ".join(f"{n} {word.lower()}" for word, n in counts.items() if n), bad


def timed() -> list[str]:
    """Rows of ours, then of others."""
    rows = sorted(csv.DictReader(text_of("bench.csv").splitlines()), key=lambda row: row["ours"] != "True")
    return [
        f"{row['room']} {row['mode']} {row['workload']} {row['provider']}: "
        + (f"{float(row['median']) * 1e3:.3f} ms" if row["median"] else row["status"])
        + (f", {float(row['ratio']):.3g}x {row['baseline']}" if row["ratio"] else "")
        for row in rows
    ]


def text_of(name: str) -> str:
    path = OUT / name
    return path.read_text(errors="replace") if path.exists() else ""


def clipped(lines: list[str], most: int) -> list[str]:
    rest = len(lines) - most
    return [f"  {line[:180]}" for line in lines[:most]] + [f"  and {rest} more"] * (rest > 0)


def run(rooms: list[str], rehearse: bool) -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.*"):
        old.unlink()
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PIP_CONSTRAINT")}
    steps = Steps(environment | ({"TRITON_INTERPRET": "1"} if rehearse else {}))
    python, device, cpus = sys.executable, "cpu" if rehearse else "cuda", os.cpu_count() or 1
    jobs = max(min(8, cpus // 2), 1)
    threads = str(max(cpus // jobs, 1))

    status = steps.run("machine", [python, "-c", MACHINE], most=90)
    machine = text_of("machine.txt").strip().splitlines()[-2:]
    if status != 0 and not rehearse:
        print(f"make gpu stops here: {machine[-1] if machine else 'the machine does not answer'}")
        return 2

    install = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    built = steps.run("build", install, most=120, PYSEQ_BUILD_JOBS=str(cpus))
    if built != 0:  # the GPU needs no C++
        built = steps.run("build", install, most=40, PYSEQ_NO_EXT="1")

    check = [python, __file__, *rooms, "--check", device, "--share"]
    right = steps.run("check", *([*check, f"{i}/{jobs}"] for i in range(jobs)), most=100, OMP_NUM_THREADS=threads)

    suite_status: int | None = 0
    if missing := [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]:
        steps.said.append(f"suite: left out, {' and '.join(missing)} missing")
    else:
        suite = [python, "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "--continue-on-collection-errors"]
        suite += ["-W", "default", "-p", "no:cacheprovider"]  # other releases than the pinned ones have other warnings
        suite += ["-p", "xdist", "-n", str(jobs)] if jobs > 1 and importlib.util.find_spec("xdist") else []
        words = [f"({' or '.join(rooms)})"] * bool(rooms) + ["triton"] * rehearse
        suite += ["-k", " and ".join(words)] * bool(words) + ["-m", "gpu and not slow"] * (not rehearse)
        suite_status = steps.run("suite", suite, keep=60, OMP_NUM_THREADS=threads, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    bench = [python, "bench", *rooms, "--device", device, "--quick", "--csv", str(OUT / "bench.csv")]
    bench_status = steps.run("bench", bench, TRITON_INTERPRET="0")

    (cases, wrong), (passed, failed) = checked(), tested()
    red = [line for line in text_of("bench.txt").splitlines() if line.startswith("RED ")]
    lines = [*machine, *steps.said, cases, *clipped(wrong, 8), f"tests: {passed or 'none'}", *clipped(failed, 6)]
    lines += clipped(red, 4)
    lines += [*clipped(timed(), LINES - len(lines) - 2), f"all of it: {OUT}"]
    (OUT / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))
    stopped_at_worst = all(status in (0, None) for status in (suite_status, bench_status))
    return int(built != 0 or right != 0 or bool(wrong) or not stopped_at_worst)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", nargs="*", help="rooms to look at; all by default")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, by Triton's interpreter: does it all run?")
    parser.add_argument("--check", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        check(args.room, args.check, *map(int, args.share.split("/")))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(args.room, args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
