"""What a room declares (Room and its parts) and how a case is measured: every provider is verified, then all are timed
in turns."""

import contextlib
import gc
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _limits import caps, copy_bandwidth, fma_peak, limit_source, machine, peak_memory, synchronize, time_block
from _rows import Row, over
from torch import Tensor

import pyseq
from pyseq.info import version
from pyseq.ops._backend import BACKENDS, Name, settings
from pyseq.testing import cpu_level

Tensors = dict[str, Tensor]  # inputs, and what is compared of outputs
Call = Callable[[], Any]
BLOCK = 0.02  # seconds of repeats in a round
BAND = torch.finfo(torch.float32).eps  # one rounding
PATIENCE = 300.0  # seconds for the first call of ours, which may compile, and of the baseline: without it no ratios


class Unavailable(Exception):
    """Raised by a provider's setup: it cannot serve here, and why."""


@dataclass(frozen=True)
class Workload:
    """A size taken from real use; `quick` ones also run under --quick."""

    name: str
    sizes: dict[str, int]
    quick: bool = False


@dataclass(frozen=True)
class Work:
    """What one call has to do at least: units for throughput, float32 multiply-adds and bytes for the limits."""

    units: float
    fmas: float
    bytes: float


@dataclass(frozen=True)
class Mode:
    """One thing to compute. oracle: float64 inputs -> the outputs that every provider is compared with. plain: float32
    inputs -> a result from plain torch, read by view; every provider's budget is twice its error and one rounding, the
    largest among outputs whose names share their first word ("grad emissions", "grad start"). work: inputs -> Work.
    view: (float64 inputs, a provider's result) -> outputs named as the oracle's."""

    name: str
    oracle: Callable[[Tensors], Tensors]
    plain: Callable[[Tensors], Any]
    work: Callable[[Tensors], Work]
    view: Callable[[Tensors, Any], Tensors] = lambda inputs, result: result


@dataclass(frozen=True)
class Provider:
    """Somebody who computes. package: the distribution whose version the row names. setups: mode -> setup, which takes
    the inputs and returns a call without arguments whose result `Mode.view` reads. backend: of pyseq, in force during
    setup and calls; what has one is ours. level: of its C++ kernels. yardstick: the mode it computes instead, against
    whose oracle it is checked; its time is shown for scale, and it is no rival."""

    name: str
    package: str
    setups: Mapping[str, Callable[[Tensors], Call]]
    backend: Name | None = None
    level: int = 0
    yardstick: Mode | None = None

    @property
    def typical(self) -> bool:
        """Whether it stands for its backend: not a variant of the call, nor at a lower level."""
        return self.name == f"pyseq {self.backend}"

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        if self.level and self.level >= importlib.import_module("pyseq._C").cpu_level():
            raise Unavailable("this CPU has no higher level")
        with pyseq.use_backend(self.backend or settings.backend), cpu_level(self.level):  # type: ignore[arg-type]
            yield


def ours(
    setups: Mapping[str, Callable[[Tensors], Call]], *backends: Name, variant: str = "", level: int = 0
) -> Iterator[Provider]:
    """`pyseq <backend><variant>` for each backend, or for all."""
    for backend in backends or BACKENDS:
        yield Provider(f"pyseq {backend}{variant}", "pyseq", setups, backend, level)


def serving(op: Callable[..., Any], *args: Any) -> str:
    """For setups: the backend in force, or Unavailable with its reasons against this call of an op."""
    if reasons := pyseq.explain(op, *args)[settings.backend]:
        raise Unavailable("; ".join(reasons))
    return settings.backend


@dataclass(frozen=True)
class Room:
    """workloads x modes, by whom, in which unit, against whom. headlines: an op in users' words -> the mode and the
    workload that stand for it in the README. objection: the fairest one to them."""

    workloads: Sequence[Workload]
    inputs: Callable[[Workload, str], Tensors]  # workload, device -> tensors, the same ones every time
    modes: Sequence[Mode]
    providers: Sequence[Provider]
    unit: str
    baseline: str
    headlines: Mapping[str, tuple[str, str]]
    objection: str
    page: str = ""  # docs/<page>.md has its tables; as the room is called where nothing is said


