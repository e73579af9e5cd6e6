"""Adam for the rows of embedding tables that a step has seen, over lists of tables."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from pyseq.kernels.lazy_adam import Tables
from pyseq.ops import _lazy_adam
from pyseq.ops._backend import Backend
from pyseq.ops._lazy_adam import BACKENDS


@BACKENDS.op
def lazy_adam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_exp_avg_sq: Sequence[Tensor] = (),
    last: Sequence[Tensor] = (),
    touches: Sequence[Tensor] = (),
    seeds: Sequence[Tensor] = (),
    row_bias: bool = False,
    maximize: bool = False,
    backend: Backend = "auto",
) -> None:
    """One step of Adam in place, in the rows that have a gradient and in no others.

    params: tables (V, D) float32, float64 or bfloat16, contiguous, V below 2^31, all on one device. grads: as many,
    all sparse COO of one sparse dimension, coalesced or not (gradients of one row are added up), or all dense
    (V, D), of which rows of zeros count as not seen; of the table's dtype, or float32 beside bfloat16. exp_avg,
    exp_avg_sq: as params, float64 beside float64, else float32 or bfloat16. steps: float32 scalars, the number of
    this step, from 1. max_exp_avg_sq: as exp_avg_sq; empty without amsgrad.
    last: int32 (V,), the last step that saw each row, 0 for none; then averages fade for each step between, as if
    dense; empty: they keep. touches: int32 (V,), how often rows were seen, counted here; empty: not counted.
    row_bias: the bias of averages is corrected by touches instead of steps, so no step of a row exceeds about lr.
    lr: a number or a scalar tensor. weight_decay: decoupled, once for a row that is seen.
    seeds: int64 scalars, needed beside bfloat16: those numbers are rounded up or down at random, by a hash of seed,
    step and element, the same on every device; torch's generator is not used.
    A row whose gradient is not finite is left alone. Computed in float64 for float64 tables, else in float32;
    gradients of one row are added up in float64, in their order: the same bits for any number of threads.
    Outside of autograd; graphs that saved a table raise in backward.
    Raises ValueError for numbers out of range, other numbers of tensors, shapes, devices and, on the CPU, for rows out
    of range, TypeError for another dtype. Nothing is written then. On CUDA and in graphs rows out of range are skipped.
    Time and traffic: n gradients sorted and read once, the rows of params and averages read and written once; memory
    O(n) integers. Source: Kingma and Ba 2015, "Adam", algorithm 1; Loshchilov and Hutter 2019 for weight_decay.

    >>> table, m, v = torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)
    >>> rows, values = torch.tensor([[2, 2]]), torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    >>> grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    >>> ops.lazy_adam_update_([table], [grad], [m], [v], [torch.tensor(1.0)], lr=0.1)
    >>> table
    tensor([[ 0.0000,  0.0000],
            [ 0.0000,  0.0000],
            [-0.1000, -0.1000],
            [ 0.0000,  0.0000]])
    """
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor) or grad.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"grads[{i}] must be a dense or a sparse COO tensor, got {type(grad).__name__}")
        if grad.is_sparse != grads[0].is_sparse:
            raise ValueError(f"grads must be all sparse or all dense; grads[0] and grads[{i}] differ")
        if grad.is_sparse and grad.sparse_dim() != 1:
            raise ValueError(f"grads[{i}] must have one sparse dimension, the rows, got {grad.sparse_dim()}")
    for name, x, most in (
        ("lr", lr, math.inf), ("beta1", beta1, 1), ("beta2", beta2, 1), ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
    ):  # fmt: skip
        if not isinstance(x, Tensor) and not (isinstance(x, Real) and 0 <= x < most):
            raise ValueError(f"{name} must be a number from 0 and below {most}, got {x!r}")
    if len(grads) != len(params):
        raise ValueError(f"grads must be as many as params, got {len(grads)} and {len(params)}")
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad.shape != p.shape:
            raise ValueError(f"grads[{i}] must have the shape {(*p.shape,)} of params[{i}], got {(*grad.shape,)}")
    dense = not grads or not grads[0].is_sparse
    indices = [] if dense else [grad._indices()[0] for grad in grads]
    values = list(grads) if dense else [grad._values() for grad in grads]
    averages = list(exp_avg), list(exp_avg_sq), list(max_exp_avg_sq)
    hyper = hyper_of(params[0] if params else None, lr, beta1, beta2, eps, weight_decay)
    tables = Tables(
        list(params), *averages, list(last), list(touches), indices, values, list(steps), list(seeds), hyper
    )
    _lazy_adam.update(tables, bool(last), row_bias, maximize, dense, backend)


def hyper_of(lead: Tensor | None, lr: float | Tensor, *rest: float) -> Tensor:
    """The numbers of a call, on the device of its tables."""
    device = None if lead is None else lead.device
    if not isinstance(lr, Tensor):
        return torch.tensor([lr, *rest], dtype=torch.float64).to(device, non_blocking=True)
    others = torch.tensor(rest, dtype=torch.float64).to(device, non_blocking=True)
    return torch.cat([lr.detach().to(device, torch.float64).view(1), others])
