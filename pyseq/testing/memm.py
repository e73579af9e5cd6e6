"""Problems of maximum-entropy Markov models, and their losses by torch's own cross entropy, one sequence at a time."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyseq import ops
from pyseq.kernels.chain import LocalSteps
from pyseq.testing import assert_within, unit
from pyseq.testing.aot import Binary

KERNELS = "pyseq.kernels.chain._memm_triton"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """The arguments of memm_nll, and weights of the sequences."""

    emissions: Tensor
    transitions: Any  # a tensor, or a pair
    tags: Tensor
    mask: Tensor | None = None
    lengths: Tensor | None = None
    direction: Any = "both"
    variant: Any = "sum"
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    token_weight: Tensor | None = None

    def to(self, device: str) -> "Problem":
        def moved(x: Any) -> Any:
            return tuple(map(moved, x)) if isinstance(x, tuple) else x.to(device) if isinstance(x, Tensor) else x

        return Problem(*map(moved, self))

    @property
    def scores(self) -> list[Tensor]:
        pair = isinstance(self.transitions, tuple)
        return [self.emissions, *(self.transitions if pair else [self.transitions])]

    def of(self, scores: list[Tensor]) -> "Problem":
        return self._replace(emissions=scores[0], transitions=tuple(scores[1:]) if len(scores) == 3 else scores[1])

    def nll(self, backend: Any = "auto") -> Tensor:
        options = self._asdict()
        given = [options.pop(name) for name in ("emissions", "transitions", "tags", "mask")]
        return ops.memm_nll(*given, **options, backend=backend)

    def live(self) -> Tensor:
        batch, time = self.tags.shape
        if self.mask is not None:
            return self.mask
        lengths = torch.full((batch,), time) if self.lengths is None else self.lengths
        return torch.arange(time) < lengths.unsqueeze(1)


def problem(
    batch: int, time: int, num_tags: int, kind: int = 0, dtype: torch.dtype = torch.float32, rank: int = 0
) -> Problem:
    """On the CPU; kind: which way, which live steps, and what else, in turn."""
    random = torch.Generator().manual_seed(kind)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    g = tuple(normal(num_tags, rank).to(wide) for _ in range(2)) if rank else normal(num_tags, num_tags).to(wide)
    tags = torch.randint(num_tags, (batch, time), generator=random)
    out = Problem((2 * normal(batch, time, num_tags)).to(dtype), g, tags)
    out = out._replace(direction=("both", "forward", "backward")[kind % 3], variant=("sum", "mean")[kind % 2])
    if kind % 4 == 1:
        out = out._replace(mask=torch.rand(batch, time, generator=random) < 0.7)
    if kind % 4 == 2:
        out = out._replace(lengths=torch.randint(time + 1, (batch,), generator=random))
    if kind % 5 in (2, 3):
        out = out._replace(label_smoothing=0.3, weight=normal(num_tags).abs().to(wide))
    if kind % 5 in (3, 4):
        out = out._replace(token_weight=normal(batch, time).to(wide))
    return out


def exact(p: Problem) -> Tensor:
    """(B,) float64, differentiable."""
    f = p.emissions.double()
    pair = isinstance(p.transitions, tuple)
    g = p.transitions[0].double() @ p.transitions[1].double().mT if pair else p.transitions.double()
    weight = None if p.weight is None else p.weight.double()
    h, total = 0.5 if p.variant == "mean" else 1.0, []
    for b, live in enumerate(p.live()):
        steps = live.nonzero().view(-1).tolist()
        y = p.tags[b, steps]
        token = torch.ones(len(steps)).double() if p.token_weight is None else p.token_weight[b, steps].double()
        losses = [f[b, :0].sum()]
        for back in (False, True):
            if p.direction == ("forward" if back else "backward"):
                continue
            order = range(len(steps))[:: -1 if back else 1]
            for i, k in enumerate(order):
                logits = f[b, steps[k]]
                if i:
                    before = y[order[i - 1]]
                    logits = (logits + (g[:, before] if back else g[before])) * h
                loss = cross_entropy(logits, y[k], weight, reduction="none", label_smoothing=p.label_smoothing)
                losses.append(loss * token[k] * (0.5 if p.direction == "both" else 1.0))
        total.append(torch.stack(losses).sum())
    return torch.stack(total) if total else f.sum((1, 2))


def derived(p: Problem, run: Callable[[Problem], Tensor], up: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in p.scores]
    value = run(p.of(leaves))
    return value.detach(), list(torch.autograd.grad(value, leaves, up.to(value), materialize_grads=True))


def check(p: Problem, backend: str, device: str = "cpu") -> None:
    """Values and gradients, of weighed sequences and of their sum, within twice the error of plain float32 torch and
    some roundings of what is added up."""
    batch, time, num_tags = p.emissions.shape
    for up in (torch.ones(batch), torch.randn(batch, generator=torch.Generator().manual_seed(1))):
        value, grads = derived(p.of([x.double() for x in p.scores]), exact, up.double())
        plain, plain_grads = derived(p, functools.partial(Problem.nll, backend="reference"), up)
        found, own = derived(p.to(device), functools.partial(Problem.nll, backend=backend), up.to(device))
        u = unit(plain.dtype)
        room = 2 * (plain.double() - value).abs() + u * (8 + num_tags) * (1 + value.abs() + time)
        assert_within("value", found, value.numpy(), room.numpy())
        many = batch * time * float(up.abs().max() if batch else 0) * (1 if p.token_weight is None else 3)
        for x, y, right, given in zip(own, plain_grads, grads, p.scores, strict=True):
            largest = float(right.abs().max()) if right.numel() else 0.0
            band = u * (16 + num_tags) * (1 if x is own[0] else 1 + many) * (1 + largest)
            room = 2 * (y.double() - right).abs() + band + unit(given.dtype) * right.abs()
            assert_within("gradient", x.double(), right.numpy(), room.numpy())


def triton_call(dtype: torch.dtype, num_tags: int, smoothing: float) -> Callable[[], None]:
    """A launch on tensors that nobody reads: for those who only record it."""
    wide = torch.promote_types(dtype, torch.float32)
    index = torch.zeros(2, dtype=torch.int64)
    weight = torch.ones(num_tags, dtype=wide) if smoothing else None
    scores = torch.zeros(2, num_tags, dtype=dtype)
    steps = LocalSteps(scores, torch.zeros(3, num_tags, dtype=wide), index, index, torch.ones(2, dtype=wide), weight)
    outputs = torch.zeros(2, dtype=torch.float64), scores.to(wide), torch.zeros(3, num_tags, dtype=wide)
    module = importlib.import_module(KERNELS)
    return functools.partial(module.local_steps, steps, 1.0, smoothing, False, *outputs)


def binaries(quick: bool) -> Iterator[Binary]:
    """Beside those of the chain."""
    every = itertools.product(DTYPES, (9, 512, 5000), (0.0, 0.1))
    for dtype, num_tags, smoothing in ((torch.bfloat16, 9, 0.1), (torch.float32, 5000, 0.0)) if quick else every:
        kind = "memm, smoothed" if smoothing else "memm"
        labels: dict[str, str | int] = {"kind": kind, "dtype": str(dtype)[6:], "K": num_tags}
        yield Binary(labels, importlib.import_module(KERNELS), triton_call(dtype, num_tags, smoothing))


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What `make gpu` asks of Triton, beside the chain's."""
    shapes = [(2, 3, 5)] if device == "cpu" else [(17, 40, 9), (5, 20, 300), (3, 12, 5000)]
    for shape, dtype, kind in itertools.product(shapes, DTYPES, (0, 3, 8)):
        for rank in (0, 4):
            p = problem(*shape, kind, dtype, rank)
            yield f"memm_nll {shape} {dtype} {kind} rank {rank}", functools.partial(check, p, "triton", device)
