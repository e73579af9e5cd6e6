"""Build script: maps `kernels/` to `pyseq.kernels` and builds `pyseq._C` from `csrc/` where a compiler is found.

`PYSEQ_NO_EXT=1` leaves the extension out; Numba then serves the CPU. Objects are kept in `build/objects` and compiled
again when their own source, a header beside it or a shared header is newer, so a room never waits for another one.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

# vector types cross no ABI here, and GCC 12 warns of its own AVX-512 headers
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]

# no fast-math; and loops that store sums stay loops: as a memcpy they would keep the sums out of the registers
MATHS = ["-fno-math-errno", "-fno-trapping-math", "-fno-tree-loop-distribute-patterns"]

packages = find_packages(include=["pyseq", "pyseq.*"])
packages += ["pyseq.kernels"] + [f"pyseq.kernels.{name}" for name in find_packages("kernels")]

ext_modules = []
cmdclass = {}
if os.environ.get("PYSEQ_NO_EXT") != "1":
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    def stale(made: str, source: str) -> bool:
        """Whether an object is older than its source, a header beside it, a shared header or this script."""
        path = Path(source)
        needed = [path, Path("setup.py"), *path.parent.glob("*.hpp"), *Path("csrc").glob("*.hpp")]
        return not os.path.exists(made) or max(x.stat().st_mtime for x in needed) > os.path.getmtime(made)

    class BuildExtension(build_ext):
        """Keeps objects between builds, apart for every interpreter, compiler and set of flags."""

        def finalize_options(self) -> None:
            super().finalize_options()
            flags = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS")]
            known = "\n".join([sys.executable, str(sysconfig.get_config_var("SOABI")), *flags])
            self.build_temp = str(Path("build", "objects", hashlib.sha256(known.encode()).hexdigest()[:12]))

    ParallelCompile("PYSEQ_BUILD_JOBS", default=2, needs_recompile=stale).install()
    openmp = [] if os.name == "nt" or os.uname().sysname == "Darwin" else ["-fopenmp"]
    ext_modules = [
        Pybind11Extension(
            "pyseq._C",
            sorted(str(p) for p in Path("csrc").glob("**/*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("**/*.hpp")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", *MATHS, *WARNINGS, *openmp],
            extra_link_args=openmp,
            optional=True,  # no compiler: the install goes on, and pyseq.info says that cpp is missing
        )
    ]
    cmdclass = {"build_ext": BuildExtension}

setup(
    packages=packages,
    package_dir={"pyseq": "pyseq", "pyseq.kernels": "kernels"},
    package_data={"pyseq": ["py.typed"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
