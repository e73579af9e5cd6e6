"""What the machine can do and what a call may use: FMA peak, copy bandwidth, memory, caps, the machine's name."""

import contextlib
import ctypes
import gc
import importlib
import itertools
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pyseq.info import cpu_name, version

STATUS = Path("/proc/self/status")


def fma_peak(device: str, seconds: float) -> float:
    """float32 multiply-adds per second, at torch's number of threads."""
    if (compiled := _compiled(device)) is not None:
        return float(compiled.fma_peak(torch.get_num_threads(), seconds))
    size = 512 if device == "cpu" else 4096
    a, b = torch.ones(2, size, size, device=device)
    return size**3 / min(time_block(lambda: a @ b, device, seconds, least=2))


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read plus written per second between buffers past the last-level cache."""
    if (compiled := _compiled(device)) is not None:
        return float(compiled.copy_bandwidth(torch.get_num_threads(), seconds))
    a, b = _buffers(device)
    return 2 * a.nbytes / min(time_block(lambda: b.copy_(a), device, seconds, least=2))


def limit_source(device: str) -> str:
    return "torch sgemm and copy_" if _compiled(device) is None else "pyseq._C"


@cache
def _compiled(device: str) -> Any:
    try:
        return importlib.import_module("pyseq._C") if device == "cpu" else None
    except ImportError:
        return None


@cache
def _buffers(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    size = 1 << (24 if device == "cpu" else 28)  # 64 MiB and 1 GiB
    return torch.zeros(size, device=device), torch.ones(size, device=device)


def time_block(call: Callable[[], Any], device: str, seconds: float, least: int = 1) -> list[float]:
    """Seconds of each call, repeated for at least `seconds` and at least `least` times; on the GPU the time between
    events, with the host running ahead."""
    begin = time.perf_counter()
    if device == "cpu":
        times: list[float] = []
        now = begin
        while len(times) < least or now - begin < seconds:
            before = time.perf_counter()
            call()
            now = time.perf_counter()
            times.append(now - before)
        return times
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    while len(events) <= least or time.perf_counter() - begin < seconds:
        call()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if len(events) % 64 == 0:  # else a fast launcher queues far more than `seconds` of work
            events[-1].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that one call needs at its height beyond what was there before, its results included.

    On the CPU the growth of the resident set to its high-water mark, reset before the call, after free heap pages were
    given back to the system: it sees every allocator (torch, C++, NumPy), to about 0.3 MB; None without Linux or glibc.
    On CUDA torch's own counter.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    except (OSError, AttributeError):
        call()
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def caps(seconds: float, memory: int, device: str) -> Iterator[None]:
    """Raise TimeoutError past `seconds`; let allocations past `memory` bytes more than now fail.

    The alarm is heard when Python runs again, so a single long C call ends late. Memory is capped for the CPU on Linux.
    """

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"over {seconds:g} s a call")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if STATUS.exists() and device == "cpu":
        ceiling = _status("VmSize") + memory
        resource.setrlimit(resource.RLIMIT_AS, (ceiling if hard < 0 else min(ceiling, hard), hard))
    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def machine(device: str) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    cpus = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPUs"
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {cpus}",
        "isa": f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numba": version("numba"),
        "commit": _commit(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


@cache
def _commit() -> str:
    """Short hash, with a plus where a tracked source differs from it."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "pyseq", "kernels", "csrc", "bench/*.py").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        print("no git commit to name in the results", file=sys.stderr)
        return ""
