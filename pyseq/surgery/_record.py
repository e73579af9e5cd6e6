"""What was un-shared, as the model itself remembers it, and where the copies are now."""

import re
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyseq.surgery._albert import LIST, encoders
from pyseq.surgery._split import Site

RECORD = "_unshared"


@dataclass(frozen=True)
class Record:
    """What `unshare` did, as the model's attribute `_unshared`; `str()` says it in a line a module.

    shells: places whose module was one before, and is several now that hold different copies.
    """

    sites: tuple[Site, ...]
    shells: tuple[tuple[str, ...], ...]
    before: int
    after: int

    def __str__(self) -> str:
        lines = [f"{site.name}: {len(site.places)} calls, {site.copies} copies" for site in self.sites]
        return "\n".join([*lines[:-1], f"{lines[-1]}; parameters {self.before:,} -> {self.after:,}"])


def numbers_of(model: nn.Module, site: Site) -> tuple[list[int], int]:
    """Of which calls these are the places, and of how many: layers of an ALBERT, or what they were before."""
    for path, encoder in encoders(model):
        start = re.escape(f"{path}.{LIST}." if path else f"{LIST}.")
        found = [re.match(rf"{start}(\d+)", place) for place in site.places]
        if all(found):
            return [int(x[1]) for x in found if x], encoder.config.num_hidden_layers
    for prefix, old in sites_of(model):
        places = absolute(prefix, old)
        if {*site.places} <= {*places}:
            return [places.index(place) for place in site.places], len(places)
    return [*range(len(site.places))], len(site.places)


def note(model: nn.Module, sites: list[Site], shells: list[tuple[str, ...]], before: int) -> None:
    """The record, with what an older one says."""
    old: Record | None = vars(model).get(RECORD)
    known = old.sites if old else ()
    covered = [{*site.places} for site in known]
    every = [*known, *(site for site in sites if not any({*site.places} <= places for places in covered))]
    every = [replace(site, copies=len({model.get_submodule(p) for p in site.places})) for site in every]
    around = dict.fromkeys((*(old.shells if old else ()), *shells))
    model._unshared = Record((*every,), (*around,), old.before if old else before, size_of(model))  # type: ignore


def sites_of(model: nn.Module) -> list[tuple[str, Site]]:
    """Recorded in the model and in models inside it, whose path is the first item, with a dot; where there are none,
    an ALBERT's several groups."""
    holders = [(f"{path}." if path else "", vars(module).get(RECORD)) for path, module in model.named_modules()]
    found = [(prefix, site) for prefix, record in holders if record for site in record.sites]
    for path, encoder in encoders(model) if not found else []:
        start, count = f"{path}.{LIST}" if path else LIST, len({*encoder.albert_layer_groups})
        if count > 1:
            places = tuple(f"{start}.{i}" for i in range(encoder.config.num_hidden_layers))
            found.append(("", Site(places[0], places, copies=count)))
    return found


def recorded(model: nn.Module) -> list[tuple[str, Site]]:
    """At least one, or ValueError."""
    if not (found := sites_of(model)):
        raise ValueError("nothing in this model was un-shared: give what surgery.unshare returned")
    return found


def absolute(prefix: str, site: Site) -> list[str]:
    """Paths of its places in the model that holds the recorded one."""
    return [prefix + place for place in site.places]


def slots_of(model: nn.Module, prefix: str, site: Site) -> list[nn.Module]:
    """What is in its places, or ValueError."""
    try:
        return [model.get_submodule(place) for place in absolute(prefix, site)]
    except AttributeError as missing:
        raise ValueError(f"the copies of {prefix}{site.name} are not where they were put: {missing}") from None


def aligned(site: Site, slots: list[nn.Module], buffers: bool = True) -> list[tuple[Tensor, ...]]:
    """Each parameter, and buffer, of the copies side by side; ValueError where they do not match."""
    kinds = [dict((*x.named_parameters(), *(x.named_buffers() if buffers else ()))) for x in slots]
    for other in kinds[1:]:
        if {k: x.shape for k, x in other.items()} != {k: x.shape for k, x in kinds[0].items()}:
            raise ValueError(f"the copies of {site.name} have parameters of other names or shapes: nothing to average")
    return [tuple(kind[name] for kind in kinds) for name in kinds[0]]


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
