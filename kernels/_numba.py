"""How the Numba kernels of all rooms are compiled."""

import os
from typing import Any

JIT: dict[str, Any] = {
    "nogil": True,
    "cache": os.environ.get("PYSEQ_NUMBA_CACHE", "1") == "1",
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},  # keeps -inf and NaN
}
EXACT = {**JIT, "fastmath": {"contract"}}  # sums as they are written
