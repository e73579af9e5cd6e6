"""Lookahead's synchronisation, against the two foreach calls of other libraries, an axpy, and the step it follows."""

from functools import partial

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor, nn

from pyseq import ops
from pyseq.optim import Lookahead
from pyseq.reference import lookahead as reference

ALPHA = 0.5

WORKLOADS = (
    Workload("large", {"tensors": 24, "N": 25_000_000}),  # a small language model
    Workload("many", {"tensors": 460, "N": 2_200_000}, quick=True),  # a deep, narrow network
    Workload("scalars", {"tensors": 10_000, "N": 10_000}, quick=True),  # what a tensor costs
)


def inputs(workload: Workload, device: str) -> Tensors:
    count, total = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    shape = (total // count,) if total > count else ()
    names = [f"{kind} {i}" for kind in ("fast", "slow") for i in range(count)]
    return {name: torch.randn(shape, generator=random).to(device) for name in names}


def lists(x: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Fast and slow."""
    return tuple([t for name, t in x.items() if name.startswith(kind)] for kind in ("fast", "slow"))  # type: ignore[return-value]


def whole(x: Tensors, result: object) -> Tensors:
    return {kind: torch.stack(each) for kind, each in zip(("fast", "slow"), result, strict=True)}  # type: ignore[call-overload]


def updated(x: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    fast, slow = ([t.clone() for t in each] for each in lists(x))
    reference.lookahead_update_(fast, slow, ALPHA)
    return fast, slow


def work(x: Tensors) -> Work:
    """Both read and written once; of a parameter three operations."""
    count = sum(t.numel() for t in lists(x)[0])
    return Work(units=count, fmas=2 * count, bytes=4 * lists(x)[0][0].element_size() * count)


def pyseq_update(x: Tensors) -> Call:
    fast, slow = lists(x)
    serving(ops.lookahead_update_, fast, slow)

    def call() -> tuple[list[Tensor], list[Tensor]]:
        ops.lookahead_update_(fast, slow, ALPHA)
        return fast, slow

    return call


def pyseq_step(x: Tensors) -> Call:
    """A step whose inner optimizer moves nothing, for want of gradients."""
    fast, slow = lists(x)
    params = [nn.Parameter(p) for p in slow]
    opt = Lookahead(torch.optim.SGD(params, lr=0.0), k=2, alpha=ALPHA)
    opt.step()  # takes the slow weights
    for group in opt.param_groups:
        group["lookahead_k"] = 1
    for p, now in zip(params, fast, strict=True):
        p.data = now
    kept = [opt.state[p]["lookahead_slow"] for p in params]

    def call() -> tuple[list[Tensor], list[Tensor]]:
        opt.step()
        return fast, kept

    return call


def foreach(x: Tensors) -> Call:
    fast, slow = lists(x)

    def call() -> tuple[list[Tensor], list[Tensor]]:
        torch._foreach_lerp_(slow, fast, ALPHA)
        torch._foreach_copy_(fast, slow)
        return fast, slow

    return call


def pytorch_optimizer(x: Tensors) -> Call:
    import pytorch_optimizer as library

    fast, slow = lists(x)
    params = [nn.Parameter(p) for p in fast]
    opt = library.Lookahead(torch.optim.SGD(params, lr=0.0), alpha=ALPHA)
    for p, start in zip(params, slow, strict=True):
        p.grad = torch.zeros_like(p)
        opt.state[p]["slow_params"] = start

    def call() -> tuple[list[Tensor], list[Tensor]]:
        opt.update(opt.param_groups[0])
        return fast, slow

    return call


def axpy(x: Tensors) -> Call:
    y, z = (torch.stack(each) for each in lists(x))
    return lambda: {"y": y.add_(z, alpha=ALPHA)}


def true_axpy(x: Tensors) -> Tensors:
    y, z = (torch.stack(each) for each in lists(x))
    return {"y": y + ALPHA * z}


def adamw(x: Tensors, fused: bool | None) -> Call:
    """Checked by its first tensor alone."""
    params = [nn.Parameter(p) for p in lists(x)[0]]
    opt = torch.optim.AdamW(params, fused=fused)
    for p, grad in zip(params, lists(x)[1], strict=True):
        p.grad = grad

    def call() -> Tensors:
        opt.step()
        return {"first": params[0].detach()}

    return call


def true_adamw(x: Tensors) -> Tensors:
    result: Tensors = adamw({name: t.clone() for name, t in x.items() if name.endswith(" 0")}, fused=None)()
    return result


AXPY = Mode("axpy", true_axpy, true_axpy, work)
ADAMW = Mode("AdamW", true_adamw, true_adamw, work)
UPDATE = {"update": pyseq_update}

ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(Mode("update", lambda x: whole(x, updated(x)), updated, work, whole),),
    providers=(
        Provider("foreach", "torch", {"update": foreach}),
        Provider("pytorch-optimizer", "pytorch-optimizer", {"update": pytorch_optimizer}),
        Provider("in-place axpy", "torch", {"update": axpy}, yardstick=AXPY),
        Provider("AdamW(fused) step", "torch", {"update": partial(adamw, fused=True)}, yardstick=ADAMW),
        Provider("AdamW step", "torch", {"update": partial(adamw, fused=None)}, yardstick=ADAMW),
        *ours(UPDATE),
        *ours({"update": pyseq_step}, "cpp", variant=" (optimizer)"),
    ),
    unit="parameters",
    baseline="foreach",
    headlines={"`ops.lookahead_update_`": ("update", "large")},
    objection="two foreach calls are what the best other libraries make; both are bound by memory, so no more than two "
    "to three times can be won, and at k = 5 a synchronisation is a small part of five steps of any optimizer.",
)
