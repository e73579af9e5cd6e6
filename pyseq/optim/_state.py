"""What optimizers share that keep state of their own, and that wrap another one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AsItIs:
    """A tensor that is no tensor to torch, which would round it to its parameter's dtype, until it is taken out."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def on(self, device: torch.device) -> Tensor:
        """A copy."""
        return self.tensor.to(device, copy=True)


def protected(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state dict's "state" with its tensors wrapped."""
    return {
        i: {name: AsItIs(x) if isinstance(x, Tensor) else x for name, x in entries.items()}
        for i, entries in state.items()
    }


class Wrapper(Optimizer):
    """An optimizer around another one, whose parameter groups are its own, so schedulers reach them."""

    optimizer: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "optimizer" in self.__dict__:
            self.optimizer.param_groups = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the inner optimizer."""
        self.optimizer.zero_grad(set_to_none)


def innermost(optimizer: Optimizer) -> Optimizer:
    return innermost(optimizer.optimizer) if isinstance(optimizer, Wrapper) else optimizer


class Merged(Mapping[Tensor, dict[str, Any]]):
    """What mappings say of each parameter, to be looked at alone."""

    def __init__(self, *parts: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self.parts = parts

    def __getitem__(self, p: Tensor) -> Any:
        found = [part[p] for part in self.parts if p in part]
        if not found:
            raise KeyError(p)
        return found[0] if len(found) == 1 else {name: x for each in found for name, x in each.items()}

    def __setitem__(self, *_: object) -> None:
        raise TypeError("this is a view; change opt.optimizer.state, or load a state dict")

    __delitem__ = pop = clear = update = setdefault = __setitem__

    def __iter__(self) -> Iterator[Tensor]:
        return iter(dict.fromkeys(p for part in self.parts for p in part))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def state_like(state_dict: Any) -> None:
    """TypeError for what is no optimizer's state."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= {*state_dict}:
        raise TypeError("state_dict must be a dict with state and param_groups, as state_dict() gives it")


def same_kind(optimizer: Optimizer, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """ValueError for a group of another optimizer's."""
    if {*ours} - {*theirs} and {*theirs} - {*ours}:
        strange = ", ".join(sorted({*theirs} - {*ours}))
        raise ValueError(f"this is the state of another optimizer than {name_of(optimizer)}: it has {strange}")


def name_of(x: object) -> str:
    return type(x).__name__