@dataclass(frozen=True)
class Plan:
    """rounds: of the interleaving; seconds: of one provider's repeats in a case; call_seconds, memory: what one call
    may take before it counts as not finished."""

    rounds: int = 12
    seconds: float = 20.0
    call_seconds: float = 30.0
    memory: int = 8 << 30


QUICK = Plan(rounds=6, seconds=1.5, call_seconds=5.0, memory=4 << 30)


def deviation(found: Tensors, truth: Tensors) -> dict[str, tuple[float, float]]:
    """Of each output: largest error over largest magnitude, and norm of error over norm; inf where NaN or misshapen. A
    scalar stands for the sum of the oracle's values and may err as the worst of them."""
    out = {}
    for name, expected in truth.items():
        got = found[name].detach().to(expected.device, torch.float64)
        expected = expected.detach().double()
        if got.dim() == 0 and expected.dim() == 1:
            expected = expected.sum()
        out[name] = math.inf, math.inf
        if got.shape == expected.shape and not got.isnan().any():
            error = got - expected
            pairs = (error.abs().max(), expected.abs().max()), (error.norm(), expected.norm())
            worst, norm = (float(a / b) if b > 0 else float(a) for a, b in pairs)
            out[name] = worst, norm
    return out


@dataclass(frozen=True)
class Check:
    """A mode's float64 truth on these inputs, and the error of float32 plain torch."""

    mode: Mode
    inputs: Tensors
    truth: Tensors
    plain: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, mode: Mode, inputs: Tensors) -> "Check":
        wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        truth = mode.oracle(wide)
        return cls(mode, wide, truth, deviation(mode.view(wide, mode.plain(inputs)), truth))

    def __call__(self, result: Any) -> tuple[str, float, float]:
        """Status, the largest error over largest magnitude, and the budget of that output."""
        largest, wrong = (-1.0, BAND), []
        for name, errors in deviation(self.mode.view(self.inputs, result), self.truth).items():
            kin = [self.plain[other] for other in self.plain if other.split()[0] == name.split()[0]]
            budgets = [2 * max(plain) + BAND for plain in zip(*kin, strict=True)]
            largest = max(largest, (errors[0], budgets[0]))
            for error, budget in zip(errors, budgets, strict=True):
                if error > budget:
                    wrong.append(f"{name} off by {error:.1e}, budget {budget:.1e}")
        return f"wrong: {wrong[0]}" if wrong else "ok", *largest


