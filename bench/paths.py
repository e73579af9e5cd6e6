"""Linear-chain CRF: five best paths, a hundred samples, and the entropy with its gradients, against torch-struct."""

from typing import Any

import chain
import torch
from _runner import Call, Mode, Provider, Room, Tensors, Unavailable, Work, Workload, ours, serving
from torch import Tensor
from torch.nn.functional import pad

from pyseq import ops
from pyseq.reference import chain as reference
from pyseq.reference import chain_paths

BEST, SAMPLES = 5, 100
WORKLOADS = (
    Workload("ner", {"B": 64, "T": 256, "K": 9}, quick=True),
    Workload("pos", {"B": 64, "T": 128, "K": 32}, quick=True),
    Workload("fine", {"B": 8, "T": 64, "K": 128}),
)


def scores(x: Tensors) -> list[Tensor]:
    return [x["emissions"], *(x[name] for name in chain.PARAMETERS), x["mask"]]


def edges(x: Tensors, emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """torch-struct's potentials (B, T - 1, K, K), previous tags last."""
    final = torch.arange(1, emissions.size(1), device=emissions.device) == x["lengths"][:, None] - 1
    first = pad(start + emissions[:, :1], (0, 0, 0, emissions.size(1) - 2)).unsqueeze(2)
    return transitions.t() + emissions[:, 1:].unsqueeze(3) + first + (final[..., None] * end).unsqueeze(3)


def crf(x: Tensors, leaves: list[Tensor]) -> Any:
    import torch_struct

    torch_struct.LinearChainCRF.arg_constraints = {}  # torch asks for them, and warns
    return torch_struct.LinearChainCRF(edges(x, *leaves), lengths=x["lengths"])


def path_scores(x: Tensors, tags: Any) -> Tensors:
    """(B, N, T), or torch-struct's parts (N, B, T - 1, K, K), best first; their scores in float64."""
    if tags.dim() == 5:
        score = (tags.double() * edges(x, *scores(x)[:4])).flatten(2).sum(2).T
        return {"score": score, "covered": x["lengths"].unsqueeze(1) == 1 + tags.sum((2, 3, 4)).T}
    live = x["mask"]
    each = [
        reference.crf_score(x["emissions"], x["transitions"], path.clamp(min=0), x["start"], x["end"], live)
        for path in tags.unbind(1)
    ]
    return {"score": torch.stack(each, 1), "covered": ((tags >= 0) == live.unsqueeze(1)).all(2)}


def true_best(x: Tensors) -> Tensors:
    e, t, start, end, live = scores(x)
    return path_scores(x, chain_paths.viterbi_n_best(e, t, start, end, live, BEST)[1])


def plain_best(x: Tensors) -> Tensor:
    e, t, start, end, live = scores(x)
    return chain_paths.viterbi_n_best(e, t, start, end, live, BEST)[1]


def frequencies(x: Tensors, tags: Any) -> Tensors:
    """How often each tag is at each step (B, T, K), whose errors are those of a hundred draws."""
    if tags.dim() == 5:
        pairs = tags.mean(0)
        here = torch.cat((pairs[:, :1].sum(2), pairs.sum(3)), 1).double()
    else:
        here = torch.stack([(tags == k).double().mean(1) for k in range(x["transitions"].size(0))], 2)
    return {"frequency": here}


def true_samples(x: Tensors) -> Tensors:
    e, t, start, end, live = scores(x)
    return {"frequency": ops.crf_marginals(e, t, start, end, live, backend="reference")}


def plain_samples(x: Tensors) -> Tensor:
    """Drawn backward in the inputs' dtype."""
    e, t, start, end, live = scores(x)
    alphas = [start + e[:, 0]]
    for k in range(1, e.size(1)):
        later = e[:, k] + (alphas[-1].unsqueeze(2) + t).logsumexp(1)
        alphas.append(torch.where(live[:, k, None], later, alphas[-1]))
    random = torch.Generator(e.device).manual_seed(0)
    tags = torch.multinomial((alphas[-1] + end).softmax(1), SAMPLES, replacement=True, generator=random)
    paths = [torch.where(live[:, -1:], tags, -1)]
    for k in reversed(range(e.size(1) - 1)):
        into = (alphas[k].unsqueeze(1) + t.mT[tags]).softmax(2).flatten(0, 1)
        drawn = torch.multinomial(into, 1, generator=random).view_as(tags)
        tags = torch.where(live[:, k + 1, None], drawn, tags)
        paths.append(torch.where(live[:, k, None], tags, -1))
    return torch.stack(paths[::-1], 2)


def with_gradients(value: Tensor, wanted: list[Tensor]) -> Tensors:
    return {
        "entropy": value.detach(),
        **dict(zip(chain.GRADIENTS, torch.autograd.grad(value.sum(), wanted), strict=True)),
    }


def true_entropy(x: Tensors) -> Tensors:
    e, t, start, end = wanted = chain.leaves(x)
    return with_gradients(chain_paths.crf_entropy(e, t, start, end, x["mask"]), wanted)


def plain_entropy(x: Tensors) -> Tensors:
    """log Z less the mean score, in the inputs' dtype, by autograd."""
    wanted = chain.leaves(x)
    potentials = edges(x, *wanted)
    alpha = potentials.new_zeros(potentials.shape[:1] + potentials.shape[3:])
    for t in range(potentials.size(1)):
        later = (alpha.unsqueeze(1) + potentials[:, t]).logsumexp(2)
        alpha = torch.where(x["mask"][:, t + 1, None], later, alpha)
    log_z = alpha.logsumexp(1)
    (marginals,) = torch.autograd.grad(log_z.sum(), potentials, create_graph=True)
    return with_gradients(log_z - (marginals * potentials).sum((1, 2, 3)), wanted)


def best_work(x: Tensors) -> Work:
    """One K x K max-product a live step; live emissions read, int64 tags written."""
    tokens, tags = int(x["lengths"].sum()), x["transitions"].size(0)
    return Work(units=tokens, fmas=tokens * tags**2, bytes=4 * tokens * tags + 8 * BEST * x["tags"].numel())


def samples_work(x: Tensors) -> Work:
    """One K x K product a live step; live emissions read, int64 tags written."""
    tokens, tags = int(x["lengths"].sum()), x["transitions"].size(0)
    return Work(units=tokens, fmas=tokens * tags**2, bytes=4 * tokens * tags + 8 * SAMPLES * x["tags"].numel())


def pyseq_best(x: Tensors) -> Call:
    e, t, start, end, live = scores(x)
    if serving(ops.viterbi, e, t, start, end, live) == "triton":
        raise Unavailable("there is no triton kernel for n-best")
    return lambda: ops.viterbi(e, t, start, end, live, n_best=BEST)[1]


def pyseq_samples(x: Tensors) -> Call:
    e, t, start, end, live = scores(x)
    serving(ops.crf_sample, e, t, start, end, live)
    return lambda: ops.crf_sample(e, t, start, end, live, num_samples=SAMPLES)


def pyseq_entropy(x: Tensors) -> Call:
    e, t, start, end = wanted = chain.leaves(x)
    serving(ops.crf_entropy, e, t, start, end, x["mask"])
    return lambda: with_gradients(ops.crf_entropy(e, t, start, end, x["mask"]), wanted)


def viterbi(x: Tensors) -> Call:
    e, t, start, end, live = scores(x)
    return lambda: ops.viterbi(e, t, start, end, live)[1].unsqueeze(1)


def true_viterbi(x: Tensors) -> Tensors:
    e, t, start, end, live = scores(x)
    return path_scores(x, reference.viterbi(e, t, start, end, live)[1].unsqueeze(1))


def plain_viterbi(x: Tensors) -> Tensor:
    return chain.plain_path(x).unsqueeze(1)


def forward_pass(x: Tensors) -> Call:
    e, t, start, end, live = scores(x)
    return lambda: {"log Z": ops.crf_log_partition(e, t, start, end, live)}


def true_forward(x: Tensors) -> Tensors:
    e, t, start, end, live = scores(x)
    return {"log Z": reference.crf_log_partition(e, t, start, end, live)}


def struct_best(x: Tensors) -> Call:
    return lambda: crf(x, scores(x)[:4]).topk(BEST)


def struct_samples(x: Tensors) -> Call:
    return lambda: crf(x, scores(x)[:4]).sample((SAMPLES,))


def struct_entropy(x: Tensors) -> Call:
    wanted = chain.leaves(x)
    return lambda: with_gradients(crf(x, wanted).entropy, wanted)


ONE_BEST = Mode("one best", true_viterbi, plain_viterbi, best_work, path_scores)
FORWARD = Mode("forward pass", true_forward, true_forward, best_work)

ROOM = Room(
    workloads=WORKLOADS,
    inputs=chain.inputs,
    modes=(
        Mode("5 best", true_best, plain_best, best_work, path_scores),
        Mode("100 samples", true_samples, plain_samples, samples_work, frequencies),
        Mode("entropy", true_entropy, plain_entropy, chain.loss_work),
    ),
    providers=(
        Provider(
            "torch-struct", "torch-struct",
            {"5 best": struct_best, "100 samples": struct_samples, "entropy": struct_entropy},
        ),
        Provider("ops.viterbi", "pyseq", {"5 best": viterbi}, yardstick=ONE_BEST),
        Provider("ops.crf_log_partition", "pyseq", {"100 samples": forward_pass}, yardstick=FORWARD),
        *ours({"5 best": pyseq_best, "100 samples": pyseq_samples, "entropy": pyseq_entropy}),
    ),
    unit="tokens",
    baseline="torch-struct",
    headlines={"`ops.crf_entropy` with gradients": ("entropy", "ner")},
    objection="torch-struct serves every semiring from one recursion over B x T x K x K potentials, and is not built "
    "for this one. The rows of ours beside it, one best path and one forward pass, are the harder bar.",
)  # fmt: skip
