"""Build script: maps `kernels/` to `pyseq.kernels` and builds `pyseq._C` from `csrc/` where a compiler is found.

`PYSEQ_NO_EXT=1` leaves the extension out; Numba then serves the CPU.
"""

import os
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

    ParallelCompile("PYSEQ_BUILD_JOBS", default=2).install()
    openmp = [] if os.name == "nt" or os.uname().sysname == "Darwin" else ["-fopenmp"]
    ext_modules = [
        Pybind11Extension(
            "pyseq._C",
            sorted(str(p) for p in Path("csrc").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("*.hpp")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", *MATHS, *WARNINGS, *openmp],
            extra_link_args=openmp,
            optional=True,  # no compiler: the install goes on, and pyseq.info says that cpp is missing
        )
    ]
    cmdclass = {"build_ext": build_ext}

setup(
    packages=packages,
    package_dir={"pyseq": "pyseq", "pyseq.kernels": "kernels"},
    package_data={"pyseq": ["py.typed"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
