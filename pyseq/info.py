"""`python -m pyseq.info`: versions, devices, which backend serves which op, or why not. For bug reports."""

import contextlib
import importlib
import importlib.metadata
import platform
import sys

import torch

import pyseq.ops  # noqa: F401  (defines the rooms)
from pyseq import __version__
from pyseq.kernels import _cpu
from pyseq.ops._backend import explain, rooms

_LEVELS = {4: "AVX-512", 3: "AVX2 with FMA", 2: "the platform's baseline"}


def version(package: str) -> str:
    """Of a distribution; nothing where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return importlib.metadata.version(package)
    return ""


def cpu_name() -> str:
    """As the kernel of the system has it; family and model, where known, tell generations of one name apart."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name + (f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else "")


def _level() -> str:
    try:
        _C = importlib.import_module("pyseq._C")
    except ImportError:
        return "the extension is missing"
    return f"kernels use {_LEVELS[_C.cpu_level(_cpu.LEVEL)]}"


def report() -> str:
    """The whole report as text."""
    lines = [f"pyseq {__version__}, Python {sys.version.split()[0]}, {platform.system()} {platform.machine()}"]
    lines += [", ".join(f"{name} {version(name) or 'not installed'}" for name in ("torch", "triton", "numba", "numpy"))]
    lines += [f"cpu   {cpu_name()}, {torch.get_num_threads()} threads, {_level()}"]
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        lines.append(f"cuda  {torch.cuda.get_device_name(index)}")
        devices = ["cpu", "cuda"]
    for device in devices:
        for room, ops in rooms().items():
            said: dict[str, list[str]] = {}
            for op in ops:
                said.setdefault(str(explain(op, torch.zeros(1, 1, 1, device=device))), []).append(op.__name__)
            for verdict, names in said.items():
                lines += ["", f"{room} on {device}: {', '.join(names)}"]
                lines += ["  " + line for line in verdict.splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
