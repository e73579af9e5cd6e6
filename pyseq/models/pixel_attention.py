"""A prior over code grids by causal self-attention."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseq.models._prior import Prior
from pyseq.nn.quantizer import _whole


class _Block(nn.Module):
    """Attention to this position and those before, and a dense layer, added to the normalised input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None, position: int = 0) -> Tensor:
        """x: (B, T, width); or (B, 1, width) at a position, with keys and values (2, B, heads, T, width / heads)
        of those before in memory, to which its own are written."""
        x = self.norm(x)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, T, width / heads]
        if memory is None:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            memory[0, :, :, position], memory[1, :, :, position] = k[:, :, 0], v[:, :, 0]
            k, v = memory[:, :, :, : position + 1]
            seen = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        return x + self.dropout(self.dense(seen.transpose(1, 2).flatten(2)).relu())  # type: ignore[no-any-return]


class _Cache(NamedTuple):
    memory: list[Tensor]  # of each block
    condition: Tensor | None  # (n, 1, width)


class PixelAttention(Prior):
    """A prior over grids of codes: each is predicted by causal self-attention to all before it in raster order.

    num_codes: K. grid: (rows, columns) of codes. num_classes: labels are needed, and their embedding is added at each
    position; None: no labels. width: of all layers. layers: each of attention, a dense layer with relu, and a residual
    around both, behind a layer norm. heads: of attention; they must divide width. dropout: on what a layer adds.

    A position takes the code before it, a start token at the first one, and embeddings of its own row and column.
    With n codes a grid: time O(n^2 width + n width^2) a layer, memory O(n width) where torch's attention is fused; a
    step of cached sampling O(n width + width^2) a layer, with a cache of 2 n width numbers.
    A state dict says how its model was built; another model refuses it.

    Raises ValueError for codes of another grid, labels without num_classes or none with it and, on the CPU in eager
    mode, codes and labels out of range; TypeError for another dtype.
    Source: Su 2019, https://kexue.fm/archives/6760, whose defaults these are.

    >>> prior = PixelAttention(16, (4, 6), num_classes=3, width=16, heads=2)
    >>> codes, labels = torch.randint(16, (2, 4, 6)), torch.tensor([0, 2])
    >>> logits = prior(codes, labels)
    >>> loss = F.cross_entropy(logits.flatten(0, 2), codes.flatten())  # nats a code
    >>> prior.sample(2, labels, temperature=0.9).shape
    torch.Size([2, 4, 6])
    """

    def __init__(
        self,
        num_codes: int,
        grid: tuple[int, int],
        *,
        num_classes: int | None = None,
        width: int = 256,
        layers: int = 4,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_codes, grid, num_classes, dropout)
        if _whole("width", width) % _whole("heads", heads):
            raise ValueError(f"heads must divide width, got {heads} and {width}")
        self.heads = heads
        self.tokens = nn.Embedding(num_codes + 1, width)  # 0: the start
        self.rows, self.columns = (nn.Embedding(size, width) for size in self.grid)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(_whole("layers", layers)))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, num_codes)
        self._configure(width=width, layers=layers, heads=heads)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, rows, columns, K) of each code, from the codes before it.

        codes: int64 (B, rows, columns) in [0, K), int32, too. labels: int64 (B,) in [0, num_classes).

        >>> PixelAttention(16, (4, 6), width=16, heads=2)(torch.zeros(2, 4, 6, dtype=torch.int64)).shape
        torch.Size([2, 4, 6, 16])
        """
        self._check(codes, labels)
        x = self.tokens(F.pad(codes.flatten(1)[:, :-1] + 1, (1, 0)))
        x = x + (self.rows.weight.unsqueeze(1) + self.columns.weight).flatten(0, 1)
        if self.classes is not None:
            x = x + self.classes(labels).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x)).unflatten(1, self.grid)  # type: ignore[no-any-return]

    def _cache(self, n: int, labels: Tensor | None) -> _Cache:
        rows, columns = self.grid
        width, like = self.norm.normalized_shape[0], self.tokens.weight
        memory = [like.new_empty(2, n, self.heads, rows * columns, width // self.heads) for block in self.blocks]
        return _Cache(memory, None if self.classes is None else self.classes(labels).unsqueeze(1))

    def _next(self, cache: _Cache, codes: Tensor, row: int, column: int) -> Tensor:
        position = row * codes.size(2) + column
        before = codes.flatten(1)[:, position - 1 : position] + 1 if position else torch.zeros_like(codes[:, 0, :1])
        x = self.tokens(before) + self.rows.weight[row] + self.columns.weight[column]
        if cache.condition is not None:
            x = x + cache.condition
        for block, memory in zip(self.blocks, cache.memory, strict=True):
            x = block(x, memory, position)
        return self.logits(self.norm(x[:, 0]))  # type: ignore[no-any-return]
