"""How far former copies have moved apart."""

from dataclasses import dataclass

import torch
from torch import nn

from pyseq.surgery import _follow
from pyseq.surgery._albert import group_a_layer
from pyseq.surgery._record import aligned, recorded, slots_of


@dataclass(frozen=True)
class Drift:
    """How far the copies of one parameter are from their mean: the largest and the root mean square distance over
    former calls, as parts of the mean's norm."""

    module: str
    parameter: str
    copies: int
    max: float
    rms: float


@dataclass(frozen=True)
class DriftReport:
    """What `drift_report` found, a Drift for each parameter; `str()` is the table."""

    rows: tuple[Drift, ...]

    def __str__(self) -> str:
        lines = [("module", "parameter", "copies", "max", "rms")]
        lines += [(r.module, r.parameter, str(r.copies), f"{r.max:.3g}", f"{r.rms:.3g}") for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def drift_report(model: nn.Module) -> DriftReport:
    """How far former copies are from their mean, for each un-shared module and parameter.

    Of what `unshare` returned, also after training and inside a bigger model, or of an ALBERT with several groups.
    Distances are norms, relative to the norm of the mean over the former calls. Raises ValueError where nothing was
    un-shared.

    >>> block = nn.Linear(2, 2)
    >>> model = pyseq.surgery.unshare(nn.Sequential(block, nn.ReLU(), block))
    >>> print(drift_report(model))
    module  parameter  copies  max  rms
    0       weight     2       0    0
    0       bias       2       0    0
    """
    rows = []
    with group_a_layer(model, shorten=False), torch.no_grad():
        for prefix, site in recorded(model):
            slots = slots_of(model, prefix, site)
            names = [name for name, _ in slots[0].named_parameters()]
            for name, tensors in zip(names, aligned(site, slots, buffers=False), strict=True):
                if (copies := len({*tensors})) > 1:
                    center = _follow.mean(tensors)
                    far = torch.stack([(x - center).norm() for x in tensors])
                    far = torch.where(far == 0, 0, far / center.norm())
                    rms = far.square().mean().sqrt()
                    rows.append(Drift(prefix + site.name, name, copies, far.max().item(), rms.item()))
    return DriftReport((*rows,))
