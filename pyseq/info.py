"""`python -m pyseq.info`: versions, devices, which backend serves which op, or why not. For bug reports."""

import importlib
import importlib.metadata
import platform
import sys

import torch

import pyseq.ops  # noqa: F401  (defines the rooms)
from pyseq import __version__
from pyseq.ops._backend import ROOMS, explain

_LEVELS = {4: "AVX-512", 3: "AVX2 with FMA", 2: "the platform's baseline"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _level() -> str:
    try:
        _C = importlib.import_module("pyseq._C")
    except ImportError:
        return "the extension is missing"
    return f"kernels use {_LEVELS[_C.cpu_level()]}"


def report() -> str:
    """The whole report as text."""
    lines = [f"pyseq {__version__}, Python {sys.version.split()[0]}, {platform.system()} {platform.machine()}"]
    lines += [", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numba", "numpy"))]
    lines += [f"cpu   {_cpu()}, {torch.get_num_threads()} threads, {_level()}"]
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        lines.append(f"cuda  {torch.cuda.get_device_name(index)}")
        devices = ["cpu", "cuda"]
    for device in devices:
        for room in ROOMS.values():
            lines += ["", f"{room.name} on {device}: {', '.join(op.__name__ for op in room.ops)}"]
            lines += [
                "  " + line for line in str(explain(room.ops[0], torch.zeros(1, 1, 1, device=device))).splitlines()
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
