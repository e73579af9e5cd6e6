"""What users install: the sdist, the wheel made from it with and without a compiler, and the editable tree."""

import os
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
SERVED = """
import pyseq, pyseq.ops
from pyseq.ops._backend import environment, rooms
found = {backend for backend in ("cpp", "numba") for room in rooms() if not environment(room, backend, "cpu")}
print(",".join(found), pyseq.__file__)
"""


def run(*command: str, cwd: Path, **extra: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYSEQ_")}
    done = subprocess.run(
        command, cwd=cwd, env=environment | extra, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (archive,) = out.glob("pyseq-*.tar.gz")
    return archive


def install(sdist: Path, folder: Path, **extra: str) -> Path:
    """A wheel built from the sdist, unpacked as an installer would; returns the folder to put on the path."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(folder), str(sdist)),
        cwd=folder,
        **extra,
    )
    (wheel,) = folder.glob("pyseq-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def smoke(site: Path, folder: Path, what: str = SMOKE) -> str:
    alone = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); {alone}\n{what}"
    return run(sys.executable, "-c", code, cwd=folder, NUMBA_CACHE_DIR=str(folder / "cache"))


def test_wheel_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    site = install(sdist, tmp_path, PYSEQ_NO_EXT="1")
    assert not list((site / "pyseq").glob("_C*"))
    for source in (ROOT / "kernels").glob("*/*.py"):
        assert (site / "pyseq" / "kernels" / source.relative_to(ROOT / "kernels")).exists()
    assert (site / "pyseq" / "py.typed").exists()
    served, path = smoke(site, tmp_path, SERVED).split()
    assert served == "numba"
    assert Path(path).is_relative_to(site)


@pytest.mark.slow
def test_numba_serves_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    assert smoke(install(sdist, tmp_path, PYSEQ_NO_EXT="1"), tmp_path).split()[0] == "numba"


@pytest.mark.slow
def test_wheel_with_a_compiler_is_served_by_cpp(sdist: Path, tmp_path: Path) -> None:
    chosen, path = smoke(install(sdist, tmp_path), tmp_path).split()
    assert chosen == "cpp"
    assert Path(path).is_relative_to(tmp_path)


def test_editable_install_serves_the_tree(tmp_path: Path) -> None:
    chosen, path = run(sys.executable, "-c", SMOKE, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert chosen == "cpp"
    assert Path(path).is_relative_to(ROOT)


def test_source_folder_refuses_to_be_imported_under_its_own_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "import pyseq.kernels instead" in done.stderr


def interpreters() -> list[str]:
    """Other CPython minors within reach: on the path, or beside this interpreter's own installation."""
    beside = Path(sysconfig.get_config_var("prefix")).parent
    found = {}
    for minor in (10, 12, 13):
        places = [*map(Path, os.environ["PATH"].split(os.pathsep)), *(p / "bin" for p in beside.glob(f"3.{minor}.*"))]
        for place in places:
            if (place / f"python3.{minor}").exists():
                found[minor] = str(place / f"python3.{minor}")
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("python", interpreters(), ids=lambda path: Path(path).name)
def test_extension_builds_and_sources_compile_under_other_interpreters(
    python: str, sdist: Path, tmp_path: Path
) -> None:
    run(python, "-m", "venv", "venv", cwd=tmp_path)
    inner = str(tmp_path / "venv" / "bin" / "python")
    run(inner, "-m", "pip", "install", "--quiet", "setuptools>=77", "wheel", "pybind11", cwd=tmp_path)
    run(inner, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", str(sdist), cwd=tmp_path)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run(inner, "-W", "error", "-m", "compileall", "-q", "site", cwd=tmp_path)
    (extension,) = (tmp_path / "site" / "pyseq").glob("_C*")
    load = (
        f"import importlib.util as u; s = u.spec_from_file_location('_C', {str(extension)!r});"
        "c = u.module_from_spec(s); s.loader.exec_module(c); print(c.cpu_level())"
    )
    assert int(run(inner, "-c", load, cwd=tmp_path)) >= 2
