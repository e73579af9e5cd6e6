"""Autoencoders and priors by DDP on two gloo processes, against the same training in one with the joined batch.

Run by test_models_on_two.py, once a rank: `python models_on_two.py STORE RANK`; STORE is a file that is not there yet.
"""

import os
import sys
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


def work(store: str, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    made, alone = {}, {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        made[name] = make()
        torch.manual_seed(0)
        alone[name] = train(net := make(), net, slice(None))
    torch.manual_seed(0)
    normed = VQVAE(**SMALL | {"batch_norm": True}, decay=0.5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for name, net in made.items():
        train(DistributedDataParallel(net), net, rows)
        torch.testing.assert_close(net.state_dict(), alone[name].state_dict(), rtol=1e-4, atol=1e-5)
        same(net, name)
    train(DistributedDataParallel(normed), normed, rows)
    same(normed, "batch norm", without="running")  # each rank's own, until DDP's next forward copies rank 0's
    for name, methods in {
        "two levels": ("encode", "decode"),
        "attention": ("sample",),
        "convolutions": ("sample",),
    }.items():
        net, mesh = made[name], init_device_mesh("cpu", (2,))
        wanted = inferred(net)
        fully_shard(net, mesh=mesh)
        for method in methods:
            register_fsdp_forward_method(net, method)
        assert torch.equal(inferred(net), wanted)
    dist.destroy_process_group()


def inferred(net: Any) -> Tensor:
    if isinstance(net, VQVAE):
        return net.decode(net.encode(torch.linspace(-1, 1, 384).view(1, 3, 8, 16)))
    return net.sample(2, 1, generator=torch.Generator().manual_seed(0))  # type: ignore[no-any-return]


def same(net: nn.Module, name: str, without: str = "nothing") -> None:
    for key, value in net.state_dict().items():
        other = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(other, value)
        assert without in key or torch.equal(*other), (name, key)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
