"""Linear-chain CRF: a training step and a decode, against pytorch-crf, torch-struct and cross-entropy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Unavailable, Work, Workload, ours, serving
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from pyseq import nn, ops
from pyseq.reference import chain as reference

PARAMETERS = ("transitions", "start", "end")
GRADIENTS = ("grad emissions", *(f"grad {name}" for name in PARAMETERS))


WORKLOADS = (
    Workload("tiny", {"B": 1, "T": 2, "K": 2}),  # what a call costs before it computes
    Workload("ner", {"B": 64, "T": 256, "K": 9}, quick=True),  # CoNLL-2003 tags in BIO, paragraphs
    Workload("ner-small", {"B": 32, "T": 128, "K": 9}, quick=True),  # the same, sentences
    Workload("pos", {"B": 64, "T": 128, "K": 32}, quick=True),  # part of speech
    Workload("fine", {"B": 32, "T": 128, "K": 128}),  # fine-grained entities, morphology
    Workload("wide", {"B": 16, "T": 64, "K": 512}),  # supertags
    Workload("long", {"B": 4, "T": 16384, "K": 9}),  # documents, genomes, audio frames
)


def inputs(workload: Workload, device: str) -> Tensors:
    """Right padding, which every rival accepts; lengths uniform in [T/2, T], one of them T."""
    batch, time, tags = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(time // 2, time + 1, (batch,), generator=random)
    lengths[0] = time
    mask = torch.arange(time) < lengths[:, None]
    out = {
        "emissions": torch.randn(batch, time, tags, generator=random),
        "transitions": torch.randn(tags, tags, generator=random),
        "start": torch.randn(tags, generator=random),
        "end": torch.randn(tags, generator=random),
        "tags": torch.randint(tags, (batch, time), generator=random) * mask,
        "mask": mask,
        "lengths": lengths,
    }
    return {name: x.to(device) for name, x in out.items()}


def leaves(x: Tensors) -> list[Tensor]:
    return [x[name].clone().requires_grad_() for name in ("emissions", *PARAMETERS)]


def with_gradients(loss: Tensor, wanted: list[Tensor]) -> Tensors:
    """Loss of each sequence, and gradients of their sum."""
    grads = torch.autograd.grad(loss.sum(), wanted)
    return {"loss": loss.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def true_loss(x: Tensors) -> Tensors:
    wanted = emissions, transitions, start, end = leaves(x)
    return with_gradients(reference.crf_nll(emissions, transitions, x["tags"], start, end, x["mask"]), wanted)


def plain_loss(x: Tensors) -> Tensors:
    """The forward algorithm as textbooks write it, differentiated by autograd."""
    wanted = emissions, transitions, start, end = leaves(x)
    alpha = start + emissions[:, 0]
    for t in range(1, emissions.size(1)):
        later = emissions[:, t] + torch.logsumexp(alpha.unsqueeze(2) + transitions, 1)  # over [B, K, K]
        alpha = torch.where(x["mask"][:, t, None], later, alpha)
    gold = reference.crf_score(emissions, transitions, x["tags"], start, end, x["mask"])
    return with_gradients(torch.logsumexp(alpha + end, 1) - gold, wanted)


def true_path(x: Tensors) -> Tensors:
    _, path = reference.viterbi(x["emissions"], x["transitions"], x["start"], x["end"], x["mask"])
    return path_score(x, path)


def plain_path(x: Tensors) -> Tensor:
    """Viterbi in the inputs' dtype: the path is the gradient of the best score in the emissions."""
    emissions = x["emissions"].clone().requires_grad_()
    best = x["start"] + emissions[:, 0]
    for t in range(1, emissions.size(1)):
        later = emissions[:, t] + (best.unsqueeze(2) + x["transitions"]).max(1).values  # max over [B, K, K]
        best = torch.where(x["mask"][:, t, None], later, best)
    (hot,) = torch.autograd.grad((best + x["end"]).max(1).values.sum(), emissions)
    return hot.argmax(2).masked_fill(~x["mask"], -1)


