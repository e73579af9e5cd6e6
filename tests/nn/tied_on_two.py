"""The tied head on two gloo processes, by DDP and FSDP2, follows the same training in one with the joined batch.

Run by test_tied_linear.py, once a rank: `python tied_on_two.py STORE RANK`; STORE is a file that does not exist yet.
"""

import copy
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyseq.nn import TiedLinear


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.head = TiedLinear(self.words)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.words(ids)))  # type: ignore[no-any-return]


def train(model: nn.Module, ids: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    state: dict[str, Any] = found.state_dict()
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    torch.testing.assert_close(whole, dict(wanted.state_dict()))


def work(store: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start, ids = Model(), torch.randint(7, (8,))
    alone, parallel, sharded, apart = (copy.deepcopy(start) for _ in range(4))
    train(alone, ids)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = ids[4 * rank : 4 * rank + 4]
    train(DistributedDataParallel(parallel), mine)
    assert_same(parallel, alone)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, mine)
    assert_same(sharded, alone)
    fully_shard(apart.words, mesh=mesh)
    fully_shard(apart, mesh=mesh)
    with pytest.raises(RuntimeError, match="into one group"):
        apart(mine)
    dist.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
