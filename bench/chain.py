"""Linear-chain CRF: a training step and a decode, against pytorch-crf, torch-struct and cross-entropy."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Unavailable, Work, Workload
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import pyseq
from pyseq import ops
from pyseq.nn import CRF
from pyseq.ops._backend import launcher
from pyseq.reference import chain as reference

PARAMETERS = ("transitions", "start", "end")
GRADIENTS = ("grad emissions", *(f"grad {name}" for name in PARAMETERS))


def workload(name: str, batch: int, time: int, tags: int, quick: bool = False) -> Workload:
    return Workload(name, {"B": batch, "T": time, "K": tags}, quick)


WORKLOADS = (
    workload("tiny", 1, 2, 2),  # what a call costs before it computes
    workload("ner", 64, 256, 9, quick=True),  # CoNLL-2003 tags in BIO, paragraphs
    workload("ner-small", 32, 128, 9, quick=True),  # the same, sentences
    workload("pos", 64, 128, 32, quick=True),  # part of speech
    workload("fine", 32, 128, 128),  # fine-grained entities, morphology
    workload("wide", 16, 64, 512),  # supertags
    workload("long", 4, 16384, 9),  # documents, genomes, audio frames
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


def fill(crf: Any, x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Copies the scores into a module of either library; returns its parameters in our order."""
    parameters = crf.transitions, crf.start_transitions, crf.end_transitions
    with torch.no_grad():
        for parameter, name in zip(parameters, PARAMETERS, strict=True):
            parameter.copy_(x[name])
    return parameters


def ours(backend: str, lists: bool = True, level: int = 0) -> dict[str, Callable[[Tensors], Call]]:
    """`pyseq.nn.CRF` on one backend, which each call names in the environment as `PYSEQ_BACKEND`; level: of the C++."""

    def module(x: Tensors) -> CRF:
        if backend == "reference" and x["emissions"].size(1) > 4096:
            raise Unavailable("the reference is the oracle, too slow to time at this length")
        if reasons := pyseq.explain(ops.crf_nll, x["emissions"])[backend]:
            raise Unavailable("; ".join(reasons))
        if level and level >= importlib.import_module("pyseq._C").cpu_level():
            raise Unavailable("this CPU has no higher level")
        crf = CRF(x["transitions"].size(0), batch_first=True).to(x["emissions"].device)
        fill(crf, x)
        return crf

    def forced(method: Callable[..., Any], *args: Any) -> Any:
        os.environ["PYSEQ_BACKEND"] = backend
        if backend == "cpp":
            setattr(launcher("chain", "cpp"), "LEVEL", level)  # noqa: B010 (a module, to mypy)
        return method(*args)

    def loss(x: Tensors) -> Call:
        crf, emissions = module(x), x["emissions"].requires_grad_()
        parameters = crf.transitions, crf.start_transitions, crf.end_transitions
        return step(lambda: forced(crf.nll, emissions, x["tags"], x["mask"], "sum"), emissions, *parameters)

    def decode(x: Tensors) -> Call:
        crf = module(x)
        if lists:
            return lambda: forced(crf.decode, x["emissions"], x["mask"])
        return lambda: forced(crf.viterbi, x["emissions"], x["mask"])[1]

    return {"loss": loss, "decode": decode} if lists else {"decode": decode}


def pytorch_crf(x: Tensors) -> Any:
    import torchcrf

    crf = torchcrf.CRF(x["transitions"].size(0), batch_first=True).to(x["emissions"].device)
    return crf, fill(crf, x)


def pytorch_crf_loss(x: Tensors) -> Call:
    (crf, parameters), emissions = pytorch_crf(x), x["emissions"].requires_grad_()
    return step(lambda: -crf(emissions, x["tags"], mask=x["mask"]), emissions, *parameters)


def pytorch_crf_decode(x: Tensors) -> Call:
    crf, _ = pytorch_crf(x)

    def call() -> list[list[int]]:
        with torch.no_grad():
            return crf.decode(x["emissions"], mask=x["mask"])  # type: ignore[no-any-return]

    return call


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


def cross_entropy_loss(x: Tensors) -> Call:
    emissions = x["emissions"].requires_grad_()
    target = x["tags"].masked_fill(~x["mask"], -100).flatten()
    return step(lambda: cross_entropy(emissions.flatten(0, 1), target, reduction="sum"), emissions)


def cross_entropy_transposed_loss(x: Tensors) -> Call:
    """Classes in the second dimension, a view: torch's fastest form on the CPU."""
    emissions = x["emissions"].requires_grad_()
    target = x["tags"].masked_fill(~x["mask"], -100)
    return step(lambda: cross_entropy(emissions.transpose(1, 2), target, reduction="sum"), emissions)


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


OURS = {"pyseq reference": "reference", "pyseq numba": "numba", "pyseq cpp": "cpp", "pyseq triton": "triton"}

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
        Provider(
            "F.cross_entropy",
            "torch",
            {"loss": cross_entropy_loss},
            yardstick=Mode("cross-entropy", plain_cross_entropy, plain_cross_entropy, loss_work),
        ),
        Provider(
            "F.cross_entropy (B, K, T)",
            "torch",
            {"loss": cross_entropy_transposed_loss},
            yardstick=Mode("cross-entropy", plain_cross_entropy, plain_cross_entropy, loss_work),
        ),
        Provider(
            "empty autograd.Function",
            "torch",
            {"loss": empty_loss},
            yardstick=Mode("nothing", nothing, nothing, loss_work),
        ),
        *(Provider(name, "pyseq", ours(backend), ours=True) for name, backend in OURS.items()),
        Provider("pyseq cpp (AVX2)", "pyseq", ours("cpp", level=3), ours=True),
        *(Provider(f"{name} (tensors)", "pyseq", ours(OURS[name], lists=False), True) for name in list(OURS)[1:]),
    ),
    unit="tokens",
    baseline="pytorch-crf",
    objection=(
        "Lengths are uniform between T / 2 and T. "
        "pytorch-crf is a Python loop over time, so a large ratio to it is easy to reach. Read the times beside "
        "F.cross_entropy, a cheaper loss on the same logits, and beside the limit of the machine: those bars are high. "
        "An empty autograd.Function with a CRF's arguments and gradients shows what torch takes for itself. "
        "The inputs are the same at every call, so small ones stay in the cache, as they do behind an encoder."
    ),
)
