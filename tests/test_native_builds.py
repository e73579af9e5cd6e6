"""The suite over a build of the C++ under the sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, path: Path, **extra: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), **extra}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return done.stdout


@pytest.mark.slow
def test_sanitized(tmp_path: Path) -> None:
    """No access out of bounds or after a free, and nothing that C++ leaves undefined, in any test of the suite."""
    names = ("libasan", "libubsan", "libstdc++")
    runtimes = [subprocess.check_output(["g++", f"-print-file-name={x}.so"], text=True).strip() for x in names]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("g++ has no sanitizers here")
    tree, site = tmp_path / "tree", tmp_path / "site"
    for name in ("pyseq", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-wrapv"  # some Pythons wrap, some do not
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(tree))
    run(sys.executable, *install, cwd=tmp_path, path=tmp_path, CXXFLAGS=flags, LDFLAGS=flags)
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    seen = run(
        sys.executable, "-c", "import torch, pyseq._C as c; print(c.__file__)", cwd=tmp_path, path=site, **options
    )
    built = Path(seen.strip())
    assert built.is_relative_to(site)
    assert b"__asan_report_load4" in built.read_bytes()
    assert b"__ubsan_handle_add_overflow_abort" in built.read_bytes()
    tests = [str(ROOT / "tests" / name) for name in ("ops", "nn", "test_extension.py")]
    words = ("-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "cpp or memory or nn or extension")
    said = run(sys.executable, "-m", "pytest", *words, *tests, cwd=tmp_path, path=site, **options)
    assert "passed" in said.splitlines()[-1]
