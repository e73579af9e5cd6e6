"""What users install: sdist, wheels with and without a compiler, the editable tree; and a build under sanitizers."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import importlib, importlib.util, sys
assert importlib.util.find_spec("kernels") is None, "kernels must never be installed under that name"
import pyseq
from pyseq import ops
assert not {"numba", "triton", "matplotlib"} & set(sys.modules), "import pyseq must stay light"
from pyseq.ops._backend import rooms
assert rooms()
served = {importlib.import_module(f"pyseq.testing.{room}").smoke() for room in rooms()}
print(",".join(sorted(served)), pyseq.__file__)
"""
REFUSED = f"""
sys.path.insert(0, {str(ROOT)!r})
try:
    import kernels
except ImportError as error:
    print(error)
"""
SERVED = """
import pyseq, pyseq.ops
from pyseq.ops._backend import environment, rooms
found = {backend for backend in ("cpp", "numba") for room in rooms() if not environment(room, backend, "cpu")}
print(",".join(found), pyseq.__file__)
"""


def run(*command: str, cwd: Path, **extra: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYSEQ_")} | extra
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (archive,) = out.glob("pyseq-*.tar.gz")
    return archive


def install(python: str, sdist: Path, folder: Path, **extra: str) -> Path:
    """A wheel built from the sdist, unpacked as an installer would; returns the folder to put on the path."""
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist))
    run(python, *build, cwd=folder, **extra)
    (wheel,) = folder.glob("pyseq-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(
    ("compiler", "what", "served"),
    [
        pytest.param(False, SERVED, "numba", id="none"),
        pytest.param(False, SMOKE, "numba", id="none, called", marks=pytest.mark.slow),
        pytest.param(True, SMOKE, "cpp", id="one", marks=pytest.mark.slow),
    ],
)
def test_wheel_with_and_without_a_compiler(compiler: bool, what: str, served: str, sdist: Path, tmp_path: Path) -> None:
    site = install(sys.executable, sdist, tmp_path, PYSEQ_NO_EXT="0" if compiler else "1")
    assert len([*(site / "pyseq").glob("_C*")]) == compiler
    assert (site / "pyseq" / "py.typed").exists()
    for source in (ROOT / "kernels").glob("*/*.py"):
        assert (site / "pyseq" / "kernels" / source.relative_to(ROOT / "kernels")).exists()
    alone = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); {alone}\n{what}"
    found, path = run(sys.executable, "-c", code, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")).split()
    assert found == served
    assert Path(path).is_relative_to(site)


def test_editable_install_and_the_name_of_the_source_folder(tmp_path: Path) -> None:
    served, refused = run(sys.executable, "-c", SMOKE + REFUSED, cwd=tmp_path).splitlines()
    chosen, path = served.split()
    assert chosen == "cpp"
    assert Path(path).is_relative_to(ROOT)
    assert "import pyseq.kernels instead" in refused


def interpreters() -> list[str]:
    """Other CPython minors within reach: on the path, or beside this interpreter's own installation."""
    beside = Path(sysconfig.get_config_var("prefix")).parent
    places = [*map(Path, os.environ["PATH"].split(os.pathsep)), *beside.glob("3.*/bin")]
    wanted = [place / f"python3.{minor}" for minor in (10, 12, 13) for place in places]
    return [*{path.name: str(path) for path in wanted if path.exists()}.values()]  # the last of each


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
def test_builds_and_compiles_under_other_interpreters(python: str, sdist: Path, tmp_path: Path) -> None:
    run(python, "-m", "venv", "venv", cwd=tmp_path)
    inner = str(tmp_path / "venv" / "bin" / "python")
    run(inner, "-m", "pip", "install", "--quiet", "setuptools>=77", "wheel", "pybind11", cwd=tmp_path)
    site = install(inner, sdist, tmp_path)
    run(inner, "-W", "error", "-m", "compileall", "-q", "site", cwd=tmp_path)
    (extension,) = (site / "pyseq").glob("_C*")
    load = (
        f"import importlib.util as u; s = u.spec_from_file_location('_C', {str(extension)!r});"
        "c = u.module_from_spec(s); s.loader.exec_module(c); print(c.cpu_level())"
    )
    assert int(run(inner, "-c", load, cwd=tmp_path)) >= 2


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
    run(sys.executable, *install, cwd=tmp_path, CXXFLAGS=flags, LDFLAGS=flags)
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    options |= {"PYTHONPATH": str(site)}
    seen = run(sys.executable, "-c", "import torch, pyseq._C as c; print(c.__file__)", cwd=tmp_path, **options)
    built = Path(seen.strip())
    assert built.is_relative_to(site)
    assert b"__asan_report_load4" in built.read_bytes()
    assert b"__ubsan_handle_add_overflow_abort" in built.read_bytes()
    tests = [str(ROOT / "tests" / name) for name in ("ops", "nn", "test_extension.py")]
    words = ("-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "cpp or memory or nn or extension")
    said = run(sys.executable, "-m", "pytest", *words, *tests, cwd=tmp_path, **options)
    assert "passed" in said.splitlines()[-1]
