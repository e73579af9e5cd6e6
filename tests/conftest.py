import contextlib
import getpass
import importlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported, and Triton's own
    with contextlib.suppress(ImportError):
        importlib.import_module("triton.language")
os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"pyseq-numba-{getpass.getuser()}"))

import pyseq.ops  # noqa: F401  (defines the rooms)
from pyseq.ops._backend import BACKENDS, environment, rooms
from pyseq.testing import cpu_level


class Target(NamedTuple):
    """Who serves: a backend, the instruction set level it is held to (0: the machine's best), a device."""

    backend: str
    level: int = 0
    device: str = "cpu"

    @property
    def interpreted(self) -> bool:
        """Triton without a GPU: several milliseconds a program and step, so small problems only."""
        return self.backend == "triton" and self.device == "cpu"

    def spare(self, steps: int, most: int = 6) -> None:
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
    """Every backend on every device, C++ at every instruction set level that the machine has."""
    chosen: Target = request.param
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reasons := environment(next(iter(rooms())), chosen.backend, chosen.device):
        pytest.skip("; ".join(reasons))
    if chosen.level and (level := importlib.import_module("pyseq._C").cpu_level()) <= chosen.level:
        pytest.skip(f"the machine's level is {level}: cpp itself runs it")
    with cpu_level(chosen.level):
        yield chosen


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Forced instruction set levels are slow, but for tests marked `levels`; with a condition on the parameters,
    there."""
    for item in items:
        item.extra_keyword_matches.add(getattr(getattr(item, "module", None), "ROOM", ""))  # for make test ROOM=
        params = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(params.get("target"), Target) and params["target"].level:
            mark = item.get_closest_marker("levels")
            if mark is None or not mark.kwargs.get("where", bool)(params):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what is so small that a second thread waits more than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory holds NaN, or the largest integer: fill_uninitialized_memory is on by default."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def transformers() -> Iterator[Callable[[str], Any]]:
    """Import what uses transformers, which looks for a package that the repository's `kernels` is not."""
    root = Path(__file__).resolve().parents[1]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != root])
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="pip install transformers")
        yield importlib.import_module


@pytest.fixture
def on_two(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], None]:
    """Call `work(rank, folder)` of a script beside the test in two processes, both of which must succeed."""

    def run(script: str) -> None:
        start = [sys.executable, "-W", "error", str(Path(__file__).with_name("on_two.py"))]
        command = [*start, str(request.path.with_name(script)), str(tmp_path)]
        ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in errors)

    return run
