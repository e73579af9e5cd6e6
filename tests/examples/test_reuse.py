import re
import subprocess
import sys
from pathlib import Path

ROOM = "surgery"
EXAMPLE = Path(__file__).parents[2] / "examples" / "reuse.py"


def test_six_techniques() -> None:
    """Each shows and checks what it says; the program stops at what does not hold."""
    said = subprocess.run([sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^\d\. .*", said, re.MULTILINE) == [
        "1. A shared layer",
        "2. A model as a layer",
        "3. Clones, with and without weights",
        "4. A cross reference",
        "5. Intermediate outputs",
        "6. A cut in the middle",
    ]
    assert len(re.findall(r"^  \S", said, re.MULTILINE)) == 13
    assert "layer2.0.add     float32 (2, 32, 4, 4)" in said
