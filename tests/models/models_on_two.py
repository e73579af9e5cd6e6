"""Autoencoders and priors by DDP on two gloo processes, against the same training in one with the joined batch.

Run by test_models_on_two.py on two processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pyseq.models import VQVAE, PixelAttention, PixelCNN

STEPS, BATCH, CLASSES = 3, 8, 3
SMALL: dict[str, Any] = {"width": 8, "num_codes": 9, "blocks": 1, "batch_norm": False}
PRIOR: dict[str, Any] = {"num_codes": 9, "grid": (3, 4), "num_classes": CLASSES, "width": 8, "layers": 2}
CASES: dict[str, Callable[[], Any]] = {
    "gradient": lambda: VQVAE(**SMALL, quantizer={"loss_reduction": "mean"}),
    "averages": lambda: VQVAE(**SMALL, decay=0.5),
    "two levels": lambda: VQVAE(**SMALL, levels=2, decay=0.5, quantizer={"kmeans_init": True}),
    "attention": lambda: PixelAttention(**PRIOR),
    "convolutions": lambda: PixelCNN(**PRIOR),
}


def loss(net: Any, of: nn.Module, step: int, rows: slice) -> Tensor:
    torch.manual_seed(step)
    if isinstance(of, VQVAE):
        return net((torch.rand(BATCH, 3, 8, 16) * 2 - 1)[rows]).loss  # type: ignore[no-any-return]
    codes, labels = torch.randint(9, (BATCH, 3, 4))[rows], torch.randint(CLASSES, (BATCH,))[rows]
    return cross_entropy(net(codes, labels).flatten(0, 2), codes.flatten())


def train(net: Any, of: nn.Module, rows: slice) -> nn.Module:
    optimizer = torch.optim.SGD(of.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(net, of, step, rows).backward()
        optimizer.step()
    return of


MADE, ALONE = {}, {}  # before there is a process group, in which quantisers keep in step
for NAME, MAKE in CASES.items():
    torch.manual_seed(0)
    MADE[NAME] = MAKE()
    torch.manual_seed(0)
    ALONE[NAME] = train(NET := MAKE(), NET, slice(None))
torch.manual_seed(0)
NORMED = VQVAE(**SMALL | {"batch_norm": True}, decay=0.5)


def work(rank: int, folder: str) -> None:
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for name, net in MADE.items():
        train(DistributedDataParallel(net), net, rows)
        torch.testing.assert_close(net.state_dict(), ALONE[name].state_dict(), rtol=1e-4, atol=1e-5)
        same(net, name)
    train(DistributedDataParallel(NORMED), NORMED, rows)
    same(NORMED, "batch norm", without="running")  # each rank's own, until DDP's next forward copies rank 0's
    for name, methods in {
        "two levels": ("encode", "decode"),
        "attention": ("sample",),
        "convolutions": ("sample",),
    }.items():
        net, mesh = MADE[name], init_device_mesh("cpu", (2,))
        wanted = inferred(net)
        fully_shard(net, mesh=mesh)
        for method in methods:
            register_fsdp_forward_method(net, method)
        assert torch.equal(inferred(net), wanted)


def inferred(net: Any) -> Tensor:
    if isinstance(net, VQVAE):
        return net.decode(net.encode(torch.linspace(-1, 1, 384).view(1, 3, 8, 16)))
    return net.sample(2, 1, generator=torch.Generator().manual_seed(0))  # type: ignore[no-any-return]


def same(net: nn.Module, name: str, without: str = "nothing") -> None:
    for key, value in net.state_dict().items():
        other = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(other, value)
        assert without in key or torch.equal(*other), (name, key)
