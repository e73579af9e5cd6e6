"""Hugging Face's ALBERT layout: L layers run through G <= L groups, by config.num_hidden_groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LIST = "albert_layer_groups"


def group_of(layer: int, layers: int, groups: int) -> int:
    """The group that a layer uses, by transformers' own formula."""
    return int(layer / (layers / groups))


def encoders(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of each encoder with this layout, recognised by what it holds."""
    return [(path, module) for path, module in model.named_modules() if _is_encoder(module)]


def _is_encoder(module: Any) -> bool:
    groups, config = vars(module).get("_modules", {}).get(LIST), vars(module).get("config")
    layers = getattr(config, "num_hidden_layers", 0)
    return isinstance(groups, nn.ModuleList) and 0 < len(groups) == getattr(config, "num_hidden_groups", 0) <= layers


@contextmanager
def group_a_layer(model: nn.Module, shorten: bool = True) -> Iterator[None]:
    """Inside the block lists of groups have an entry for each layer, those of one group being the same module.

    Behind it they are as short as the layout allows; as before, after an exception or without shorten.
    """
    found = [module for _, module in encoders(model)]
    before = [(module, [*module.albert_layer_groups]) for module in found]
    for module, groups in before:
        layers = module.config.num_hidden_layers
        _put(module, [groups[group_of(i, layers, len(groups))] for i in range(layers)])
    done = False
    try:
        yield
        done = shorten
    finally:
        for module, groups in before if not done else []:
            _put(module, groups)
    for config in {id(module.config): module.config for module in found if done}.values():
        _shorten(config, [module for module in found if module.config is config])


def _shorten(config: Any, found: list[Any]) -> None:
    """To as many groups as the encoders of one config differ in, where all of them are in the layout's order."""
    layers = config.num_hidden_layers
    lists = [[*module.albert_layer_groups] for module in found]
    count = max(len({*groups}) for groups in lists)
    firsts = [next(i for i in range(layers) if group_of(i, layers, count) == k) for k in range(count)]
    if any(groups[i] is not groups[firsts[group_of(i, layers, count)]] for groups in lists for i in range(layers)):
        firsts = [*range(layers)]
    for module, groups in zip(found, lists, strict=True):
        _put(module, [groups[i] for i in firsts])


def _put(module: Any, groups: list[nn.Module]) -> None:
    entries = module.albert_layer_groups._modules
    entries.clear()
    entries.update({str(i): group for i, group in enumerate(groups)})
    module.config.num_hidden_groups = len(groups)
