"""Lookahead on two gloo processes, by DDP and FSDP2, follows the same training in one."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from pyseq.optim import Lookahead


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def step(model: nn.Module, opt: Lookahead, rows: Tensor) -> None:
    opt.zero_grad()
    model(rows).square().mean().backward()
    opt.step()


def work(rank: int, folder: str) -> None:
    data = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(1))
    mine = [rows[2 * rank : 2 * rank + 2] for rows in data]
    alone = net()
    right = Lookahead(AdamW(alone.parameters(), lr=0.05), k=2, momentum="pullback")
    parallel = DistributedDataParallel(net())
    opt = Lookahead(AdamW(parallel.parameters(), lr=0.05), k=2, momentum="pullback")
    sharded = net()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    parts = Lookahead(AdamW(sharded.parameters(), lr=0.05), k=2, momentum="pullback")

    def agree(*models: nn.Module) -> None:
        for model in models:
            for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-6)

    for i in range(3):
        step(alone, right, data[i])
        step(parallel, opt, mine[i])
        step(sharded, parts, mine[i])
        agree(parallel, sharded)
    with parts.slow_weights(), right.slow_weights():
        agree(sharded)
    save({"opt": get_optimizer_state_dict(sharded, parts)}, checkpoint_id=f"{folder}/saved")
    again = Lookahead(AdamW(sharded.parameters(), lr=0.05), k=3, momentum="pullback")
    state = {"opt": get_optimizer_state_dict(sharded, again)}
    load(state, checkpoint_id=f"{folder}/saved")
    set_optimizer_state_dict(sharded, again, state["opt"])
    for i in range(3, 7):
        step(alone, right, data[i])
        step(parallel, opt, mine[i])
        step(sharded, again, mine[i])
        agree(parallel, sharded)
