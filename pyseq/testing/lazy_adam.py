"""Tables of embeddings to test lazy Adam on, its oracle and its budget."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyseq import explain, ops
from pyseq.kernels.lazy_adam import Tables
from pyseq.ops._backend import launcher
from pyseq.testing import assert_within, unit
from pyseq.testing.aot import Binary

# params, averages, gradients
DTYPES = (
    (torch.float32,) * 3,
    (torch.float64,) * 3,
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
)
SIZES = ((7, 5, 9), (40, 17, 300), (1, 1, 3), (9, 33, 0), (3, 64, 1500), (300, 8, 40))  # rows, width, gradients


class Way(NamedTuple):
    """How averages fade, what corrects them, and so on."""

    decay: bool = False
    row_bias: bool = False
    amsgrad: bool = False
    maximize: bool = False
    dense: bool = False
    weight_decay: float = 0.0


WAYS = (
    Way(), Way(decay=True), Way(row_bias=True, weight_decay=0.1), Way(decay=True, row_bias=True, amsgrad=True),
    Way(dense=True, maximize=True), Way(amsgrad=True, weight_decay=0.2), Way(decay=True, dense=True),
)  # fmt: skip


def smoke() -> str:
    """A step, as a fresh installation must make it; returns the backend that served."""
    table, m, v = torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)
    grad = torch.sparse_coo_tensor(torch.tensor([[2, 2]]), torch.ones(2, 2), (4, 2), check_invariants=True)
    ops.lazy_adam_update_([table], [grad], [m], [v], [torch.ones(())], lr=0.5)
    torch.testing.assert_close(table, torch.tensor([[0.0], [0.0], [-0.5], [0.0]]).expand(4, 2))
    return explain(ops.lazy_adam_update_, [table], [grad], [m], [v], [torch.ones(())]).chosen


def tables(
    size: tuple[int, int, int], dtypes: tuple[torch.dtype, ...], way: Way, step: int = 5, seed: int = 0
) -> Tables:
    """One table on the CPU in mid-training: some rows were never seen, one gradient is no number."""
    rows, width, count = size
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    seen = torch.rand(rows, generator=random) < 0.7
    last = torch.where(seen, torch.randint(1, step, (rows,), generator=random), 0).int()
    param, average, value = dtypes
    m, v = normal(rows, width) * seen.unsqueeze(1), normal(rows, width).square() * seen.unsqueeze(1)
    indices = torch.randint(rows, (count,), generator=random)
    values = normal(count, width)
    if way.dense:
        values = torch.zeros(rows, width, dtype=torch.float64).index_put((indices,), values)
    if len(values) > 5:
        values[5, width // 2] = torch.nan
    return Tables(
        [normal(rows, width).to(param)],
        [m.to(average)],
        [v.to(average)],
        [(2 * v).to(average)] if way.amsgrad else [],
        [last] if way.decay else [],
        [(last // 2 + (last > 0)).int()] if way.row_bias else [],
        [] if way.dense else [indices],
        [values.to(value)],
        [torch.tensor(float(step))],
        [torch.tensor(20_000_000_001)] if torch.bfloat16 in dtypes else [],
        torch.tensor([0.01, 0.9, 0.999, 1e-8, way.weight_decay], dtype=torch.float64),
    )


def call(given: Tables, way: Way, backend: str) -> None:
    """The public op on these tables, in place."""
    lr, beta1, beta2, eps, weight_decay = given.hyper.tolist()
    shape = given.params[0].shape
    grads = given.values
    if not way.dense:
        grads = [torch.sparse_coo_tensor(given.indices[0].unsqueeze(0), given.values[0], shape, check_invariants=True)]
    ops.lazy_adam_update_(
        given.params, grads, given.exp_avg, given.exp_avg_sq, given.steps, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, max_exp_avg_sq=given.max_exp_avg_sq, last=given.last, touches=given.touches,
        seeds=given.seeds, row_bias=way.row_bias, maximize=way.maximize, backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip


def copied(given: Tables, device: str = "cpu") -> Tables:
    return Tables(*([x.clone().to(device) for x in each] for each in given[:-1]), given.hyper.to(device))  # type: ignore[arg-type]


def exact(given: Tables, way: Way) -> dict[str, Tensor]:
    """What a step gives, in float64 and without rounding; and `seen`, the rows that it changes."""
    p, m, v = (each[0].double() for each in given[:3])
    rows, width = p.shape
    grad = given.values[0].double()
    if way.dense:
        seen = (grad != 0).any(1)
    else:
        seen = torch.zeros(rows, dtype=torch.bool)
        seen[given.indices[0]] = True
        grad = torch.zeros(rows, width, dtype=torch.float64).index_add(0, given.indices[0], grad)
    seen = seen & grad.isfinite().all(1)
    grad = torch.where(seen.unsqueeze(1), -grad if way.maximize else grad, 0.0)
    step = given.steps[0].double()
    lr, beta1, beta2, eps, weight_decay = given.hyper
    since = step - given.last[0].double() if way.decay else torch.ones(rows, dtype=torch.float64)
    age = given.touches[0].double() + 1 if way.row_bias else step.expand(rows)
    fade1, fade2, c1, c2 = (x.unsqueeze(1) for x in (beta1**since, beta2**since, 1 - beta1**age, 1 - beta2**age))
    m, v = fade1 * m + (1 - beta1) * grad, fade2 * v + (1 - beta2) * grad**2
    most = torch.maximum(given.max_exp_avg_sq[0].double(), v) if way.amsgrad else v
    w = p * (1 - lr * weight_decay) - lr / c1 * m / ((most / c2).sqrt() + eps)
    return {"params": w, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": most, "seen": seen}


def check(given: Tables, way: Way, backend: str, device: str = "cpu") -> Tables:
    """A step against float64: rows that were not seen keep every bit, of the others each number is within a few
    roundings; counters are exact."""
    found = copied(given, device)
    call(found, way, backend)
    right = exact(given, way)
    seen = right.pop("seen")
    wide = torch.float64 if given.params[0].dtype == torch.float64 else torch.float32
    lr = float(given.hyper[0])
    for name, wanted in right.items():
        for before, after in zip(getattr(given, name), getattr(found, name), strict=True):
            after = after.cpu()
            assert torch.equal(before[~seen], after[~seen]), f"{name} of a row that was not seen"
            own = 2 * unit(after.dtype) if after.dtype == torch.bfloat16 else unit(after.dtype)  # up or down
            size = wanted.abs() + (before.double().abs() if name != "params" else before.double().abs() + 10 * lr)
            budget = (own * wanted.abs() + 16 * unit(wide) * size)[seen]
            assert_within(name, after[seen], wanted[seen].numpy(), budget.numpy())
    if given.last:
        assert torch.equal(found.last[0].cpu(), torch.where(seen, given.steps[0].int(), given.last[0]))
    if given.touches:
        assert torch.equal(found.touches[0].cpu(), given.touches[0] + seen.int())
    return found


def triton_call(dtypes: tuple[torch.dtype, ...], way: Way, width: int) -> Callable[[], None]:
    """A launch on tensors that nobody reads: for those who only record it."""
    given = tables((9, width, 4), dtypes, way)
    options = way.decay, way.row_bias, way.maximize, way.dense
    return functools.partial(launcher("lazy_adam", "triton").update, given, *options)


def binaries(quick: bool) -> Iterator[Binary]:
    """What `make aot` compiles."""
    every = itertools.product(DTYPES, (5, 64), WAYS)
    some = ((DTYPES[0], 64, WAYS[0]), (DTYPES[2], 5, WAYS[3]))
    for dtypes, width, way in some if quick else every:
        labels: dict[str, str | int] = {"dtypes": "/".join(str(x)[6:] for x in dtypes), "D": width}
        labels["way"] = "+".join(name for name in way._fields[:5] if getattr(way, name)) or "plain"
        yield Binary(labels, launcher("lazy_adam", "triton"), triton_call(dtypes, way, width))


def cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `make gpu` asks of Triton first: a name, and a call that raises where a result is wrong."""
    sizes = SIZES[:1] if device == "cpu" else ((50_000, 64, 8192), (1000, 200, 3000), (7, 5, 4000))
    for size, dtypes, way in itertools.product(sizes, DTYPES, WAYS):
        name = f"lazy_adam_update_ {way} {dtypes} {size}"
        yield name, functools.partial(check, tables(size, dtypes, way), way, "triton", device)
