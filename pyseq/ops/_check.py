"""Argument checks that every room shares. A message names the argument, what it got and what was wanted."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(name: str, x: object, meaning: str, rank: int) -> None:
    x = _dense(name, x, meaning)
    if x.dim() != rank:
        raise ValueError(f"{name} must have shape {meaning}, got {tuple(x.shape)}")


def as_wanted(x: object, shape: tuple[int, ...], dtype: torch.dtype, lead: Tensor) -> bool:
    """Whether the checks below have nothing to say of x and nothing to convert; they take several times as long."""
    return (
        isinstance(x, Tensor)
        and not x.is_nested
        and x.shape == shape
        and x.dtype == dtype
        and (x.is_cpu if lead.is_cpu else x.device == lead.device)
        and x.layout == torch.strided
    )


def sized(name: str, x: object, shape: tuple[int, ...], meaning: str) -> Tensor:
    x = _dense(name, x, meaning)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(x.shape)}")
    return x


def _dense(name: str, x: object, meaning: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {meaning}, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        advice = "use padding and a mask" if x.is_nested else "use to_dense()"
        raise TypeError(f"{name} must be a dense tensor of shape {meaning}, got a {kind} one; {advice}")
    return x


def floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{name} must be of dtype {wanted}, got {x.dtype}")


def same_device(name: str, x: Tensor, lead_name: str, lead: Tensor) -> None:
    if x.device != lead.device:
        raise ValueError(f"{name} is on {x.device} but {lead_name} is on {lead.device}; move one of them")


def wide(lead: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 beside float64, else float32."""
    return torch.float64 if lead.dtype == torch.float64 else torch.float32


def parameter(name: str, x: Tensor, lead_name: str, lead: Tensor) -> Tensor:
    """A float tensor in the dtype of the sums."""
    floating(name, x)
    same_device(name, x, lead_name, lead)
    if x.dtype == wide(lead):
        return x
    if x.dtype == torch.float64:
        raise TypeError(f"{name} is {x.dtype} but {lead_name} is {lead.dtype}; convert one of them")
    return x.to(wide(lead))
