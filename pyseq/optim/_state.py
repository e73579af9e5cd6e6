"""State that torch's load_state_dict is not to round to its parameter's dtype."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class AsItIs:
    """A tensor that is no tensor to torch, until it is taken out."""

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
