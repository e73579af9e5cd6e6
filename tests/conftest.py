import functools
import getpass
import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported
os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"pyseq-numba-{getpass.getuser()}"))

from pyseq.kernels.common import NLL, PARTITION, SCORE
from pyseq.ops._backend import BACKENDS, ROOMS
from pyseq.testing import launches


class Target(NamedTuple):
    """Who serves: a backend, the instruction set level it is held to (0: the machine's best), a device."""

    backend: str
    level: int = 0
    device: str = "cpu"

    @property
    def interpreted(self) -> bool:
        """Triton without a GPU: several milliseconds a program and step, so small problems only."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def kinds(self) -> tuple[int, ...]:
        return (NLL,) if self.interpreted else (PARTITION, NLL, SCORE)  # it is both others in one

    def spare(self, steps: int, most: int = 9) -> None:
        if self.interpreted and steps > most:
            pytest.skip(f"{steps} steps are too many for triton's interpreter")


def targets() -> Iterator[Any]:
    for backend in BACKENDS:
        yield pytest.param(Target(backend), id=backend)
        if backend == "cpp":
            for level in (3, 2):
                yield pytest.param(Target(backend, level), id=f"cpp-v{level}")
    for backend in ("reference", "triton"):
        yield pytest.param(Target(backend, device="cuda"), id=f"{backend}-cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend on every device; a launcher's `level` argument is set behind the public ops."""
    chosen: Target = request.param
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reasons := ROOMS["chain"].reasons(chosen.backend, torch.empty(1, 1, 1, device=chosen.device)):
        pytest.skip("; ".join(reasons))
    if not chosen.level:
        yield chosen
        return
    level = importlib.import_module("pyseq._C").cpu_level()
    if level <= chosen.level:
        pytest.skip(f"the machine's level is {level}: cpp itself runs it")
    with launches("chain", "cpp", lambda launch: functools.partial(launch, level=chosen.level)):
        yield chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory holds NaN, or the largest integer: fill_uninitialized_memory is on by default."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
