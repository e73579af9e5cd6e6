"""Chains to test on, their oracles and budgets, and recorders of the branch that ran.

Oracles are NumPy, one sequence at a time, in `numpy.longdouble` (80 bits on x86).
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyseq import explain, ops
from pyseq.kernels.chain import NLL, PARTITION, SCORE, Gradients, Sampling
from pyseq.kernels.chain import Chain as Inputs
from pyseq.ops._backend import launcher
from pyseq.testing import Array, assert_within, launches, memm, unit
from pyseq.testing.aot import Binary

NEG_INF = -math.inf
KINDS: dict[int, Callable[..., Any]] = {PARTITION: ops.crf_log_partition, NLL: ops.crf_nll, SCORE: ops.crf_score}
NAMES = ("emissions", "transitions", "start", "end")
UPSTREAM = ("sum", "each")
LIVE = ("all", "lengths", "right", "left", "holes", "first", "rows", "none")
ROOM_FOR_ERROR = 8  # the chain contract: units of 2^-24 (2^-53) of the largest log sum on the way


def kinds(target: Any) -> tuple[int, ...]:
    """What to compute on a target of the suite: Triton's interpreter is slow, and the loss is both others in one."""
    return (NLL,) if target.interpreted else tuple(KINDS)


def smoke() -> str:
    """A value and a gradient, as a fresh installation must give them; returns the backend that served."""
    emissions = torch.randn(3, 4, 5, requires_grad=True)
    ops.crf_log_partition(emissions, torch.zeros(5, 5)).sum().backward()
    assert emissions.grad is not None
    torch.testing.assert_close(emissions.grad, emissions.detach().softmax(-1))
    return explain(ops.crf_log_partition, emissions).chosen


@dataclass(frozen=True)
class Chain:
    """The arguments of a chain op."""

    emissions: Tensor
    transitions: Tensor
    start: Any = None  # here and below a tensor, or None; tests know which
    end: Any = None
    tags: Any = None
    mask: Any = None
    lengths: Any = None

    def inputs(self, tagged: bool = True) -> Inputs:
        """What launchers and raw ops take."""
        return Inputs(**{**vars(self), "tags": self.tags if tagged else None})

    def __call__(self, op: Callable[..., Any], backend: str) -> Any:
        tagged = (self.tags,) if op.__name__ in ("crf_nll", "crf_score") else ()
        rest = (self.start, self.end, self.mask)
        return op(self.emissions, self.transitions, *tagged, *rest, lengths=self.lengths, backend=backend)

    def replace(self, **changes: Any) -> "Chain":
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Chain":
        """With every tensor changed."""
        return self.replace(**{k: change(x) for k, x in vars(self).items() if x is not None})

    def to(self, device: str) -> "Chain":
        return self.map(lambda x: x.to(device))

    def leaves(self) -> "Chain":
        """The same values and layouts, float tensors as leaves that require grad."""
        return self.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)

    def scores(self) -> list[Tensor]:
        return [x for x in (self.emissions, self.transitions, self.start, self.end) if x is not None]

    def double(self) -> "Chain":
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def single(self) -> "Chain":
        return self.map(lambda x: x.float() if x.is_floating_point() else x)

    def crowd(self, times: int) -> "Chain":
        """Every sequence so many times."""
        shared = ("transitions", "start", "end")
        return self.replace(
            **{k: torch.cat([x] * times) for k, x in vars(self).items() if x is not None and k not in shared}
        )

    def live(self) -> Tensor:
        """(B, T) bool on the CPU."""
        batch, time, _ = self.emissions.shape
        lengths = torch.full((batch,), time) if self.lengths is None else self.lengths.cpu()
        live: Tensor = torch.arange(time) < lengths.unsqueeze(1) if self.mask is None else self.mask.cpu()
        return live

    def compact(self) -> "Chain":
        """Live steps moved to the front, absent ones zero, said by lengths."""
        live = self.live().to(self.emissions.device)
        order = live.logical_not().long().argsort(dim=1, stable=True)
        kept = live.gather(1, order)
        emissions = self.emissions.gather(1, order.unsqueeze(2).expand_as(self.emissions))
        tags = None if self.tags is None else self.tags.gather(1, order) * kept
        emissions = torch.where(kept.unsqueeze(2), emissions, 0.0)
        return self.replace(emissions=emissions, tags=tags, mask=None, lengths=live.sum(1))


