"""Text that must not come back, each with its reason. Run by `make lint`."""

import re
import subprocess
import sys
from pathlib import Path

LAWS = [
    (r"-ffast-" r"math|fast" r"math=True", "fast-math breaks -inf and NaN"),
    (r"-march=" r"native", "wheels must run on other CPUs: dispatch at run time"),
    (r"make_block" r"_ptr", "deprecated in Triton: use plain pointer arithmetic"),
    (r"\bTO" r"DO\b|\bFIX" r"ME\b", "no promises in code"),
    (r"/(?:ho" r"me|ro" r"ot|wo" r"rk|Us" r"ers)/", "absolute path of a machine"),
    (r"py" r"pi\.(?:org|python)|files\.python" r"hosted", "package-registry host name"),
]


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    found = 0
    for name in filter(None, names):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for pattern, reason in LAWS:
                if re.search(pattern, line):
                    print(f"{name}:{number}: {reason}: {line.strip()[:80]}")
                    found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
