"""Lists of tensors to test Lookahead's update on, its oracle and its budget."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyseq import explain, ops
from pyseq.kernels.lookahead import Pairs
from pyseq.ops._backend import launcher
from pyseq.testing import assert_within, unit
from pyseq.testing.aot import Binary

HALF = (torch.bfloat16, torch.float16)
DTYPES = ((torch.float32,) * 2, (torch.float64,) * 2, *((x, y) for x in HALF for y in (x, torch.float32)))
SHAPES = ((), (1,), (0,), (3, 5), (257,), (2, 3, 4, 5), (9, 123))


def smoke() -> str:
    """An update, as a fresh installation must make it; returns the backend that served."""
    fast, slow = [torch.full((3,), 8.0)], [torch.zeros(3)]
    ops.lookahead_update_(fast, slow, 0.25)
    assert fast[0].tolist() == slow[0].tolist() == [2.0] * 3
    return explain(ops.lookahead_update_, fast, slow).chosen


def pairs(fast: torch.dtype, slow: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0) -> Pairs:
    """Random ones on the CPU, some of them large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(i: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * (1e3 if i % 3 == 2 else 1.0)

    x = [normal(i, shape).to(fast) for i, shape in enumerate(shapes)]
    return Pairs(x, [(x[i].double() + 0.1 * normal(i, shape)).to(slow) for i, shape in enumerate(shapes)])


def check(given: Pairs, alpha: float, backend: str, device: str = "cpu", interpreted: bool = False) -> None:
    """An update against float64: slow within the three roundings of an interpolation between the larger of its ends and
    its own, fast its rounding. interpreted: Triton's interpreter cuts bfloat16 off where it should round."""
    fast, slow = ([x.clone().to(device) for x in each] for each in given)
    ops.lookahead_update_(fast, slow, alpha, backend=backend)  # type: ignore[arg-type]
    for i, (x, y, a, b) in enumerate(zip(*given, fast, slow, strict=True)):
        right = torch.lerp(y.double(), x.double(), alpha)
        size = torch.maximum(x.double().abs(), y.double().abs())
        u = unit(torch.promote_types(y.dtype, torch.float32))
        cut = 2 if interpreted and torch.bfloat16 in (x.dtype, y.dtype) else 1
        own = 0.0 if y.dtype not in HALF else cut * unit(y.dtype)
        assert_within(f"slow {i}", b, right.numpy(), (4 * u * size + own * right.abs()).numpy())
        rounding = 0.0 if x.dtype == y.dtype else cut * unit(x.dtype)
        assert_within(f"fast {i}", a, b.double().cpu().numpy(), (rounding * b.double().cpu().abs()).numpy())


def triton_call(fast: torch.dtype, slow: torch.dtype) -> Callable[[], None]:
    """A launch on tensors that nobody reads: for those who only record it."""
    given = pairs(fast, slow, ((64,), (65,)))
    return functools.partial(launcher("lookahead", "triton").update, given, 0.5)


def binaries(quick: bool) -> Iterator[Binary]:
    """What `make aot` compiles."""
    for fast, slow in (DTYPES[0], DTYPES[3]) if quick else DTYPES:
        labels: dict[str, str | int] = {"fast": str(fast)[6:], "slow": str(slow)[6:]}
        yield Binary(labels, launcher("lookahead", "triton"), triton_call(fast, slow))


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What `make gpu` asks of Triton first: a name, and a call that raises where a result is wrong."""
    shapes = SHAPES if device == "cpu" else (*SHAPES, (1 << 20,), (1000, 4097))
    for (fast, slow), alpha in itertools.product(DTYPES, (0.3, 0.8)):
        given = pairs(fast, slow, shapes)
        name = f"lookahead_update_ {str(fast)[6:]} {str(slow)[6:]} {alpha}"
        yield name, functools.partial(check, given, alpha, "triton", device, device == "cpu")
