"""The quantiser on two gloo processes, by DDP and FSDP2, follows the same training in one with the joined batch.

Run by test_quantizer.py on two processes.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pyseq import nn

STEPS, ROWS, DIM = 4, 24, 6
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "k-means": {"kmeans_init": True},
    "k-means by cosine": {"kmeans_init": True, "metric": "cosine", "heads": 2, "num_codes": 5},
    "expiry": {"dead_code_threshold": 0.9, "decay": 0.5, "num_codes": 7},
    "gradient": {"decay": None, "dead_code_threshold": 0.9},
    "projected": {"codebook_dim": 2, "heads": 2, "decay": 0.9},
    "accumulated": {"accumulation_steps": 2, "dead_code_threshold": 0.9},
}
SHARDED = ("projected", "gradient")


class Net(torch.nn.Module):
    def __init__(self, num_codes: int = 10, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(DIM, DIM)
        self.quantizer: Any = nn.VectorQuantizer(DIM, num_codes, **options)
        self.decoder = torch.nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        found = self.quantizer(self.encoder(x), mask)
        loss = (self.decoder(found.quantized) - x).square().mean() + found.loss
        return loss, found.usage, found.perplexity, found.indices


class Seen(NamedTuple):
    state: dict[str, Tensor]
    usage: Tensor
    perplexity: Tensor
    loss: Tensor
    indices: Tensor


def data(step: int) -> tuple[Tensor, Tensor]:
    """Rows of both ranks, as many valid ones for each, at other places; one row of rank 1 holds a NaN."""
    torch.manual_seed(step)
    x = torch.randn(ROWS, DIM)
    mask = torch.cat([torch.randperm(ROWS // 2) >= 3 for _ in range(2)])
    x[~mask] = 100
    for half in (0, ROWS // 2):
        x[half + int(mask[half:].nonzero()[0]), 1] = torch.nan
    return x, mask


def train(net: Any, rows: slice, inner: Any = None, average: bool = False) -> list[Seen]:
    inner = inner or net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    for step in range(STEPS):
        x, mask = (t[rows] for t in data(step))
        x = torch.where(x.isnan(), 0.0, x)
        loss, usage, perplexity, indices = net(x, mask)
        optimizer.zero_grad()
        loss.backward()
        if average:
            dist.all_reduce(inner.quantizer.codebook.grad.div_(2))
        optimizer.step()
        whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in inner.state_dict().items()}
        state = {k: v.detach().clone() for k, v in whole.items()}
        seen.append(Seen(state, usage, perplexity, loss.detach(), indices))
    return seen


def agree(found: list[Seen], wanted: list[Seen], rows: slice) -> None:
    """With the one process, and with the other rank to the bit."""
    for mine, all_ in zip(found, wanted, strict=True):
        assert torch.equal(mine.indices, all_.indices[rows])
        torch.testing.assert_close((mine.usage, mine.perplexity), (all_.usage, all_.perplexity))
        torch.testing.assert_close(mine.state, all_.state, rtol=1e-4, atol=1e-5)
        loss = mine.loss.clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / 2, all_.loss)
        for name, value in mine.state.items():
            other = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(other, value)
            assert torch.equal(*other), name


class Calls:
    """Counts collectives while it is entered."""

    def __enter__(self) -> "Calls":
        self.count, self.before = 0, dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.before(*args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *exception: object) -> None:
        dist.all_reduce = self.before


EARLY = Net()  # before there is a process group, as ALONE, which would be kept in step
ALONE = {name: train(Net(**options), slice(None)) for name, options in CASES.items()}


def work(rank: int, folder: str) -> None:
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for name, options in CASES.items():
        net = EARLY if name == "default" else Net(**options)
        found = train(DistributedDataParallel(net), rows, net)
        agree(found, ALONE[name], rows)
    mesh = init_device_mesh("cpu", (2,))
    for name in SHARDED:
        net = Net(**CASES[name])
        gradient = net.quantizer.decay is None
        fully_shard(net, mesh=mesh, ignored_params={net.quantizer.codebook} if gradient else set())
        agree(train(net, rows, average=gradient), ALONE[name], rows)
    collectives(rank, rows)
    unequal(rank)


def collectives(rank: int, rows: slice) -> None:
    """One in a training step, none in eval, frozen, and in the second forward of activation checkpointing."""
    x, mask = (t[rows] for t in data(0))
    for options in CASES.values():
        net = Net(**options).quantizer
        net(x)
        with Calls() as calls:
            net(x, mask)
        assert calls.count == 1
        with Calls() as calls:
            found = checkpoint(net, x.clone().requires_grad_(), mask, use_reentrant=False)
            (found.loss + found.quantized.sum()).backward()
        assert calls.count == 1
        frozen = deepcopy(net).freeze()
        if rank == 0:  # alone
            with Calls() as calls:
                frozen(x, mask)
                net.eval()(x, mask)
                net.codes_to_vectors(found.indices)
            assert calls.count == 0
    assert net.quarantined > 0
    plain = Net(dead_code_threshold=0.9).quantizer
    fast: Any = torch.compile(deepcopy(plain), backend="aot_eager", fullgraph=True)
    for step in range(2):
        x, mask = (t[rows] for t in data(step))
        torch.testing.assert_close(fast(x, mask), plain(x, mask))
    torch.testing.assert_close(fast.state_dict(), {f"_orig_mod.{k}": v for k, v in plain.state_dict().items()})


def unequal(rank: int) -> None:
    """A rank without a valid row, or without any, and ranks of other sizes."""
    for options in CASES.values():
        for count, valid in ((9, False), (0, False), (3, True)):
            torch.manual_seed(0)
            net = Net(**options).quantizer
            for _ in range(6):
                x = torch.randn(9, DIM)
                mine = x if rank == 0 else x[:count]
                mask = torch.full((len(mine),), rank == 0 or valid)
                found = net(mine, mask)
                assert rank == 0 or valid or found.loss == 0
            for name, value in net.state_dict().items():
                other = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(other, value)
                assert torch.equal(*other), name
                assert value.isfinite().all()
    quantizer, revived = Net(7, decay=None).quantizer, 0
    for _ in range(40):  # where both ranks have a row for a code, it does not become their sum
        x, before = torch.randn(9, DIM), quantizer.codebook.detach().clone()
        quantizer.ema_counts[:, 1:] = 0
        quantizer(x if rank == 1 else x[:2])
        new = quantizer.codebook.detach()[(quantizer.codebook != before).any(2)]
        assert (new.unsqueeze(1) == x).all(2).any(1).all()
        revived += len(new)
    assert revived > 100
    torch.manual_seed(0)
    x = torch.randn(9, DIM)
    both = Net(dead_code_threshold=0).quantizer
    one = deepcopy(both).double().eval()
    both(x if rank == 0 else x[:0])
    counts = one(x.double()).indices.flatten().bincount(minlength=10)
    torch.testing.assert_close(both.ema_counts[0], 0.99 + 0.01 * counts)
