"""Ahead-of-time compilation of Triton kernels, and what the binaries use; no GPU, TRITON_INTERPRET unset.

`record` runs a launcher on tensors of any device and catches its launches: what is compiled is what is launched.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pyseq.ops._backend import OLDEST_TRITON_FOR_AMD

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 131072}  # 32-bit, one program's share at most
SPILL = 8  # bytes a thread: two registers, once, are no matter
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes, opt-in limit

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Binary(NamedTuple):
    """What a room's `binaries(quick)` yields: a call of its Triton launchers, on tensors of any device, also "meta".

    labels: what tells the call from others, such as {"dtype": "float32", "K": 9}. module: where the launchers find
    their kernels.
    """

    labels: dict[str, str | int]
    module: ModuleType
    call: Callable[[], object]


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    args: dict[str, Any]
    options: dict[str, Any]


class Usage(NamedTuple):
    """What one binary uses: registers a thread, shared memory a program.

    spill: what goes through memory: bytes of stack on NVIDIA, spilled vector registers plus private bytes on AMD.
    scalar_spill: scalar registers that AMD's compiler keeps in lanes of vector registers, which touches no memory.
    """

    num_warps: int
    registers: int
    spill: int
    scalar_spill: int
    shared: int


def record(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The kernel launches that `call` makes through kernels of `module`, in order; none of them runs."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.launch

        def launch(self, *args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            bound = dict(zip(names, args, strict=False))
            bound.update((k, v) for k, v in kwargs.items() if k in names)
            launches.append(Launch(self.kernel, bound, {k: v for k, v in kwargs.items() if k not in names}))

    with contextlib.ExitStack() as undo:
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                undo.callback(setattr, module, name, kernel)
                setattr(module, name, Recorder(kernel))
        call()
    return launches


def serves(target: str) -> bool:
    """Whether this release of Triton compiles pyseq's kernels for one of TARGETS."""
    import triton

    release = tuple(map(int, triton.__version__.split(".")[:2]))
    return target.startswith("sm_") or release >= OLDEST_TRITON_FOR_AMD


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel of a launch for one of TARGETS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *_signature(launch))
    if target.startswith("sm_"):
        where = GPUTarget("cuda", int(target[3:]), 32)
    else:
        where = GPUTarget("hip", target, 64)
    return triton.compile(source, target=where, options=launch.options)


def binary_of(launch: Launch) -> str:
    """The same for launches that one binary serves."""
    return repr((launch.kernel.__name__, _signature(launch), launch.options))


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types of arguments, values of constants, and what is promised of pointers."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constants, attributes


def recompiled_by(a: Launch, b: Launch) -> list[str]:
    """Arguments for whose sake Triton compiles two launches of a kernel apart."""
    assert a.kernel is b.kernel
    found = [k for k in a.options if a.options[k] != b.options[k]]
    for parameter in a.kernel.params:
        x, y = a.args[parameter.name], b.args[parameter.name]
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            aligned = parameter.do_not_specialize_on_alignment or x.data_ptr() % 16 == y.data_ptr() % 16
            same = x.dtype == y.dtype and aligned
        elif parameter.is_constexpr or not isinstance(x, int) or not isinstance(y, int):
            same = x == y or (isinstance(x, float) and isinstance(y, float))
        else:  # Triton makes variants for 1 and for multiples of 16
            same = parameter.do_not_specialize or ((x == 1) == (y == 1) and (x % 16 == 0) == (y % 16 == 0))
        if not same:
            found.append(parameter.name)
    return found


def usage(compiled: Any) -> Usage:
    """Registers a thread, spills and shared memory of a compiled kernel."""
    meta = compiled.metadata
    if "cubin" in compiled.asm:
        text = _dump(compiled.asm["cubin"])
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
        return Usage(meta.num_warps, registers, stack + local, 0, meta.shared)
    text = compiled.asm["amdgcn"]
    keys = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = [int(m[1]) if (m := re.search(rf"\.{key}:\s*(\d+)", text)) else 0 for key in keys]
    vector, accumulator, spilled, scalar_spill, private = found
    if not vector:
        raise ValueError(
            f"{meta.name} uses no vector register on {meta.target.arch}: undefined behaviour was folded away"
        )
    return Usage(meta.num_warps, vector + accumulator, spilled + private, scalar_spill, meta.shared)


def _dump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout


def excess(target: str, use: Usage) -> Iterator[str]:
    """What of a binary breaks a limit: spills, the register file, shared memory."""
    width = 64 if target.startswith("gfx") else 32
    if use.spill > SPILL:
        yield f"spills {use.spill} bytes"
    if use.registers * width * use.num_warps > REGISTERS[target]:
        yield f"{use.registers} registers on {use.num_warps} warps"
    if use.shared > SHARED[target]:
        yield f"{use.shared} bytes of shared memory"
