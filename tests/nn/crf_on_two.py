"""FSDP2 and DistributedDataParallel over two gloo processes, against one process with the joined batch.

Run by test_crf.py on two processes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pyseq.nn import CRF


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.crf = nn.Linear(4, 3), CRF(3, batch_first=True)

    def forward(self, x: Tensor, tags: Tensor) -> Tensor:
        return self.crf.nll(self.encoder(x), tags)


def assert_same_gradients(found: nn.Module, wanted: nn.Module) -> None:
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        grad: Any = p.grad
        torch.testing.assert_close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, q.grad)


def work(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    x, tags = torch.randn(6, 5, 4), torch.randint(3, (6, 5))
    mine = slice(3 * rank, 3 * rank + 3)
    alone, sharded, parallel = nets = [Net() for _ in range(3)]
    fully_shard(sharded.crf, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    wrapper = DistributedDataParallel(parallel.crf)
    emissions = alone.encoder(x).detach()[mine]
    optimizers = [torch.optim.SGD(net.crf.parameters(), lr=0.5) for net in nets]
    for _ in range(3):
        alone(x, tags).backward()
        sharded(x[mine], tags[mine]).backward()
        wrapper(emissions, tags[mine], reduction="mean", compute="nll").backward()
        assert_same_gradients(sharded, alone)
        assert_same_gradients(parallel.crf, alone.crf)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.step()
            net.zero_grad()
    for method in ("viterbi", "marginals", "decode"):
        found, wanted = (getattr(net.crf, method)(emissions) for net in (sharded, alone))
        torch.testing.assert_close(found, wanted)
