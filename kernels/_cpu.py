"""What the C++ launchers of all rooms share."""

import os


def _wanted_level() -> int:
    text = os.environ.get("PYSEQ_CPU_LEVEL") or "0"
    if text not in ("0", "2", "3", "4"):
        raise ValueError(f"PYSEQ_CPU_LEVEL must be 2, 3 or 4, or 0 for the best, got {text!r}")
    return int(text)


LEVEL = _wanted_level()  # of instruction sets: 4 is AVX-512, 3 AVX2 with FMA, 2 the platform's baseline, 0 the best