@dataclass
class Contender:
    """A provider that passed its check: the call, what one takes, and the times of each round."""

    provider: Provider
    call: Call
    estimate: float
    baseline: bool = False  # always met, however slow
    times: dict[int, list[float]] = field(default_factory=dict)

    def every(self, plan: Plan) -> int:
        """In each, second or fourth round, or in the last alone, so that slow ones meet in the same rounds."""
        if self.estimate > plan.seconds and not self.baseline:
            return plan.rounds
        afford = plan.seconds / (2 * max(self.estimate, BLOCK))  # rounds, of which three at least
        return next((step for step in (1, 2, 4) if plan.rounds / step <= max(afford, 3)), plan.rounds // 3)

    def run_round(self, index: int, device: str) -> None:
        """One untimed call, where that is not dear, then the block: of three calls or more where that is not dear
        either, for the median of fewer is that of one stall of the machine."""
        with self.provider.in_force():
            if self.estimate < 1:
                self.call()
            synchronize(device)
            gc.collect()
            gc.disable()
            try:
                self.times[index] = time_block(self.call, device, BLOCK, least=3 if self.estimate < 10 * BLOCK else 1)
            finally:
                gc.enable()


def admit(provider: Provider, check: Check, inputs: Tensors, plan: Plan, row: Row) -> tuple[Row, Contender | None]:
    """Set up, call once, check, measure memory; a contender only if right."""

    def fresh() -> Call:
        return provider.setups[row.mode]({name: x.clone() for name, x in inputs.items()})

    needed = row.ours or provider.name == row.baseline
    try:
        with provider.in_force():
            with caps(PATIENCE if needed else plan.call_seconds, plan.memory, row.device):
                call = fresh()
                result = call()
                synchronize(row.device)
            status, error, budget = check(result)
            del result
            row = replace(row, status=status, error=error, budget=budget)
            if status != "ok":
                return row, None
            estimate: list[float] = []
            other = fresh()  # one that holds no gradients yet
            memory = peak_memory(lambda: estimate.extend(time_block(other, row.device, 0)), row.device)
        return replace(row, memory=memory), Contender(provider, call, estimate[0], provider.name == row.baseline)
    except (Unavailable, ImportError) as error:
        return replace(row, status=f"unavailable: {error}"), None
    except (TimeoutError, MemoryError, torch.OutOfMemoryError) as error:
        return replace(row, status=f"did not finish: {str(error) or 'out of memory'}"), None
    except Exception as error:
        if "allocate" in str(error):  # torch's CPU allocator raises a bare RuntimeError
            return replace(row, status=f"did not finish: over {plan.memory >> 30} GiB"), None
        return replace(row, status=f"raised {type(error).__name__}: {error}"), None


def run_case(
    name: str, room: Room, workload: Workload, mode: Mode, device: str, plan: Plan, tick: Callable[[str], None]
) -> list[Row]:
    """Rows of one workload and mode; `tick(what)` is called once a provider and once a round."""
    inputs = room.inputs(workload, device)
    check = Check.of(mode, inputs)
    blank = Row(name, workload.name, shown(workload.sizes), mode.name, "", "", device, unit=room.unit)
    blank = replace(blank, baseline=room.baseline, where=machine(device))
    rows: dict[str, Row] = {}
    contenders: dict[str, Contender] = {}
    for provider in room.providers:
        tick(provider.name)
        if mode.name not in provider.setups:
            continue
        row = replace(blank, provider=provider.name, version=version(provider.package), ours=bool(provider.backend))
        own = Check.of(provider.yardstick, inputs) if provider.yardstick else check
        rows[provider.name], contender = admit(provider, own, inputs, plan, row)
        if contender is not None:
            contenders[provider.name] = contender
    peaks = interleave(contenders, device, plan, tick)
    work = mode.work(inputs)
    for who, contender in contenders.items():
        rows[who] = timed_row(rows[who], contender, work, *peaks)
    if room.baseline in contenders:
        base = rows[room.baseline]
        for who in contenders:
            ratio, low, high = over(rows[who], base)
            rows[who] = replace(rows[who], ratio=ratio, ratio_low=low, ratio_high=high)
    return list(rows.values())


def interleave(
    contenders: dict[str, Contender], device: str, plan: Plan, tick: Callable[[str], None]
) -> tuple[float, float]:
    """Fill in the times; returns the limits, each the best of its rounds."""
    peaks = [fma_peak(device, BLOCK)], [copy_bandwidth(device, BLOCK)]
    names = list(contenders)
    for index in range(plan.rounds):
        tick(f"round {index + 1} of {plan.rounds}")
        shift = index % max(len(names), 1)
        for who in names[shift:] + names[:shift]:
            if (index + 1) % contenders[who].every(plan) == 0:
                contenders[who].run_round(index, device)
        peaks[0].append(fma_peak(device, BLOCK))
        peaks[1].append(copy_bandwidth(device, BLOCK))
    return max(peaks[0]), max(peaks[1])


def timed_row(row: Row, contender: Contender, work: Work, fma: float, copy: float) -> Row:
    """With its times, and the limits for this work; a yardstick does another."""
    times = [t for block in contender.times.values() for t in block]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    by_round = {index: statistics.median(block) for index, block in contender.times.items()}
    row = replace(row, median=median, q1=q1, q3=q3, n=len(times), rounds=len(by_round), by_round=by_round)
    row = replace(row, throughput=work.units / median)
    if contender.provider.yardstick is not None:
        return row
    nearest, least = max(("fma", work.fmas / fma), ("copy", work.bytes / copy), key=lambda bound: bound[1])
    row = replace(row, limit=nearest, of_limit=least / median, units_at_limit=work.units / least)
    return replace(row, fma_per_s=fma, copy_bytes_per_s=copy, limit_source=limit_source(row.device))


def shown(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())
