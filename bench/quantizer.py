"""The quantiser as a layer: forward in eval, a training step, and the statistics that its codebook learns from."""

from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor, nn
from torch.nn import functional as F

import pyseq
from pyseq import ops

WORKLOADS = (
    Workload("vqvae", {"N": 65536, "K": 1024, "D": 64}),
    Workload("small", {"N": 8192, "K": 512, "D": 64}, quick=True),
)
GAMMA = 0.25


def inputs(workload: Workload, device: str) -> Tensors:
    n, count, dim = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    x, codes, upstream = (torch.randn(m, dim, generator=random) for m in (n, count, n))
    indices = torch.randint(count, (n,), generator=random)
    return {
        "x": x.to(device), "codebook": codes.to(device), "upstream": upstream.to(device), "indices": indices.to(device)
    }  # fmt: skip


def quantized(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the loss, and the gradient of the loss and of codes times upstream."""
    rows = x["x"]
    codes = x["codebook"][ops.nearest_code(rows, x["codebook"], backend="reference")[0]]
    return codes, GAMMA * F.mse_loss(rows, codes), x["upstream"] + 2 * GAMMA / rows.numel() * (rows - codes)


def distance(x: Tensors, found: Tensor) -> Tensor:
    """For near ties are no errors."""
    return (x["x"] - found.view_as(x["x"])).square().sum(1)


def eval_oracle(x: Tensors) -> Tensors:
    return {"distance": distance(x, quantized(x)[0])}


def train_oracle(x: Tensors) -> Tensors:
    _, loss, grad = quantized(x)
    return {"loss": loss, "grad x": grad}


def plain(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 torch."""
    return quantized(x)


def statistics_oracle(x: Tensors) -> Tensors:
    counts, sums = ops.code_statistics(x["x"], x["indices"], len(x["codebook"]), backend="reference")
    return {"counts": counts, "sums": sums}


def one_hot(x: Tensors) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(x["indices"], len(x["codebook"])).to(x["x"].dtype)
    return chosen.sum(0), chosen.t() @ x["x"]


def indexed(x: Tensors) -> tuple[Tensor, Tensor]:
    sums = torch.zeros_like(x["codebook"]).index_add_(0, x["indices"], x["x"])
    return torch.bincount(x["indices"], minlength=len(sums)), sums


def search_work(x: Tensors) -> Work:
    (n, dim), count = x["x"].shape, len(x["codebook"])
    return Work(units=n, fmas=n * count * dim, bytes=4 * (3 * n + count) * dim)


def statistics_work(x: Tensors) -> Work:
    """Rows and indices read, sums written."""
    (n, dim), count = x["x"].shape, len(x["codebook"])
    return Work(units=n, fmas=0, bytes=4 * (n + count) * dim + 8 * n)


def evaluation(layer: nn.Module, x: Tensors) -> Call:
    rows = x["x"].unsqueeze(0)
    layer.eval()

    @torch.no_grad()
    def call() -> Tensor:
        return layer(rows)[0]  # type: ignore[no-any-return]

    return call


def training(layer: nn.Module, x: Tensors) -> Call:
    rows, upstream = x["x"].unsqueeze(0).requires_grad_(), x["upstream"].unsqueeze(0)
    layer.train()

    def call() -> tuple[Tensor, Tensor]:
        rows.grad = None
        codes, _, loss, *_ = layer(rows)
        torch.autograd.backward([codes, loss], [upstream, torch.ones_like(loss)])
        assert rows.grad is not None
        return loss.detach(), rows.grad

    return call


def pyseq_layer(x: Tensors) -> nn.Module:
    serving(ops.quantize, x["x"], x["codebook"])
    count, dim = x["codebook"].shape
    layer = pyseq.nn.VectorQuantizer(dim, count, gamma=GAMMA).to(x["x"].device)
    codes = x["codebook"].unsqueeze(0)
    layer.load_state_dict(layer.state_dict() | {"codebook": codes, "ema_sums": codes})
    return layer


def peer_layer(x: Tensors) -> nn.Module:
    """With the plain straight-through gradient, and as many options off as it lets."""
    from vector_quantize_pytorch import VectorQuantize

    count, dim = x["codebook"].shape
    layer: Any = VectorQuantize(dim, count, decay=0.99, commitment_weight=GAMMA, rotation_trick=False)
    layer = layer.to(x["x"].device)
    for buffer in (layer._codebook.embed, layer._codebook.embed_avg):
        buffer.data.copy_(x["codebook"].unsqueeze(0))
    return layer  # type: ignore[no-any-return]


def pyseq_statistics(x: Tensors) -> Call:
    serving(ops.code_statistics, x["x"], x["indices"])
    return lambda: ops.code_statistics(x["x"], x["indices"], len(x["codebook"]))


LAYER = {
    "eval": lambda x: evaluation(pyseq_layer(x), x),
    "train": lambda x: training(pyseq_layer(x), x),
    "statistics": pyseq_statistics,
}
PEER = {
    "eval": lambda x: evaluation(peer_layer(x), x),
    "train": lambda x: training(peer_layer(x), x),
    "statistics": lambda x: lambda: one_hot(x),
}


ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(
        Mode(
            "eval", eval_oracle, lambda x: plain(x)[0], search_work, lambda x, found: {"distance": distance(x, found)}
        ),
        Mode(
            "train",
            train_oracle,
            lambda x: plain(x)[1:],
            search_work,
            lambda x, found: {"loss": found[0], "grad x": found[1].view_as(x["x"])},
        ),
        Mode(
            "statistics",
            statistics_oracle,
            indexed,
            statistics_work,
            lambda x, found: {"counts": found[0], "sums": found[1]},
        ),
    ),
    providers=(
        Provider("VectorQuantize", "vector-quantize-pytorch", PEER),
        Provider("index_add_", "torch", {"statistics": lambda x: lambda: indexed(x)}),
        *ours(LAYER),
    ),
    unit="vectors",
    baseline="VectorQuantize",
    headlines={"`nn.VectorQuantizer`, a training step": ("train", "vqvae")},
    objection="VectorQuantize offers more kinds of codebooks in plain torch; its statistics are timed as the product "
    "with one-hot rows that it takes them by. Ours also revives dead codes, and has a loss in eval.",
)
