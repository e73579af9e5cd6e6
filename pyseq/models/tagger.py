"""A sequence tagger: character embedding, bidirectional LSTM, and a CRF or a softmax on top."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseq.nn import CRF, crf_parameter_groups

Compute = Literal["emissions", "loss", "decode"]
PADDING = torch.iinfo(torch.int64).min  # no label that anyone writes at a live step, so that those are all checked


class SequenceTagger(nn.Module):
    """Tag every character of a text.

    num_chars: size of the character vocabulary. num_tags: K. embedding: width of a character's vector. hidden: width of
    the LSTM in each direction. layers: of the bidirectional LSTM. dropout: on the embedding and on each layer's output.
    head: "crf" scores whole tag paths, "softmax" each step alone; the encoder is the same.

    Every method goes through `__call__`, so hooks and wrappers see it. Each takes chars (B, T) int64 in [0, num_chars)
    and a mask (B, T) bool, True at live steps, which come first in each row (padding is on the right); None means all
    live. What stands at padding is not used. Raises ValueError for a head of another name, for a mask of another shape
    or dtype and, on the CPU outside compile, for a mask with padding elsewhere.

    >>> tagger, chars = SequenceTagger(num_chars=100, num_tags=5), torch.randint(100, (2, 7))
    >>> mask = torch.arange(7) < torch.tensor([[7], [4]])
    >>> tagger(chars, mask).shape
    torch.Size([2, 7, 5])
    """

    def __init__(
        self,
        num_chars: int,
        num_tags: int,
        *,
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        dropout: float = 0.2,
        head: Literal["crf", "softmax"] = "crf",
    ) -> None:
        if head not in ("crf", "softmax"):
            raise ValueError(f"head must be 'crf' or 'softmax', got {head!r}")
        super().__init__()
        self.embedding = nn.Embedding(num_chars, embedding)
        widths = [embedding, *[2 * hidden] * (layers - 1)]
        self.forwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.backwards = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(2 * hidden, num_tags)
        self.crf = CRF(num_tags, batch_first=True) if head == "crf" else None  # last: equal seeds, equal encoders

    def forward(
        self, chars: Tensor, mask: Tensor | None = None, tags: Tensor | None = None, *, compute: Compute = "emissions"
    ) -> Any:
        """Emissions, (B, T, K): scores of each tag at each step; or what `compute` names, "loss" or "decode".

        That is for wrappers, which call forward alone: `ddp(chars, mask, tags, compute="loss")`. Raises ValueError for
        another word.

        >>> tagger, chars = SequenceTagger(num_chars=100, num_tags=5), torch.zeros(2, 7, dtype=torch.int64)
        >>> tagger(chars, tags=chars, compute="loss").shape
        torch.Size([])
        """
        if compute not in ("emissions", "loss", "decode"):
            raise ValueError(f"compute must be 'emissions', 'loss' or 'decode', got {compute!r}")
        x = self.dropout(self.embedding(chars))
        turn = _turn(chars, mask).unsqueeze(2)  # [B, T, 1]
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            left = ahead(x)[0]
            right = back(_take(x, turn))[0]
            x = self.dropout(torch.cat((left, _take(right, turn)), 2))  # [B, T, 2 * hidden]
        emissions = self.project(x)
        if compute == "loss":
            return self._loss(emissions, tags, mask)
        return self._best(emissions, mask) if compute == "decode" else emissions

    def loss(self, chars: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of the tags, in nats a live step; a scalar.

        tags: (B, T) int64, in [0, K) at live steps, anything at padding.

        >>> chars = torch.zeros(2, 7, dtype=torch.int64)
        >>> SequenceTagger(num_chars=100, num_tags=5).loss(chars, tags=chars).backward()
        """
        return self(chars, mask, tags, compute="loss")  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, chars: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best tags, (B, T) int64, -1 at padding: the best path under a CRF, each step's best tag under softmax.

        >>> SequenceTagger(num_chars=100, num_tags=5).decode(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7])
        """
        return self(chars, mask, compute="decode")  # type: ignore[no-any-return]

    def _loss(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None) -> Tensor:
        if tags is None:
            raise TypeError("tags must be a tensor, got NoneType; the loss needs them")
        if self.crf is not None:
            return self.crf.nll(emissions, tags, mask, "token_mean")
        if mask is not None:
            tags = tags.masked_fill(~mask, PADDING)
        total = F.cross_entropy(emissions.flatten(0, 1), tags.flatten(), reduction="sum", ignore_index=PADDING)
        return total / (max(tags.numel(), 1) if mask is None else mask.sum().clamp(min=1))

    def _best(self, emissions: Tensor, mask: Tensor | None) -> Tensor:
        if self.crf is not None:
            return self.crf.viterbi(emissions, mask)[1]
        tags = emissions.argmax(2)
        return tags if mask is None else tags.masked_fill(~mask, -1)

    def parameter_groups(self, lr: float, multiplier: float = 10.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: the CRF's parameters learn at `lr * multiplier`, all others at `lr`.

        >>> groups = SequenceTagger(num_chars=100, num_tags=5).parameter_groups(0.001)
        >>> [group["lr"] for group in groups]
        [0.001, 0.01]
        """
        if self.crf is None:
            return [{"params": list(self.parameters()), "lr": lr}]
        return crf_parameter_groups(self, lr, multiplier)


def _turn(chars: Tensor, mask: Tensor | None) -> Tensor:
    """Index (B, T) that reverses the live steps of each row and leaves its padding; its own inverse.

    With it two plain LSTMs make an exact bidirectional one, at twice the speed of packed sequences on a CPU, or more.
    """
    batch, time = chars.shape
    step = torch.arange(time, device=chars.device).expand(batch, time)
    if mask is None:
        return step.flip(1)
    if mask.shape != chars.shape or mask.dtype != torch.bool:
        wanted = f"mask must be bool of the shape of chars, {tuple(chars.shape)}"
        raise ValueError(f"{wanted}, got {mask.dtype} of shape {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and mask.device.type == "cpu" and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("mask must have its live steps first in every row, got padding before one; pad on the right")
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - step, step)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.expand(-1, -1, x.size(2)))
