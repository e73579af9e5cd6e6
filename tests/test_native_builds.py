"""The suite over other builds of the C++: AVX-512 emulated where the CPU has none, and under the sanitizers."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = Path(__file__).with_name("emulated_avx512.hpp")
CPU = """
#include "cpu.hpp"
int pyseq::cpu_level(int wanted) { return wanted >= 2 && wanted < 4 ? wanted : 4; }
"""


def run(*command: str, cwd: Path, path: Path, **extra: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), **extra}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return done.stdout


def copy_of_the_source(tree: Path) -> None:
    for name in ("pyseq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)


def check(tree: Path, level: int, build: dict[str, str], suite: dict[str, str]) -> None:
    """Build the tree, see that it is what gets imported, and run the tests of the C++ backend over it."""
    cwd, site = tree.parent, tree.parent / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "site", str(tree))
    run(sys.executable, *install, cwd=cwd, path=cwd, **build)
    script = "import torch; from pyseq import _C; print(_C.cpu_level(), _C.__file__)"
    seen = run(sys.executable, "-c", script, cwd=cwd, path=site, **suite)
    assert seen.split()[0] == str(level)
    assert Path(seen.split()[1]).is_relative_to(site)
    names = [str(ROOT / "tests" / name) for name in ("ops", "nn", "test_extension.py")]
    pytest_ = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-k",
        "cpp or memory or nn or extension",
        *names,
    )
    assert "passed" in run(sys.executable, *pytest_, cwd=cwd, path=site, **suite).splitlines()[-1]


@pytest.mark.slow
def test_emulated_avx512(tmp_path: Path) -> None:
    if (level := importlib.import_module("pyseq._C").cpu_level()) != 3:
        pytest.skip(f"the machine's level is {level}: at 4 the suite itself runs them, below 3 the emulation does not")
    tree = tmp_path / "tree"
    copy_of_the_source(tree)
    shutil.copy(EMULATION, tree / "csrc")
    for source in (tree / "csrc").glob("*/v4.cpp"):
        text = re.sub("avx512[a-z]*,", "", source.read_text())
        source.write_text(
            text.replace("#define PYSEQ_LEVEL 4\n", '#define PYSEQ_LEVEL 4\n#include "emulated_avx512.hpp"\n')
        )
    (tree / "csrc" / "cpu.cpp").write_text(CPU)
    check(tree, 4, {}, {})


@pytest.mark.slow
def test_sanitized(tmp_path: Path) -> None:
    """No access out of bounds or after a free, and nothing that C++ leaves undefined, in any test of the suite."""
    level = importlib.import_module("pyseq._C").cpu_level()
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv"  # some Pythons wrap, some do not
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan", "libstdc++")
    ]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("g++ has no sanitizers here")
    tree = tmp_path / "tree"
    copy_of_the_source(tree)
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    check(tree, level, {"CXXFLAGS": flags, "LDFLAGS": flags}, options)
    built = next((tmp_path / "site" / "pyseq").glob("_C*")).read_bytes()
    assert b"__asan_report_load4" in built
    assert b"__ubsan_handle_add_overflow_abort" in built
