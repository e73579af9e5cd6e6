"""`python tests/on_two.py SCRIPT FOLDER RANK`: the script's `work(rank, folder)` in one of two gloo processes.

A rank ends without an interpreter's last steps: torch's threads and process groups go in no order there, so that it
now and then waits for ever or ends by a signal, after all that a test asks for has been checked.
"""

import os
import runpy
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def main(script: str, folder: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    work = runpy.run_path(script)["work"]  # what a module makes is made before there is a process group
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=4))
    try:
        work(rank, folder)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
