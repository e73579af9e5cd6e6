"""Lazy optimizers on two gloo processes, by DDP with sparse gradients, follow one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer

from pyseq.optim import Lazy, LazyAdam, Lookahead, clip_grad_norm_


class Net(nn.Module):
    def __init__(self, sparse: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 5, sparse=sparse, dtype=dtype)
        self.head = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows).float()).sin().mean()  # type: ignore[no-any-return]


def optimizer(kind: str, net: Net) -> Optimizer:
    if kind == "Lazy":
        return Lazy(Adam(net.parameters(), 0.05), [net.table])
    lazy = LazyAdam(net.parameters(), 0.05, semantics="decay" if kind == "decay" else "skip")
    return Lookahead(lazy, k=2) if kind == "Lookahead" else lazy


def work(rank: int, folder: str) -> None:
    data = torch.randint(20, (7, 8), generator=torch.Generator().manual_seed(1))
    for kind in ("skip", "decay", "Lookahead", "Lazy", "bfloat16"):
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        nets = [Net(kind != "Lazy", dtype) for _ in range(2)]
        parallel = DistributedDataParallel(nets[1])
        opts = [optimizer(kind, net) for net in nets]
        for rows in data:
            for model, opt, part in zip((nets[0], parallel), opts, (rows, rows[4 * rank : 4 * rank + 4]), strict=True):
                opt.zero_grad()
                model(part).backward()
                clip_grad_norm_(model.parameters(), 0.1)
                opt.step()
        for p, q in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
            if kind != "bfloat16":
                torch.testing.assert_close(p, q)
            each = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(each, p.detach())
            assert torch.equal(*each)  # replicas, also where numbers are rounded at random
