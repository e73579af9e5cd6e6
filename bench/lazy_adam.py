"""A step of Adam on embedding tables of which it sees few rows: other rows in every call, so that no cache flatters."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _runner import Call, Mode, Provider, Room, Tensors, Work, Workload, ours, serving
from torch import Tensor

from pyseq import ops
from pyseq.optim import LazyAdam

WORKLOADS = (
    Workload("words", {"tables": 1, "rows": 1_000_000, "D": 64, "n": 8192}, quick=True),
    Workload("zipf", {"tables": 1, "rows": 1_000_000, "D": 64, "n": 8192}),  # rows by rank, as words are
    Workload("batch", {"tables": 1, "rows": 1_000_000, "D": 64, "n": 65536}),
    Workload("wide", {"tables": 1, "rows": 100_000, "D": 128, "n": 4096}),
    Workload("features", {"tables": 40, "rows": 10_000, "D": 16, "n": 256}, quick=True),
)
SETS = 32  # of rows, in turn
LR, BETAS = 0.01, (0.9, 0.999)
EPS = 1e-15  # where it stands, in which SparseAdam differs, is not to show


def inputs(workload: Workload, device: str) -> Tensors:
    count, rows, dim, n = workload.sizes.values()
    random = torch.Generator().manual_seed(0)
    if workload.name == "zipf":
        odds = torch.rand(SETS, count, n, generator=random, dtype=torch.float64)
        indices = (rows**odds).long().clamp(max=rows) - 1
    else:
        indices = torch.randint(rows, (SETS, count, n), generator=random)
    tables = 0.1 * torch.randn(count, rows, dim, generator=random)
    values = torch.randn(count, n, dim, generator=random)
    return {"tables": tables.to(device), "indices": indices.to(device), "values": values.to(device)}


def stepped(x: Tensors) -> Tensors:
    """The rows of the first set after the first step, which is lr against the gradient's sign but for eps."""
    wide = torch.float64
    out = []
    for table, rows, values in zip(x["tables"], x["indices"][0], x["values"], strict=True):
        seen, inverse = rows.unique(return_inverse=True)
        grad = torch.zeros(len(seen), table.size(1), dtype=wide, device=table.device)
        grad = grad.index_add(0, inverse, values.to(wide)).to(values.dtype)
        m, v = (1 - BETAS[0]) * grad, (1 - BETAS[1]) * grad * grad
        step = LR / (1 - BETAS[0]) * m / ((v / (1 - BETAS[1])).sqrt() + EPS)
        out.append((table[seen] - step).flatten())
    return {"rows": torch.cat(out)}


def adagrad(x: Tensors) -> Tensors:
    """The same of row-wise Adagrad, which keeps one number a row."""
    out = []
    for table, rows, values in zip(x["tables"], x["indices"][0], x["values"], strict=True):
        seen, inverse = rows.unique(return_inverse=True)
        grad = torch.zeros(len(seen), table.size(1), dtype=values.dtype).index_add(0, inverse, values)
        out.append((table[seen] - LR * grad / (grad.square().mean(1, keepdim=True).sqrt() + EPS)).flatten())
    return {"rows": torch.cat(out)}


def viewed(x: Tensors, found: list[Tensor]) -> Tensors:
    """Of tables as they are after one call."""
    if isinstance(found, dict):
        return found
    return {"rows": torch.cat([p[rows.unique()].flatten() for p, rows in zip(found, x["indices"][0], strict=True)])}


def work(x: Tensors) -> Work:
    """Gradients read; weights and two averages of the rows seen read and written."""
    seen = sum(rows.unique().numel() for rows in x["indices"][0])
    _, n, dim = x["values"].shape
    count = len(x["tables"])
    return Work(units=count * n, fmas=0, bytes=4 * dim * (6 * seen + count * n) + 8 * count * n)


def dense_work(x: Tensors) -> Work:
    """Weights and two averages read and written, gradients read."""
    return Work(units=work(x).units, fmas=0, bytes=28 * x["tables"].numel())


