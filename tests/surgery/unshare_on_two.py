"""An un-shared model on two gloo processes, by DDP and FSDP2, follows the same training in one with the joined batch.

Run by test_unshare.py, once a rank: `python unshare_on_two.py STORE RANK`; STORE is a file that does not exist yet.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyseq.surgery import unshare


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x).tanh()
        return self.head(x)  # type: ignore[no-any-return]


def train(net: Any, inner: Any, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in inner.state_dict().items()}


def work(store: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    x = torch.linspace(-1, 1, 24).view(6, 4)
    nets: list[Any] = [unshare(Loop(), example=x) for _ in range(3)]
    wanted = train(nets[0], nets[0], x)
    assert not torch.equal(wanted["block.0.weight"], wanted["block.2.weight"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = x[3 * rank : 3 * rank + 3]
    torch.testing.assert_close(train(DistributedDataParallel(nets[1]), nets[1], mine), wanted)
    for part in (*nets[2].block, nets[2]):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(train(nets[2], nets[2], mine), wanted)
    dist.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