def liveness(kind: str, batch: int, time: int, generator: torch.Generator) -> dict[str, Tensor]:
    """mask= or lengths= of one of the kinds in LIVE."""
    lengths = torch.randint(0, time + 1, (batch,), generator=generator)
    lengths[: batch // 2] = time
    step, full = torch.arange(time), torch.ones(batch, time, dtype=torch.bool)
    if kind == "all":
        return {}
    if kind == "lengths":
        return {"lengths": lengths}
    masks = {
        "right": step < lengths.unsqueeze(1),
        "left": step >= time - lengths.unsqueeze(1),
        "holes": torch.rand(batch, time, generator=generator) < 0.6,
        "first": full & (step > 0),
        "rows": full & (torch.arange(batch) % 2 == 1).unsqueeze(1),
        "none": ~full,
    }
    return {"mask": masks[kind]}


def chain(
    batch: int,
    time: int,
    tags: int,
    dtype: torch.dtype = torch.float32,
    live: str = "all",
    boundaries: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> Chain:
    """A random chain on the CPU; half precision scores come beside float32 parameters."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    emissions, transitions = normal(batch, time, tags).to(dtype), normal(tags, tags).to(wide)
    start, end = (normal(tags).to(wide) for _ in range(2)) if boundaries else (None, None)
    labels = torch.randint(tags, (batch, time), generator=generator)
    return Chain(emissions, transitions, start, end, labels, **liveness(live, batch, time, generator))


def mixed() -> Chain:
    """Fast sequences, wide ones (2, 7), and ones whose best state is 900 nats down after a step (4, 9)."""
    problem = chain(11, 6, 5, seed=10)
    problem.transitions[[0, 2, 3, 4], 1] = NEG_INF
    problem.emissions[[2, 7]] *= 60
    problem.emissions[[4, 9], 0, 1] -= 900
    problem.emissions[[4, 9], 1, 1] += 900
    return problem.replace(tags=torch.where(problem.tags == 1, 2, problem.tags))


class Exact(NamedTuple):
    """What is right for each sequence. Counts: of emissions (B, T, K), transitions (B, K, K), start and end (B, K)."""

    log_z: Array
    score: Array
    size_z: Array  # the largest finite |log sum| on the way to log Z
    size_score: Array
    expected: tuple[Array, ...]
    observed: tuple[Array, ...]
    best: Array  # of the best path, and the path itself: lowest tag from the last step backwards
    path: Array

    def crowd(self, times: int) -> "Exact":
        """Every sequence so many times."""

        def copies(x: Any) -> Any:
            return tuple(map(copies, x)) if isinstance(x, tuple) else np.concatenate([x] * times)

        return Exact(*map(copies, self))

    def value(self, kind: int) -> Array:
        if kind == PARTITION:
            return self.log_z
        if kind == SCORE:
            return self.score
        dead = self.score == NEG_INF
        return np.where(dead, np.inf, np.where(dead, 0, self.log_z) - np.where(dead, 0, self.score))

    def gradients(self, kind: int, weights: Array) -> tuple[list[Array], list[float]]:
        """Weighted gradients, and the size of what is added up in each."""
        w = np.where(self.score == NEG_INF, 0, weights) if kind != PARTITION else weights
        a, b = (0 if kind == SCORE else 1), {PARTITION: 0, NLL: -1, SCORE: 1}[kind]
        grads, sizes = [], []
        for position, (e, o) in enumerate(zip(self.expected, self.observed, strict=True)):
            each = w.reshape(-1, *[1] * (e.ndim - 1))
            grad, size = each * (a * e + b * o), abs(each) * (a * e + abs(b) * o)
            grads.append(grad if position == 0 else grad.sum(0))
            sizes.append(float((size if position == 0 else size.sum(0)).max(initial=0)))
        return grads, sizes


def _log_sum(x: Array) -> Array:
    """Over axis 0; -inf where every term is."""
    top = x.max(0)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(x - top).sum(0)) + top)


def exact(problem: Chain, dtype: Any = np.longdouble) -> Exact:
    """Forward-backward and Viterbi in logs, step by step."""
    em, tr = (x.detach().cpu().double().numpy().astype(dtype) for x in (problem.emissions, problem.transitions))
    batch, time, tags = em.shape
    start, end = (
        np.zeros(tags, dtype) if x is None else x.detach().cpu().double().numpy().astype(dtype)
        for x in (problem.start, problem.end)
    )
    labels = np.zeros((batch, time), int) if problem.tags is None else problem.tags.cpu().numpy()
    live = problem.live().numpy()
    values = [np.zeros(batch, dtype) for _ in range(5)]
    log_z, score, size_z, size_score, best = values
    shapes = ((batch, time, tags), (batch, tags, tags), (batch, tags), (batch, tags))
    expected, observed = ([np.zeros(shape, dtype) for shape in shapes] for _ in range(2))
    path = np.full((batch, time), -1)
    for b in range(batch):
        at = np.flatnonzero(live[b])
        n, f, y = len(at), em[b, at], labels[b, at]
        if n == 0:
            continue
        alpha, beta, delta = np.empty((n, tags), dtype), np.empty((n, tags), dtype), np.empty((n, tags), dtype)
        alpha[0] = delta[0] = start + f[0]
        beta[n - 1] = end
        for k in range(1, n):
            alpha[k] = f[k] + _log_sum(alpha[k - 1][:, None] + tr)
            delta[k] = f[k] + (delta[k - 1][:, None] + tr).max(0)
        log_z[b] = _log_sum(alpha[n - 1] + end)
        size_z[b] = abs(np.where(np.isfinite(alpha), alpha, 0)).max()
        if np.isfinite(log_z[b]):
            size_z[b] = max(size_z[b], abs(log_z[b]))
            for k in range(n - 2, -1, -1):
                beta[k] = _log_sum((tr + f[k + 1] + beta[k + 1]).T)
                expected[1][b] += np.exp(alpha[k][:, None] + tr + f[k + 1] + beta[k + 1] - log_z[b])
            mu = np.exp(alpha + beta - log_z[b])
            expected[0][b, at], expected[2][b], expected[3][b] = mu, mu[0], mu[n - 1]
        terms = f[np.arange(n), y] + np.concatenate([start[y[:1]], tr[y[:-1], y[1:]]])
        partial = np.append(terms.cumsum(), terms.sum() + end[y[-1]])
        score[b] = partial[-1]
        if np.isfinite(score[b]):
            size_score[b] = abs(partial).max()
            observed[0][b, at, y] = 1
            np.add.at(observed[1][b], (y[:-1], y[1:]), 1)
            observed[2][b, y[0]] = observed[3][b, y[-1]] = 1
        best[b] = (delta[n - 1] + end).max()
        if best[b] > NEG_INF:
            tag = (delta[n - 1] + end).argmax()
            for k in range(n - 1, -1, -1):
                path[b, at[k]] = tag
                tag = (delta[k - 1] + tr[:, tag]).argmax() if k else tag
    return Exact(log_z, score, size_z, size_score, tuple(expected), tuple(observed), best, path)


def brute_force(problem: Chain) -> Exact:
    """The same from every path at once; independent of any recursion. Sizes are left zero."""
    problem, live = problem.double(), problem.live()
    batch, time, tags = problem.emissions.shape
    out = exact(problem.replace(mask=torch.zeros(batch, time, dtype=torch.bool), lengths=None), np.float64)
    zeros, eye = torch.zeros(tags), torch.eye(tags, dtype=torch.float64)
    start, end = (zeros if x is None else x for x in (problem.start, problem.end))
    for b, at in enumerate(map(torch.nonzero, live)):
        n, at = len(at), at.squeeze(1)
        if n == 0:
            continue
        paths = torch.cartesian_prod(*[torch.arange(tags)] * n).view(-1, n).flip(1)  # the first of equals is the answer

        def score(paths: Tensor) -> Tensor:
            scores = problem.emissions[b, at, paths].sum(1) + start[paths[:, 0]] + end[paths[:, -1]]  # noqa: B023
            return scores + problem.transitions[paths[:, :-1], paths[:, 1:]].sum(1)

        scores, hot = score(paths), eye[paths]  # (N,), (N, n, K)
        out.best[b], out.log_z[b] = scores.max(), scores.logsumexp(0)
        if problem.tags is not None:
            out.score[b] = score(problem.tags[b, at].unsqueeze(0))
        if out.best[b] > NEG_INF:
            mass = scores.softmax(0)
            out.path[b, at] = paths[scores.argmax()]
            out.expected[0][b, at] = torch.einsum("p,pnk->nk", mass, hot)
            out.expected[1][b] = torch.einsum("p,pni,pnj->ij", mass, hot[:, :-1], hot[:, 1:])
            out.expected[2][b], out.expected[3][b] = mass @ hot[:, 0], mass @ hot[:, -1]
    return out


def upstream(name: str, batch: int) -> Tensor:
    """Weights of the sequences in a loss: one for all, as .sum() has it, or one each, negative and zero among them."""
    weights = torch.randn(batch, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights[::3] = 0
    return torch.ones_like(weights) if name == "sum" else weights


def run(problem: Chain, kind: int, backend: str, name: str = "sum") -> tuple[Tensor, list[Any]]:
    """Value, and gradients of its weighted sum: of emissions, transitions, and start and end where they are given."""
    leaves = problem.leaves()
    value, scores = leaves(KINDS[kind], backend), leaves.scores()
    weights = None if name == "sum" else upstream(name, len(value)).to(value)
    loss = value.sum() if weights is None else value
    grads = iter(torch.autograd.grad(loss, scores, weights, materialize_grads=True))
    found = [None if getattr(leaves, x) is None else next(grads) for x in NAMES]
    assert all(grad.dtype == x.dtype for grad, x in zip(filter(torch.is_tensor, found), scores, strict=True))
    return value, found


class Known:
    """A problem with what is right for it, and how far from that a kernel may be."""

    def __init__(self, problem: Chain, truth: Exact | None = None) -> None:
        self.problem, self.truth = problem, truth or exact(problem)
        self.u = unit(problem.transitions.dtype)
        live = problem.live().sum(1)
        self.steps, self.longest = live.numpy(), int(live.max()) if len(live) else 0
        self.yardstick = problem.double() if problem.transitions.dtype == torch.float64 else problem.single()
        self.rooms: dict[Any, Any] = {}

    @functools.cached_property
    def crowd(self) -> "Known":
        """The same sequences, often enough that kernels which work on many at once do."""
        times = -(-16 // max(len(self.steps), 1))
        return Known(self.problem.crowd(times), self.truth.crowd(times))

    def check(
        self, placed: Chain, backend: str, kinds: tuple[int, ...] = tuple(KINDS), names: tuple[str, ...] = UPSTREAM
    ) -> None:
        """placed: the problem, on any device and in any layout."""
        names = names[: len(self.steps)]  # of one sequence, "each" is zero
        for kind, name in itertools.product(kinds, names):
            key = kind, name, backend == "reference"
            if key not in self.rooms:
                self.rooms[key] = self.plain(kind, name) if backend == "reference" else self.derived(kind, name)
            value, grads = run(placed, kind, backend, name)
            what = f"{KINDS[kind].__name__}, {name}: "
            assert_within(what + "value", value, self.truth.value(kind), self.rooms[key][0])
            right, _ = self.truth.gradients(kind, upstream(name, len(value)).numpy())
            for where, grad, exactly, room in zip(NAMES, grads, right, self.rooms[key][1:], strict=True):
                if grad is not None:
                    assert_within(what + where, grad, exactly, room)

    def size(self, kind: int) -> Any:
        z, score = self.truth.size_z, self.truth.size_score
        return z if kind == PARTITION else score if kind == SCORE else z + score

    def bands(self) -> list[float]:
        band = 4 * self.u  # two units in the last place: the result's rounding, and an exp that is not torch's
        return [max(torch.finfo(self.problem.emissions.dtype).eps, band), band, band, band]

    def plain(self, kind: int, name: str) -> list[Any]:
        """The reference's: the recursion in logs rounds a log sum at every step, and exp takes that over."""
        u = ROOM_FOR_ERROR * self.u
        _, sizes = self.truth.gradients(kind, upstream(name, len(self.steps)).numpy())
        lost = u * self.longest * (float(self.truth.size_z.max(initial=0)) + 1)
        value = u * self.size(kind) * np.maximum(self.steps, 1)
        return [value, *((lost + band) * size for band, size in zip(self.bands(), sizes, strict=True))]

    def derived(self, kind: int, name: str) -> list[Any]:
        """A kernel's. Values: the contract, or beside a float64 result twice the reference's error and a band.

        Gradients: twice the error of the reference in the same precision and a band, in float64 also what one rounding
        of log Z makes of them, and never more than all roundings
        of the scaled recursion, or of the one in float64 logs, one way.
        """
        right, sizes = self.truth.gradients(kind, upstream(name, len(self.steps)).numpy())
        value, grads = run(self.yardstick, kind, "reference", name)
        exactly = self.truth.value(kind)
        if self.u == unit(torch.float64):
            found = np.isfinite(exactly)
            off = abs(value.detach().numpy()[found] - exactly[found])
            score = 0 if kind == PARTITION else self.truth.size_score  # added up in another order
            room = 2 * off.max(initial=0) + 2 * self.u * (self.size(kind) + (self.longest + 1) * score)
        else:
            room = ROOM_FOR_ERROR * self.u * self.size(kind) + self.u * np.where(np.isfinite(exactly), abs(exactly), 0)
        worst = 2 * self.longest * (self.problem.emissions.size(2) + ROOM_FOR_ERROR) * self.u
        worst += ROOM_FOR_ERROR * self.longest * unit(torch.float64) * float(self.truth.size_z.max(initial=0))
        # beside float64 the reference may be right by luck where log Z, of which an exponent is, was rounded once
        once = 2 * self.u * float(self.truth.size_z.max(initial=0)) if self.u == unit(torch.float64) else 0.0
        rooms = [room]
        for grad, true, size, band in zip(grads, right, sizes, self.bands(), strict=True):
            error = 0 if grad is None else float(abs(grad.double().numpy() - true).max(initial=0))
            rooms.append(np.minimum(2 * error + once * size, worst * size) + band * size)
        return rooms


@contextlib.contextmanager
def recorded_paths(backend: str, mask: int = 3) -> Iterator[list[Tensor]]:
    """The `paths` (B,) of every launch of a value in the block: 0 is the fast branch, the last number the log domain.

    mask: the bits to keep; 4 says whether C++ gave the sequence a vector lane of its own.
    """
    found: list[Tensor] = []

    def wrap(launch: Callable[..., int]) -> Callable[..., int]:
        if launch.__name__ != "crf":
            return launch

        @functools.wraps(launch)
        def recording(inputs: Inputs, *rest: Any) -> int:
            emissions = inputs.emissions
            found.append(torch.zeros(len(emissions), dtype=torch.int32, device=emissions.device))
            status = launch(inputs, *rest, paths=found[-1])
            found[-1] &= mask
            return status

        return recording

    with launches("chain", backend, wrap):
        yield found


def triton_call(kind: int, dtype: torch.dtype, tags: int, batch: int = 1, time: int = 2) -> Callable[[], None]:
    """A loss and an entropy with gradients, Viterbi and samples by Triton's launchers, with all optional arguments but
    lengths, on tensors without data: for those who only record the launches."""
    kernels = launcher("chain", "triton")
    wide = torch.promote_types(dtype, torch.float32)
    new = functools.partial(torch.empty, device="meta", dtype=wide)
    scores, labels = new(batch, time, tags, dtype=dtype), new(batch, time, dtype=torch.int64)
    mask, value, edge, pairs = new(batch, time, dtype=torch.bool), new(batch), new(tags), new(tags, tags)
    inputs = Inputs(scores, pairs, edge, edge, None if kind == PARTITION else labels, mask, weights=value)
    grads = Gradients(new(batch, time, tags), pairs, edge, edge)

    def call() -> None:
        kernels.crf(inputs, kind, "none", False, value, grads)
        kernels.viterbi(inputs, False, value, labels)
        kernels.entropy(inputs, False, value, grads)
        kernels.sample(Sampling(*inputs[:4], mask, None, labels[0, :1]), False, labels.unsqueeze(1))

    return call


def binaries(quick: bool) -> Iterator[Binary]:
    """What `make aot` compiles; quick: two sizes and dtypes, pairwise, at 128 tags with the most edges in registers."""
    names = {PARTITION: "partition", NLL: "nll", SCORE: "score"}
    sizes, dtypes = (2, 9, 32, 128, 512, 1024), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    every = itertools.product(sizes, dtypes, names)
    for tags, dtype, kind in ((9, torch.bfloat16, NLL), (128, torch.float32, NLL)) if quick else every:
        labels: dict[str, str | int] = {"kind": names[kind], "dtype": str(dtype)[6:], "K": tags}
        yield Binary(labels, launcher("chain", "triton"), triton_call(kind, dtype, tags))
    yield from memm.binaries(quick)


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What `make gpu` asks of Triton first, kernel by kernel: a name, and a call that raises where a result is wrong.

    Edges in registers, streamed ones, and the most warps, with holes in the sequences; one small shape on the CPU,
    which interprets.
    """
    shapes = [(2, 3, 5)] if device == "cpu" else [(17, 40, 9), (5, 20, 130), (3, 12, 600)]

    def values(problem: Chain, kind: int) -> None:
        Known(problem).check(problem.to(device), "triton", (kind,))

    def best(problem: Chain) -> None:
        truth, (score, path) = exact(problem), problem.to(device)(ops.viterbi, "triton")
        summed = 2 * problem.emissions.size(1) * unit(torch.float64) * truth.size_z
        assert_within("score", score, truth.best, summed + unit(score.dtype) * abs(truth.best))
        assert path.tolist() == truth.path.tolist(), "another path"

    def samples(problem: Chain) -> None:
        drawn = []
        for placed, backend in ((problem.to(device), "triton"), (problem, "reference")):
            op = functools.partial(ops.crf_sample, num_samples=40, generator=torch.Generator().manual_seed(1))
            given = placed.emissions, placed.transitions, placed.start, placed.end, placed.mask
            drawn.append(op(*given, backend=backend).cpu())  # type: ignore[arg-type]
        assert torch.equal(*drawn), "another path"

    def entropy(problem: Chain) -> None:
        found = []
        for placed, backend in ((problem.to(device), "triton"), (problem.double(), "reference")):
            leaves = placed.leaves()
            given = leaves.emissions, leaves.transitions, leaves.start, leaves.end, leaves.mask
            value = ops.crf_entropy(*given, backend=backend)  # type: ignore[arg-type]
            found.append([value, *torch.autograd.grad(value.sum(), leaves.scores())])
        for name, mine, right in zip(("value", *NAMES), *found, strict=True):
            room = 2 * unit(mine.dtype) * abs(right) + 1e-12 * problem.emissions.size(1)
            assert_within(name, mine, right.detach().numpy(), room.detach().numpy())

    def domains() -> None:
        with recorded_paths("triton") as paths:
            values(mixed(), NLL)
        assert {int(path) for call in paths for path in call} == {0, 1, 2}, "a branch did not run"

    for shape, dtype in itertools.product(shapes, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        problem, name = chain(*shape, dtype, "holes"), f"{str(dtype)[6:]} K={shape[2]}"
        for kind, op in KINDS.items():
            if kind == NLL or (shape, dtype) == (shapes[0], torch.float32):
                yield f"{op.__name__} {name}", functools.partial(values, problem, kind)
        yield f"viterbi {name}", functools.partial(best, problem)
        yield f"crf_sample {name}", functools.partial(samples, problem)
        yield f"crf_entropy {name}", functools.partial(entropy, problem)
    yield "all domains", domains
    yield from memm.cases(device)
