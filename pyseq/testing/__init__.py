"""What the tests of all rooms share: comparison within a budget, guard bands, and launchers replaced for a while.

Problems, oracles and budgets of a room are in the module of its name. Nothing here is needed to use pyseq.
"""

import contextlib
import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyseq.kernels import _cpu
from pyseq.ops._backend import launcher

Array = np.ndarray[Any, Any]


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_within(what: str, actual: Tensor, expected: Array, budget: Array | float) -> None:
    """Equal where not finite, else within the budget; says the worst element, its place and the share that fails."""
    got = actual.detach().cpu().double().numpy()
    assert got.shape == expected.shape, f"{what}: shape {got.shape} for {expected.shape}"
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, abs(got - expected))
        excess = np.where(same, 0, error - budget)
    bad = ~(excess <= 0)
    if bad.any():
        at = np.unravel_index(np.where(np.isnan(excess), np.inf, excess).argmax(), excess.shape)
        room = float(np.broadcast_to(np.asarray(budget), excess.shape)[at])
        raise AssertionError(
            f"{what}{list(map(int, at))}: got {got[at]!r} for {float(expected[at])!r}, off by {float(error[at]):.3g} "
            f"with a budget of {room:.3g}; {bad.mean():.1%} of elements fail"
        )


@contextlib.contextmanager
def launches(room: str, backend: str, wrap: Callable[..., Any]) -> Iterator[None]:
    """Each launcher of a room's backend replaced by wrap(launcher)."""
    module = launcher(room, backend)
    before = {name: getattr(module, name) for name in module.__all__}
    for name, launch in before.items():
        setattr(module, name, wrap(launch))
    try:
        yield
    finally:
        for name, launch in before.items():
            setattr(module, name, launch)


@contextlib.contextmanager
def statuses(room: str, backend: str) -> Iterator[list[int]]:
    """What the launches in the block answered."""
    found: list[int] = []

    def wrap(launch: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(launch)
        def recording(*args: Any, **options: Any) -> int:
            found.append(launch(*args, **options))
            return found[-1]

        return recording

    with launches(room, backend, wrap):
        yield found


@contextlib.contextmanager
def cpu_level(level: int) -> Iterator[None]:
    """C++ kernels held to an instruction set level, at most what the CPU has; 0: the best."""
    before, _cpu.LEVEL = _cpu.LEVEL, level
    try:
        yield
    finally:
        _cpu.LEVEL = before


@contextlib.contextmanager
def guarded(room: str, backend: str) -> Iterator[Iterator[int]]:
    """Every tensor of a launch in the block lies between guard bands; counts the launches."""
    count = itertools.count()

    def wrap(launch: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(launch)
        def guarding(*args: Any) -> int:
            guard = Guarded()

            def enclose(x: Any) -> Any:
                if isinstance(x, (list, tuple)):
                    inner = [enclose(y) for y in x]
                    return x._make(inner) if hasattr(x, "_make") else inner
                return guard(x) if isinstance(x, Tensor) else x

            def copy_back(to: Any, found: Any) -> None:
                if isinstance(to, Tensor):
                    to.copy_(found)
                elif isinstance(to, (list, tuple)):
                    for x, y in zip(to, found, strict=True):
                        copy_back(x, y)

            inner = enclose(args)
            status = launch(*inner)
            guard.check()
            copy_back(args[1:], inner[1:])  # the first are the inputs
            next(count)
            return status

        return guarding

    with launches(room, backend, wrap):
        yield count


def script(text: str, **environ: str) -> str:
    """Standard output of a fresh interpreter with warnings as errors, without our switches but those given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYSEQ_", "TRITON_"))}
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=kept | environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def pairwise(cases: Iterable[Any], options: Iterable[Any], every: int = 6) -> list[Any]:
    """Parameters (case, option) of a test: all cases with the first option, with the others each sixth, every option at
    other ones. The rest of the product is marked slow."""
    import pytest

    return [
        pytest.param(case, option, marks=() if j == 0 or (i + j) % every == 0 else pytest.mark.slow)
        for i, case in enumerate(cases)
        for j, option in enumerate(options)
    ]


class Guarded:
    """Tensors that are slices of larger ones; the elements around them hold NaN, or 77 for integers and bools."""

    def __init__(self, width: int = 67) -> None:
        self.width = width
        self.bands: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """A contiguous copy of x between two bands."""
        width, byte = self.width, x.dtype == torch.bool
        filler = math.nan if x.is_floating_point() else 77
        flat = torch.full((x.numel() + 2 * width,), filler, dtype=torch.uint8 if byte else x.dtype, device=x.device)
        self.bands += [flat[:width], flat[width + x.numel() :]]
        inner = flat[width : width + x.numel()]
        inner = inner.view(torch.bool) if byte else inner
        return inner.copy_(x.reshape(-1)).view(x.shape)

    def check(self) -> None:
        for band in self.bands:
            intact = band.isnan() if band.is_floating_point() else band == 77
            assert intact.all(), f"written past a buffer, {int((~intact).sum())} elements away from it"
