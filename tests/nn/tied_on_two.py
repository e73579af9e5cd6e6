"""The tied head on two gloo processes, by DDP and FSDP2, follows the same training in one with the joined batch.

Run by test_tied_linear.py on two processes.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyseq import surgery
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


def surgery_survives(ids: Tensor, mesh: Any) -> None:
    """Edited models are wrapped like others; states are saved and loaded while they are sharded."""
    torch.manual_seed(0)
    model = Model()
    surgery.insert_after(model, "block", nn.LayerNorm(4))
    surgery.replace(model, "head", lambda old: nn.Sequential(nn.GELU(), nn.Linear(4, 7, bias=False)))
    model.head[1].weight = model.words.weight  # type: ignore[index,union-attr]
    wanted = model(ids)
    torch.testing.assert_close(DistributedDataParallel(model)(ids), wanted)
    sharded: Any = fully_shard(copy.deepcopy(model), mesh=mesh)
    state = surgery.state_dict(sharded)
    assert [*state] == ["words.weight", "block.weight", "block.bias", "block.after.weight", "block.after.bias"]
    state = {k: v.clone() for k, v in state.items()}
    train(sharded, ids)
    report = surgery.sharing_report(sharded)
    surgery.load_state_dict(sharded, state)
    assert surgery.sharing_report(sharded) == report
    torch.testing.assert_close(sharded(ids), wanted)


def work(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    start, ids = Model(), torch.randint(7, (8,))
    alone, parallel, sharded, apart = (copy.deepcopy(start) for _ in range(4))
    train(alone, ids)
    mine = ids[4 * rank : 4 * rank + 4]
    train(DistributedDataParallel(parallel), mine)
    assert_same(parallel, alone)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, mine)
    assert_same(sharded, alone)
    surgery_survives(mine, mesh)
    fully_shard(apart.words, mesh=mesh)
    fully_shard(apart, mesh=mesh)
    with pytest.raises(RuntimeError, match="into one group"):
        apart(mine)