def path_score(x: Tensors, path: Tensor | list[list[int]]) -> Tensors:
    """What a path is worth in float64, for near ties are no errors; and which steps it covers."""
    if isinstance(path, list):
        time = x["mask"].size(1)
        path = torch.stack([pad(torch.tensor(row), (0, time - len(row)), value=-1) for row in path])
    path = path.to(x["mask"].device)
    start, end = x["start"], x["end"]
    score = reference.crf_score(x["emissions"], x["transitions"], path.clamp(min=0), start, end, x["mask"])
    return {"path score": score, "covered": (path >= 0) == x["mask"]}


def loss_work(x: Tensors) -> Work:
    """Three K x K products a live step (forward, backward, counts); live emissions read, all gradients written."""
    tokens, tags = int(x["lengths"].sum()), x["transitions"].size(0)
    return Work(units=tokens, fmas=3 * tokens * tags**2, bytes=4 * (tokens * tags + x["emissions"].numel()))


def decode_work(x: Tensors) -> Work:
    """One K x K max-product a live step; live emissions read, int64 tags written."""
    tokens, tags = int(x["lengths"].sum()), x["transitions"].size(0)
    return Work(units=tokens, fmas=tokens * tags**2, bytes=4 * tokens * tags + 8 * x["tags"].numel())


def step(loss: Callable[[], Tensor], emissions: Tensor, *parameters: Tensor) -> Call:
    """Zero the gradients, loss, backward."""
    wanted = emissions, *parameters

    def call() -> Tensors:
        for leaf in wanted:
            leaf.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        named = zip(GRADIENTS, (leaf.grad for leaf in wanted), strict=False)
        return {"loss": value.detach(), **{name: grad for name, grad in named if grad is not None}}

    return call


def filled(library: Any, x: Tensors) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """The CRF of either library with these scores, and its parameters in our order."""
    crf = library.CRF(x["transitions"].size(0), batch_first=True).to(x["emissions"].device)
    parameters = crf.transitions, crf.start_transitions, crf.end_transitions
    with torch.no_grad():
        for parameter, name in zip(parameters, PARAMETERS, strict=True):
            parameter.copy_(x[name])
    return crf, parameters


def ours_filled(x: Tensors) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    if serving(ops.crf_nll, x["emissions"]) == "reference" and x["emissions"].size(1) > 4096:
        raise Unavailable("the reference is the oracle, too slow to time at this length")
    return filled(nn, x)


def pyseq_loss(x: Tensors) -> Call:
    (crf, parameters), emissions = ours_filled(x), x["emissions"].requires_grad_()
    return step(lambda: crf.nll(emissions, x["tags"], x["mask"], "sum"), emissions, *parameters)


def pyseq_lists(x: Tensors) -> Call:
    crf, _ = ours_filled(x)
    return lambda: crf.decode(x["emissions"], x["mask"])


def pyseq_tensors(x: Tensors) -> Call:
    crf, _ = ours_filled(x)
    return lambda: crf.viterbi(x["emissions"], x["mask"])[1]


def pytorch_crf_loss(x: Tensors) -> Call:
    import torchcrf

    (crf, parameters), emissions = filled(torchcrf, x), x["emissions"].requires_grad_()
    return step(lambda: -crf(emissions, x["tags"], mask=x["mask"]), emissions, *parameters)


def pytorch_crf_decode(x: Tensors) -> Call:
    import torchcrf

    crf, _ = filled(torchcrf, x)
    return torch.no_grad()(lambda: crf.decode(x["emissions"], mask=x["mask"]))