def steps(x: Tensors, make: Callable[[list[Tensor]], Any], sparse: bool = True) -> Call:
    """Whole steps of an optimizer, each with the next set of rows."""
    params = [torch.nn.Parameter(table.clone()) for table in x["tables"]]
    opt = make(params)  # type: ignore[arg-type]
    for p in params:  # memory that was never written is slow once
        state = opt.state[p]
        if isinstance(opt, torch.optim.SparseAdam):
            state |= {"step": 0, "exp_avg": torch.empty_like(p.data), "exp_avg_sq": torch.empty_like(p.data)}
        for average in (state.get("exp_avg"), state.get("exp_avg_sq")):
            if average is not None:
                average.detach().fill_(0)
    grads = [
        [
            torch.sparse_coo_tensor(rows.unsqueeze(0), values, p.shape, check_invariants=False)
            for p, rows, values in zip(params, each, x["values"], strict=True)
        ]
        for each in x["indices"]
    ]
    turn = itertools.cycle(grads)
    if not sparse:
        dense = [g.to_dense() for g in grads[0]]
        turn = itertools.cycle([dense])

    def call() -> list[Tensor]:
        for p, grad in zip(params, next(turn), strict=True):
            p.grad = grad
        opt.step()
        return [p.detach() for p in params]

    return call


def lazy(x: Tensors) -> Call:
    serving(ops.lazy_adam_update_, [x["tables"][0]])
    return steps(x, lambda params: LazyAdam(params, LR, BETAS, EPS))


def lazy_decay(x: Tensors) -> Call:
    return steps(x, lambda params: LazyAdam(params, LR, BETAS, EPS, semantics="decay"))


def sparse_adam(x: Tensors) -> Call:
    return steps(x, lambda params: torch.optim.SparseAdam(params, LR, BETAS, EPS))


def dense_adam(x: Tensors) -> Call:
    """With gradients that are dense already: making them so costs as much again."""
    return steps(x, lambda params: torch.optim.Adam(params, LR, BETAS, EPS, fused=True), sparse=False)


def dense_foreach(x: Tensors) -> Call:
    return steps(x, lambda params: torch.optim.Adam(params, LR, BETAS, EPS, foreach=True), sparse=False)


def lazy_dense(x: Tensors) -> Call:
    """By torch's kernel; no backend takes part."""
    return steps(x, lambda params: LazyAdam(params, LR, BETAS, EPS), sparse=False)


def fbgemm(x: Tensors) -> Call:
    """With its look-up, for the update is a part of its backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as tables
    (_, n, dim), rows = x["values"].shape, x["tables"].size(1)
    one = (rows, dim, tables.EmbeddingLocation.HOST, tables.ComputeDevice.CPU)
    kind = tables.OptimType.EXACT_ROWWISE_ADAGRAD
    module = tables.SplitTableBatchedEmbeddingBagsCodegen(
        [one] * len(x["tables"]), optimizer=kind, learning_rate=LR, eps=EPS
    )
    weights = module.split_embedding_weights()
    for weight, table in zip(weights, x["tables"], strict=True):
        weight.copy_(table)
    offsets = torch.arange(x["indices"][0].numel() + 1)
    grad = x["values"].transpose(0, 1).reshape(n, -1)
    turn = itertools.cycle([rows.flatten() for rows in x["indices"]])

    def call() -> list[Tensor]:
        module(next(turn), offsets).backward(grad)
        return weights  # type: ignore[no-any-return]

    return call


ADAGRAD = Mode("Adagrad", adagrad, adagrad, work, viewed)

ROOM = Room(
    workloads=WORKLOADS,
    inputs=inputs,
    modes=(Mode("step", stepped, stepped, work, viewed), Mode("dense", stepped, stepped, dense_work, viewed)),
    providers=(
        Provider("torch.optim", "torch", {"step": sparse_adam, "dense": dense_foreach}),
        Provider("Adam(fused)", "torch", {"step": dense_adam}),
        *ours({"step": lazy}, "reference", "numba"),
        *ours({"step": lazy, "dense": lazy_dense}, "cpp"),
        *ours({"step": lazy}, "triton"),
        *ours({"step": lazy_decay}, "cpp", variant=" (decay)"),
        Provider("FBGEMM row-wise Adagrad", "fbgemm-gpu-cpu", {"step": fbgemm}, yardstick=ADAGRAD),
    ),
    unit="gradients",
    baseline="torch.optim",
    headlines={"`optim.LazyAdam` step": ("step", "words")},
    objection="torch.optim is SparseAdam, for dense parameters Adam(foreach=True). SparseAdam is Python over many "
    "operations, each a pass; its eps acts otherwise. The rows of a step come anew out of memory, so nobody can be "
    "faster than the time of their bytes, to which the table holds us.",
)
