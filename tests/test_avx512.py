"""The AVX-512 kernels where the CPU has none: their intrinsics emulated, the rest of their code as it is shipped."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = Path(__file__).with_name("emulated_avx512.hpp")
LEVEL_4 = """
#pragma GCC target("avx2,fma,bmi,bmi2")
#define PYSEQ_LEVEL 4
#include "emulated_avx512.hpp"
#include "chain_kernel.hpp"
PYSEQ_CHAIN_LEVEL(v4)
"""
CPU = """
#include "cpu.hpp"
int pyseq::cpu_level(int wanted) { return wanted >= 2 && wanted < 4 ? wanted : 4; }
"""


def run(*command: str, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_conformance_of_emulated_kernels(tmp_path: Path) -> None:
    if (level := importlib.import_module("pyseq._C").cpu_level()) != 3:
        pytest.skip(f"the machine's level is {level}: at 4 the suite itself runs them, below 3 the emulation does not")
    tree = tmp_path / "tree"
    for name in ("pyseq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(EMULATION, tree / "csrc")
    (tree / "csrc" / "chain_v4.cpp").write_text(LEVEL_4)
    (tree / "csrc" / "cpu.cpp").write_text(CPU)
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "site", str(tree))
    run(sys.executable, *install, cwd=tmp_path, path=tmp_path)
    site = tmp_path / "site"
    seen = run(
        sys.executable, "-c", "from pyseq import _C; print(_C.cpu_level(), _C.__file__)", cwd=tmp_path, path=site
    )
    assert seen.split()[0] == "4"
    assert Path(seen.split()[1]).is_relative_to(site)
    suite = [str(ROOT / "tests" / name) for name in ("ops", "nn")]
    told = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpp or nn",
        *suite,
        cwd=tmp_path,
        path=site,
    )
    assert "passed" in told.splitlines()[-1]
