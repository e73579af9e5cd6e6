"""What the models ask of their inputs and of the checkpoints they load."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from pyseq.ops import _torch
from pyseq.ops._backend import settings

SLACK = 1e-3  # beyond [-1, 1], for what resizing or rounding adds to images


def looked_at(x: Tensor) -> bool:
    """Whether values may be read: on the CPU in eager mode, or wherever PYSEQ_CHECK=1 says so."""
    return settings.check or (x.is_cpu and not _torch.traced())


def check_range(name: str, x: Any, low: int, high: int, mend: str) -> None:
    """A tensor of whole numbers in [low, high), else TypeError or ValueError."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        got, way = (x.dtype, ".long()") if isinstance(x, Tensor) else (type(x).__name__, "; torch.as_tensor gives one")
        if isinstance(x, tuple) and any(isinstance(one, Tensor) for one in x):
            way = "; of two levels take one"
        way = f"; {name}.long() is one" if way == ".long()" else way
        raise TypeError(f"{name} must be a tensor of dtype torch.int64 or torch.int32, got {got}{way}")
    if looked_at(x) and x.numel():
        least, most = (int(end) for end in x.aminmax())
        if least < low:
            mend = "-1 is no code: it marks vectors that were not finite" if name == "codes" else "they count from 0"
        if least < low or most >= high:
            raise ValueError(f"{name} must be from {low} to {high - 1}, got {least} to {most}; {mend}")


def check_images(x: Any, channels: int, dtype: torch.dtype) -> None:
    """Floats (B, channels, H, W) in [-1, 1], of this dtype or under autocast, else TypeError or ValueError."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"images must be floats in [-1, 1], got {got}; bytes become such by x / 127.5 - 1")
    if x.dtype != dtype and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"images must be of the model's dtype, {dtype}, got {x.dtype}; x.to({dtype}) is")
    if x.dim() != 4 or x.size(1) != channels:
        mend = "; x.unsqueeze(0) is a batch" if x.dim() == 3 and x.size(0) == channels else ""
        mend = "; x.permute(0, 3, 1, 2) has channels in front" if x.dim() == 4 and x.size(3) == channels else mend
        raise ValueError(f"images must have shape (B, channels={channels}, H, W), got {(*x.shape,)}{mend}")
    if looked_at(x) and x.numel():
        low, high = (float(end) for end in x.detach().aminmax())
        if not (low >= -1 - SLACK and high <= 1 + SLACK):
            mend = "; bytes become such by x / 127.5 - 1" if high <= 255 else ""
            raise ValueError(f"images must be finite, from -1 to 1, got {low:.4g} to {high:.4g}{mend}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All submodules in eval mode, and each again in its own after the block, also after an error."""
    training = [inner for inner in module.modules() if inner.training]
    for inner in training:
        inner.training = False
    try:
        yield
    finally:
        for inner in training:
            inner.training = True


class Configured(nn.Module):
    """A module whose state says, in whole numbers, how the module was built, and which refuses a state of another."""

    configuration: Tensor

    def _configure(self, **numbers: int) -> None:
        kind = next(x.__name__ for x in type(self).__mro__ if x.__module__.startswith("pyseq."))
        self._numbers = {"kind": crc32(kind.encode()), **{name: int(number) for name, number in numbers.items()}}
        self.register_buffer("configuration", torch.tensor([*self._numbers.values()]))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        found = state.get(f"{prefix}configuration")
        if isinstance(found, Tensor) and found.tolist()[:1] != [self._numbers["kind"]]:
            raise ValueError(f"the state is of another kind of model, this one is a {type(self).__name__}")
        if isinstance(found, Tensor) and found.shape == self.configuration.shape:
            pairs = zip(self._numbers.items(), found.tolist(), strict=True)
            if other := {name: (got, own) for (name, own), got in pairs if got != own}:
                name, kind = ", ".join(f"{k}={got}" for k, (got, _) in other.items()), type(self).__name__
                own = ", ".join(f"{k}={own}" for k, (_, own) in other.items())
                raise ValueError(f"the state is of a {kind} with {name}, this one has {own}; build it as that one was")
        super()._load_from_state_dict(state, prefix, *rest)