def torch_struct_loss(x: Tensors) -> Call:
    """Its log partition over B x T x K x K potentials; the gold score, which it would read off one-hot potentials of
    that size, by gathers."""
    import torch_struct

    wanted = emissions, transitions, start, end = leaves(x)
    final = torch.arange(1, emissions.size(1), device=emissions.device) == x["lengths"][:, None] - 1

    def loss() -> Tensor:
        first = pad(start + emissions[:, :1], (0, 0, 0, emissions.size(1) - 2)).unsqueeze(2)  # previous tags last
        edges = transitions.t() + emissions[:, 1:].unsqueeze(3) + first + (final[..., None] * end).unsqueeze(3)
        log_z = torch_struct.LinearChain(torch_struct.LogSemiring).sum(edges, lengths=x["lengths"])
        gold = reference.crf_score(emissions, transitions, x["tags"], start, end, x["mask"])
        total: Tensor = (log_z - gold).sum()
        return total

    return step(loss, *wanted)


def cross_entropy_loss(x: Tensors, transposed: bool = False) -> Call:
    """Classes last, or in the second dimension of a view: torch's fastest form on the CPU."""
    emissions = x["emissions"].requires_grad_()
    target = x["tags"].masked_fill(~x["mask"], -100)
    if transposed:
        return step(lambda: cross_entropy(emissions.transpose(1, 2), target, reduction="sum"), emissions)
    return step(lambda: cross_entropy(emissions.flatten(0, 1), target.flatten(), reduction="sum"), emissions)


def plain_cross_entropy(x: Tensors) -> Tensors:
    logs = x["emissions"] - x["emissions"].exp().sum(2, keepdim=True).log()
    hot = torch.zeros_like(logs).scatter_(2, x["tags"].unsqueeze(2), 1.0)
    live = x["mask"].unsqueeze(2)
    return {"loss": -(hot * logs * live).sum((1, 2)), "grad emissions": (logs.exp() - hot) * live}


class Empty(torch.autograd.Function):
    """The tensors of a CRF loss in, a loss and gradients of zero out: what torch alone asks for such a step."""

    @staticmethod
    def forward(ctx: Any, *chain: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*chain)
        return chain[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *map(torch.zeros_like, ctx.saved_tensors[:4]), None, None


def empty_loss(x: Tensors) -> Call:
    wanted = leaves(x)
    return step(lambda: Empty.apply(*wanted, x["tags"], x["mask"]), *wanted)  # type: ignore[no-any-return]


def nothing(x: Tensors) -> Tensors:
    wanted = leaves(x)
    return with_gradients(0 * torch.stack([leaf.sum() for leaf in wanted]), wanted)


transposed = partial(cross_entropy_loss, transposed=True)
CROSS_ENTROPY = Mode("cross-entropy", plain_cross_entropy, plain_cross_entropy, loss_work)
NOTHING = Mode("nothing", nothing, nothing, loss_work)
OURS = {"loss": pyseq_loss, "decode": pyseq_lists}

ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(
        Mode("loss", true_loss, plain_loss, loss_work),
        Mode("decode", true_path, plain_path, decode_work, path_score),
    ),
    providers=(
        Provider("pytorch-crf", "pytorch-crf", {"loss": pytorch_crf_loss, "decode": pytorch_crf_decode}),
        Provider("torch-struct", "torch-struct", {"loss": torch_struct_loss}),
        Provider("F.cross_entropy", "torch", {"loss": cross_entropy_loss}, yardstick=CROSS_ENTROPY),
        Provider("F.cross_entropy (B, K, T)", "torch", {"loss": transposed}, yardstick=CROSS_ENTROPY),
        Provider("empty autograd.Function", "torch", {"loss": empty_loss}, yardstick=NOTHING),
        *ours(OURS),
        *ours(OURS, "cpp", variant=" (AVX2)", level=3),
        *ours({"decode": pyseq_tensors}, "numba", "cpp", "triton", variant=" (tensors)"),
    ),
    unit="tokens",
    baseline="pytorch-crf",
    headlines={"`nn.CRF` training step": ("loss", "ner"), "`nn.CRF.decode`": ("decode", "ner")},
    objection="pytorch-crf is a Python loop over time and easily beaten. The page below has higher bars: what the "
    "machine can do, F.cross_entropy as a cheaper loss on the same logits, and an empty autograd.Function.",
)
