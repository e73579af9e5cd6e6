"""A training step of the autoencoder that the study of VQ-VAE trains, with pyseq's quantiser in it and with another."""

from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor, nn

import pyseq
from pyseq import ops
from pyseq.models import VQVAE
from pyseq.nn import VectorQuantizerOutput

WIDTH, CODES, GAMMA = 64, 512, 0.25
WORKLOADS = (
    Workload("tiles", {"B": 16, "side": 64}),
    Workload("small", {"B": 4, "side": 32}, quick=True),
)


def inputs(workload: Workload, device: str) -> Tensors:
    batch, side = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, side // 8, side // 8, generator=random) * 2 - 1
    return {"images": nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1).to(device)}


def model(x: Tensors) -> VQVAE:
    torch.manual_seed(0)
    own = VQVAE(
        3,
        width=WIDTH,
        num_codes=CODES,
        batch_norm=False,
        decay=0.99,
        gamma=GAMMA,
        quantizer={"dead_code_threshold": 0.0},
    )
    return own.to(x["images"].device, x["images"].dtype)


class Other(nn.Module):
    """VectorQuantize as VQVAE calls a quantiser, from the same codebook, as many options off as it lets."""

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        count, dim = codebook.shape
        self.layer: Any = VectorQuantize(
            dim, count, decay=0.99, commitment_weight=GAMMA, rotation_trick=False, accept_image_fmap=True
        )
        for buffer in (self.layer._codebook.embed, self.layer._codebook.embed_avg):
            buffer.data.copy_(codebook.unsqueeze(0))
        self.nothing = torch.zeros(())

    def forward(self, x: Tensor) -> VectorQuantizerOutput:
        quantized, indices, loss, *_ = self.layer(x)
        return VectorQuantizerOutput(quantized, indices.unsqueeze(3), loss.sum(), self.nothing, self.nothing)


def with_other(x: Tensors) -> VQVAE:
    own = model(x)
    first: Any = own.quantizers[0]
    own.quantizers[0] = Other(first.codebook.squeeze(0))
    return own


def step(own: VQVAE, x: Tensors) -> Call:
    optimizer = torch.optim.Adam(own.parameters(), 1e-4, fused=True)
    first = next(own.encoder.parameters())

    def call() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = own(x["images"]).loss
        loss.backward()
        assert first.grad is not None
        found = loss.detach(), first.grad.clone()
        optimizer.step()
        return found

    return call


def own_step(x: Tensors) -> Call:
    own = model(x)
    codebook: Any = own.quantizers[0].codebook
    serving(ops.quantize, codebook[0], codebook[0])
    return step(own, x)


def view(_: Tensors, found: tuple[Tensor, Tensor]) -> Tensors:
    return {"loss": found[0], "grad weight": found[1]}


def oracle(x: Tensors) -> Tensors:
    with pyseq.use_backend("reference"):
        return view(x, step(model(x), x)())


def plain(x: Tensors) -> Any:
    with pyseq.use_backend("reference"):
        return step(model(x), x)()


def work(x: Tensors) -> Work:
    """Convolutions, thrice for a step: two that halve and two that double, and three blocks either side."""
    batch, _, side, _ = x["images"].shape
    quarter = (side // 4) ** 2
    fmas = 2 * quarter * (4 * 48 * WIDTH + 16 * WIDTH**2 + 3 * 10 * WIDTH**2) + quarter * CODES * WIDTH / 3
    return Work(units=batch, fmas=3 * batch * fmas, bytes=4 * 3 * batch * side**2)


ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(Mode("step", oracle, plain, work, view),),
    providers=(
        Provider("VectorQuantize", "vector-quantize-pytorch", {"step": lambda x: step(with_other(x), x)}),
        *ours({"step": own_step}),
    ),
    unit="images",
    baseline="VectorQuantize",
    headlines={"`models.VQVAE`, a training step": ("step", "tiles")},
    objection="Most of a step is convolutions, torch's in both; a larger network would hide the quantiser altogether.",
    page="vqvae",
)
