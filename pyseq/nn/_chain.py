"""What the layers over linear chains share: arguments and their checks, constraints, what a chain is asked for."""

from collections.abc import Callable
from itertools import accumulate, islice
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyseq import ops
from pyseq.nn.constraints import Constraints, checked

Reduction = Literal["none", "sum", "mean", "token_mean"]
Ignored = Literal["absent", "unknown"]
# emissions (B, T, K), transitions, start, end, mask (B, T)
Chain = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class ChainLayer(nn.Module):
    """A layer with K tags and, perhaps, constraints.

    These are plain tensors: no checkpoint, average, cast or raw memory (`to_empty`, transformers' `from_pretrained`)
    gets at them, as at buffers.
    """

    def __init__(self, num_tags: int, batch_first: bool, constraints: Constraints | None) -> None:
        num_tags = positive("tags", num_tags)
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self._allowed = checked(constraints, num_tags)

    def extra_repr(self) -> str:
        names = zip(("start", "transitions", "end"), self._allowed, strict=True)
        constrained = ", ".join(name for name, allowed in names if allowed is not None)
        return f"num_tags={self.num_tags}" + (f", constraints on {constrained}" if constrained else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChainLayer":
        super()._apply(fn, recurse)
        device = next(self.parameters(recurse=False), torch.empty(0, device="meta")).device
        if device.type != "meta":
            start, transitions, end = (x if x is None else x.to(device) for x in self._allowed)
            self._allowed = start, transitions, end
        return self

    def _batched(self, x: Tensor) -> Tensor:
        """With the batch first, or back in the module's layout."""
        return x if self.batch_first else x.transpose(0, 1)

    def _live(self, mask: Tensor | None) -> Tensor | None:
        """The mask as bool, the batch first."""
        if mask is not None and mask.dtype != torch.bool:
            if mask.dtype != torch.uint8:
                raise TypeError(f"mask must be of dtype torch.bool or torch.uint8, got {mask.dtype}; use mask.bool()")
            mask = mask != 0
        return None if mask is None else self._batched(mask)

    def _infer(self, chain: Chain, compute: str, n_best: int | None, allowed: Tensor | None = None) -> Any:
        """What "marginals", "viterbi" or "decode" are to give."""
        if compute == "marginals":
            return self._batched(ops.crf_marginals(*chain))
        scores, paths = ops.viterbi(*chain, allowed=allowed, n_best=n_best)
        if compute == "decode":
            return live_paths(scores, paths, chain[4], n_best)
        return scores, paths if n_best else self._batched(paths)


class EmissionsLayer(ChainLayer):
    """A layer over an encoder's emissions."""

    def _sets(
        self, allowed: Tensor | None, emissions: Tensor, tags: Tensor | None, ignored: str | None, compute: str
    ) -> Tensor | None:
        """(B, T, K)."""
        if allowed is None:
            return None
        if tags is not None:
            raise ValueError("tags and allowed say the same thing: give one of them, and None for the other")
        if ignored is not None:
            raise ValueError(f"ignored={ignored!r} is for tags, which allowed takes the place of; leave it out")
        if compute == "marginals":
            raise TypeError("compute='marginals' takes no allowed; the loss, 'viterbi' and 'decode' do")
        matching("allowed", allowed, tuple(dense("emissions", emissions).shape), "dimensions of emissions")
        return self._batched(allowed)

    def _validate(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None, tagged: bool) -> None:
        dense("emissions", emissions)
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        rows, columns, num_tags = emissions.shape
        if num_tags != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {num_tags}")
        if tagged:
            matching("tags", tags, (rows, columns), "first two dimensions of emissions")
        if mask is not None:
            matching("mask", mask, (rows, columns), "first two dimensions of emissions")


def positive(what: str, number: int) -> int:
    name = what if what == "rank" else f"num_{what}"
    try:
        number = index(None if isinstance(number, bool) else number)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {number!r}") from None
    if number <= 0:
        wrong = f"invalid number of {what}: {number}" if name != what else f"{name} must be at least 1, got {number}"
        raise ValueError(wrong)
    return number


def forbid(scores: Tensor, allowed: Tensor | None) -> Tensor:
    return scores if allowed is None else torch.where(allowed.to(scores.device), scores, -torch.inf)


def dense(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; use padding and a mask")
    return x


def matching(name: str, x: Tensor | None, shape: tuple[int, ...], dimensions: str) -> None:
    x = dense(name, x)
    if x.shape != shape:
        raise ValueError(f"the {dimensions} and {name} must match, got {shape} and {tuple(x.shape)}")


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """(B,), or a scalar; "token_mean" only adds up."""
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def check_compute(compute: str, with_tags: tuple[str, ...], tags: Tensor | None, n_best: int | None) -> None:
    if compute not in with_tags:
        if compute not in ("viterbi", "decode", "marginals"):
            first = ", ".join(map(repr, with_tags))
            raise ValueError(f"compute must be {first}, 'viterbi', 'decode' or 'marginals', got {compute!r}")
        if tags is not None:
            raise TypeError(f"compute={compute!r} takes no tags; give None for them, then the mask")
    if n_best is not None and compute not in ("viterbi", "decode"):
        raise TypeError(f"compute={compute!r} takes no n_best; 'viterbi' and 'decode' do")


def check_ignored(ignore_index: int, ignored: Ignored | None) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a number that a tag can be, of 64 bits, got {ignore_index}")
    if ignored not in (None, "absent", "unknown"):
        raise ValueError(f"ignored must be None, 'absent' or 'unknown', got {ignored!r}")


def agreeing(tags: Tensor, known: Tensor, num_tags: int) -> Tensor:
    """(B, T, K): every tag where the label is not known."""
    return (torch.arange(num_tags, device=tags.device) == tags.unsqueeze(2)) | ~known.unsqueeze(2)


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "sum", "mean", "token_mean"):
        raise ValueError(f"invalid reduction: {reduction}")


def steps(mask: Tensor | None, like: Tensor) -> Any:
    """How many there are, at least 1."""
    return max(like.size(0) * like.size(1), 1) if mask is None else mask.sum().clamp(min=1)


def live_tags(path: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tags of each sequence's live steps."""
    if mask is None:
        return path.tolist()  # type: ignore[no-any-return]
    mask = mask.cpu()  # NumPy selects several times faster than torch
    flat, counts = path.cpu().numpy()[mask.numpy()].tolist(), mask.sum(1).tolist()
    return [flat[stop - count : stop] for count, stop in zip(counts, accumulate(counts), strict=True)]


def live_paths(scores: Tensor, paths: Tensor, mask: Tensor | None, n_best: int | None) -> list[list[Any]]:
    """The same of several paths a sequence, without missing ones."""
    if n_best is None:
        return live_tags(paths, mask)
    rows = iter(live_tags(paths.flatten(0, 1), None if mask is None else mask.repeat_interleave(n_best, 0)))
    found = (scores > -torch.inf).tolist()
    return [[row for row, there in zip(islice(rows, n_best), flags, strict=True) if there] for flags in found]
