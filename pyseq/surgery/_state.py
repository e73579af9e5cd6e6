"""State dicts that know which names are tied, and a loader that keeps ties."""

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyseq.surgery._ties import memory

Ties = Literal["drop", "copy"]
TIES = "ties"  # under which the root's metadata hold the aliases


def state_dict(model: nn.Module, ties: Ties = "drop") -> dict[str, Any]:
    """The model's state with the names of tied tensors once, or with a tensor of its own for each.

    ties: "drop" keeps the first name of each tensor, which is the model's own, as torch's state dict has it; "copy"
    keeps all names, each with a copy that shares no memory, which safetensors and `save_pretrained` want.
    The result's metadata hold the other names, each with the first: `load_state_dict` reads them. They survive
    `torch.save`, also with weights_only=True, not safetensors. Extra state of modules is kept as it is.

    Raises ValueError for another word.

    >>> model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    >>> model["b"].weight = model["a"].weight
    >>> [*state_dict(model)]
    ['a.weight', 'a.bias', 'b.bias']
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be 'drop' or 'copy', got {ties!r}")
    state = model.state_dict(keep_vars=True)  # the tensors themselves: their identity counts
    aliases = {name: first for name, first in _firsts(state).items() if name != first}
    for name, value in [*state.items()]:
        if ties == "drop" and name in aliases:
            del state[name]
        elif isinstance(value, Tensor):
            state[name] = (
                value.detach() if ties == "drop" else value.detach().clone(memory_format=torch.contiguous_format)
            )
    if isinstance(metadata := getattr(state, "_metadata", None), dict):
        metadata.setdefault("", {})[TIES] = aliases
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict into a model, in place, so that all of the model's ties stay.

    A name that is missing takes the value of a name that is tied to it, in the model or in what `state_dict` recorded;
    so a state of a model with ties also fills one without. All else is strict.
    Needs memory for a copy of the model's state, while it loads.

    Raises ValueError where two names that are tied in the model have different values, and for a model on the meta
    device, torch's RuntimeError for missing and unexpected names and other shapes. The model is then as it was.

    >>> model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    >>> model["b"].weight = model["a"].weight
    >>> load_state_dict(model, state_dict(model))
    >>> model["b"].weight is model["a"].weight
    True
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a state dict, got {type(state).__name__}")
    own = model.state_dict(keep_vars=True)
    meta = [name for name, t in own.items() if isinstance(t, Tensor) and t.is_meta]
    if meta:
        raise ValueError(f"{meta[0]} is on the meta device, with no memory to load into: call model.to_empty before")
    filled: OrderedDict[str, Any] = OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        filled._metadata = metadata  # type: ignore[attr-defined]
    firsts, given = _firsts(own), dict[str, str]()
    for name, first in firsts.items():
        if name in state:
            other = given.setdefault(first, name)
            if not _same(state[name], state[other]):
                raise ValueError(
                    f"{other} and {name} are one tensor in the model, but the state has different values for them: give"
                    " one of them alone, or break the tie before loading"
                )
    recorded = (metadata or {}).get("", {}).get(TIES, {})
    for name in own:
        source = given.get(firsts.get(name, ""), recorded.get(name))
        if name not in state and source in state:
            filled[name] = state[source]
    tensors = [(t, t.detach().clone()) for t in own.values() if isinstance(t, Tensor)]
    extras = [
        (module, deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        model.load_state_dict(filled)
    except BaseException:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        for module, extra in extras:
            module.set_extra_state(extra)
        raise


def _firsts(state: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor's name the first name of the same tensor."""
    seen: dict[Any, str] = {}
    return {name: seen.setdefault(memory(t), name) for name, t in state.items() if isinstance(t, Tensor)}


def _same(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    b = b.to(a.device)
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
