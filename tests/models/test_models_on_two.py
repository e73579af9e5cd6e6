"""Models on two gloo processes."""

import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path: Path) -> None:
    """DDP over two gloo processes, of autoencoders and priors, is one process with the joined batch; FSDP2 infers."""
    script = Path(__file__).with_name("models_on_two.py")
    command = [sys.executable, "-W", "error", str(script), str(tmp_path / "store")]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    for rank, text in zip(ranks, errors, strict=True):
        assert rank.returncode == 0, text[-3000:]
