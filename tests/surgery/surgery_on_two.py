"""Un-shared models and parts on two gloo processes, by DDP and FSDP2, train as in one with the joined batch.

Run by test_unshare.py on two processes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyseq.surgery import submodel, unshare


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head, self.gate = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x).tanh() * self.gate
        return self.head(x)  # type: ignore[no-any-return]


def train(net: Any, inner: Any, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in inner.state_dict().items()}


def work(rank: int, folder: str) -> None:
    x = torch.linspace(-1, 1, 24).view(6, 4)
    mine = x[3 * rank : 3 * rank + 3]
    for make in (lambda: unshare(Loop(), example=x), lambda: submodel(Loop(), inputs="block#1", example=x)):
        nets: list[Any] = [make() for _ in range(3)]
        before = {name: p.clone() for name, p in nets[0].named_parameters()}
        wanted = train(nets[0], nets[0], x)
        assert not any(torch.equal(wanted[name], p) for name, p in before.items())
        torch.testing.assert_close(train(DistributedDataParallel(nets[1]), nets[1], mine), wanted)
        inner: Any = nets[2].block if isinstance(nets[2], Loop) else ()
        for part in (*inner, nets[2]):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        torch.testing.assert_close(train(nets[2], nets[2], mine), wanted)
