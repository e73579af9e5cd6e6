"""The loss of a maximum-entropy Markov model in both directions, with gradients, over torch's own cross entropy."""

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyseq import ops

WORKLOADS = (
    Workload("ner", {"B": 64, "T": 256, "K": 9}, quick=True),
    Workload("fine", {"B": 64, "T": 128, "K": 32}, quick=True),
    Workload("wide", {"B": 32, "T": 128, "K": 256}),
    Workload("words", {"B": 16, "T": 128, "K": 20_000, "d": 32}),  # transitions of low rank
)


def inputs(workload: Workload, device: str) -> Tensors:
    batch, time, num_tags, *rank = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    x = {"emissions": torch.randn(batch, time, num_tags, generator=random)}
    x["tags"] = torch.randint(num_tags, (batch, time), generator=random)
    if rank:
        x |= {side: 0.3 * torch.randn(num_tags, *rank, generator=random) for side in ("left", "right")}
    else:
        x["transitions"] = torch.randn(num_tags, num_tags, generator=random)
    return {name: t.to(device) for name, t in x.items()}


def leaves(x: Tensors) -> list[Tensor]:
    return [t.requires_grad_() for name, t in x.items() if name != "tags"]


def torch_loss(x: Tensors, wanted: list[Tensor]) -> Tensor:
    """By two cross entropies, of logits that are rows of the transitions, or of their product, added to emissions."""
    f, *g = wanted
    before, after = x["tags"][:, :-1], x["tags"][:, 1:]
    forward, backward = (
        (g[0][before], g[0].mT[after]) if len(g) == 1 else (g[0][before] @ g[1].mT, g[1][after] @ g[0].mT)
    )
    logits = torch.cat([f[:, :1], f[:, 1:] + forward], 1), torch.cat([f[:, :-1] + backward, f[:, -1:]], 1)
    losses = [cross_entropy(each.flatten(0, 1), x["tags"].flatten(), reduction="sum") for each in logits]
    return (losses[0] + losses[1]) / 2


def with_gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def true_loss(x: Tensors) -> Tensors:
    return viewed(x, plain_loss(x))


def plain_loss(x: Tensors) -> list[Tensor]:
    wanted = leaves(x)
    return with_gradients(torch_loss(x, wanted), wanted)


def viewed(x: Tensors, found: list[Tensor]) -> Tensors:
    return {"loss": found[0], **{f"grad {i}": each for i, each in enumerate(found[1:])}}


def work(x: Tensors) -> Work:
    """Emissions read and their gradient written; with a pair three products in each direction."""
    batch, time, num_tags = x["emissions"].shape
    fmas = 6 * batch * time * num_tags * x["left"].size(1) if "left" in x else 0
    return Work(units=batch * time, fmas=fmas, bytes=8 * batch * time * num_tags)


def by_torch(x: Tensors) -> Call:
    wanted = leaves(x)
    return lambda: with_gradients(torch_loss(x, wanted), wanted)


def by_pyseq(x: Tensors) -> Call:
    wanted = leaves(x)
    f, *g = wanted
    scores = g[0] if len(g) == 1 else (g[0], g[1])
    serving(ops.memm_nll, f, g[0])
    return lambda: with_gradients(ops.memm_nll(f, scores, x["tags"]).sum(), wanted)


def one_cross_entropy(x: Tensors) -> Call:
    """Of the emissions alone: a softmax head."""
    f = leaves(x)[0]
    return lambda: with_gradients(cross_entropy(f.flatten(0, 1), x["tags"].flatten(), reduction="sum"), [f])


def plain_cross_entropy(x: Tensors) -> list[Tensor]:
    f = x["emissions"].detach()
    logs = f.log_softmax(2)
    hot = torch.zeros_like(f).scatter_(2, x["tags"].unsqueeze(2), 1.0)
    return [-(hot * logs).sum(), logs.exp() - hot]


def true_cross_entropy(x: Tensors) -> Tensors:
    return viewed(x, plain_cross_entropy(x))


ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(Mode("loss", true_loss, plain_loss, work, viewed),),
    providers=(
        Provider("torch", "torch", {"loss": by_torch}),
        Provider(
            "F.cross_entropy", "torch", {"loss": one_cross_entropy},
            yardstick=Mode("cross-entropy", true_cross_entropy, plain_cross_entropy, work, viewed),
        ),
        *ours({"loss": by_pyseq}),
    ),
    unit="tokens",
    baseline="torch",
    headlines={"`ops.memm_nll` with gradients": ("loss", "ner")},
    objection="there is no maintained MEMM for PyTorch to measure against; torch's row is what its user would write, "
    "two cross entropies, and compiled it would be faster.",
)  # fmt: skip
