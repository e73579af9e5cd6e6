"""A prior over code grids by gated convolutions: PixelCNN."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from pyseq.models._prior import Prior
from pyseq.nn.quantizer import _whole


def _gate(x: Tensor) -> Tensor:
    values, gates = x.chunk(2, 1)
    return values.tanh() * gates.sigmoid()


class _Layer(nn.Module):
    """One layer of both stacks: vertical sees the rows above, horizontal these and what is to the left.

    Masked convolutions whose masked weights are never stored: a kernel of (reach + 1) rows, or columns, that ends at
    its own position; in the first layer of reach ones, that end before it.
    """

    def __init__(self, width: int, reach: int, first: bool, num_classes: int | None, dropout: float) -> None:
        super().__init__()
        self.reach, self.first, size = reach, first, reach + 1 - first
        self.vertical = nn.Conv2d(width, 2 * width, (size, 2 * reach + 1))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, size))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def biases(self, labels: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Of the two gates, (B, 2 width, 1, 1)."""
        if self.classes is None:
            return 0.0, 0.0
        vertical, horizontal = self.classes(labels)[:, :, None, None].chunk(2, 1)
        return vertical, horizontal

    def down(self, x: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        """The vertical stack, from x with its padding, and what it tells the horizontal one."""
        found = self.vertical(x)
        return _gate(found + bias), self.link(found)

    def right(self, x: Tensor, link: Tensor, bias: Tensor | float) -> Tensor:
        """What the horizontal stack adds, from x with its padding."""
        return self.out(self.dropout(_gate(self.horizontal(x) + link + bias)))  # type: ignore[no-any-return]

    def forward(self, above: Tensor, left: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        k, end = self.reach, -1 if self.first else None
        vertical, horizontal = self.biases(labels)
        above, link = self.down(F.pad(above, (k, k, k, 0))[:, :, :end], vertical)
        found = self.right(F.pad(left, (k, 0))[:, :, :, :end], link, horizontal)
        return above, found if self.first else left + found


class _Memory(NamedTuple):
    """Of one layer: its inputs on the whole grid and in this row, with zeros around, and the links of this row."""

    above: Tensor  # (n, width, reach + rows, columns + 2 reach)
    left: Tensor  # (n, width, 1, reach + columns)
    links: Tensor  # (n, 2 width, 1, columns)
    biases: tuple[Tensor | float, Tensor | float]


class PixelCNN(Prior):
    """A prior over grids of codes: gated convolutions that see only codes before the one they predict.

    num_codes: K. grid: (rows, columns) of codes. num_classes: labels are needed, and add a bias in every gate; None: no
    labels. width: of all layers. layers: of two stacks each, vertical over the rows above and horizontal over these
    and the codes to the left, so that there is no blind spot. kernel: an odd size, from 3; a code is predicted from
    `reach` = layers * (kernel // 2) columns to its left, rows above and columns beside them. dropout: in the gates.

    With n codes a grid: time O(n kernel^2 width^2) a layer, memory O(n width); a step of cached sampling
    O(kernel width^2) a layer, and O(kernel^2 width^2) for each column at the beginning of a row.
    A state dict says how its model was built; another model refuses it.

    Raises ValueError for codes of another grid, labels without num_classes or none with it and, on the CPU in eager
    mode, codes and labels out of range; TypeError for another dtype.
    Source: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2.

    >>> prior = PixelCNN(16, (4, 6), num_classes=3, width=8, layers=4)
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
        width: int = 128,
        layers: int = 12,
        kernel: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_codes, grid, num_classes, dropout)
        if _whole("kernel", kernel) < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
        self.kernel, reach, width = kernel, kernel // 2, _whole("width", width)
        self.reach = _whole("layers", layers) * reach
        self.codes = nn.Embedding(num_codes, width)
        self.layers = nn.ModuleList(_Layer(width, reach, i == 0, num_classes, dropout) for i in range(layers))
        self.logits = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, num_codes, 1)
        )  # fmt: skip
        self._configure(width=width, layers=layers, kernel=kernel)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, rows, columns, K) of each code, from the codes before it.

        codes: int64 (B, rows, columns) in [0, K), int32, too. labels: int64 (B,) in [0, num_classes).

        >>> PixelCNN(16, (4, 6), width=8, layers=4)(torch.zeros(2, 4, 6, dtype=torch.int64)).shape
        torch.Size([2, 4, 6, 16])
        """
        self._check(codes, labels)
        above = left = self.codes(codes).movedim(3, 1)
        for layer in self.layers:
            above, left = layer(above, left, labels)
        return self.logits(left).movedim(1, 3)  # type: ignore[no-any-return]

    def _cache(self, n: int, labels: Tensor | None) -> list[_Memory]:
        (rows, columns), like = self.grid, self.codes.weight
        memories, width = [], like.size(1)
        for layer in self.layers:
            k = self.kernel // 2
            above = like.new_zeros(n, width, k + rows, columns + 2 * k)
            left, links = like.new_zeros(n, width, 1, k + columns), like.new_empty(n, 2 * width, 1, columns)
            memories.append(_Memory(above, left, links, layer.biases(labels)))  # type: ignore[operator]
        return memories

    def _next(self, cache: list[_Memory], codes: Tensor, row: int, column: int) -> Tensor:
        if column == 0:
            self._begin(cache, codes, row)
        else:
            before = self.codes(codes[:, row, column - 1])
            cache[0].left[:, :, 0, cache[0].left.size(3) - codes.size(2) + column - 1] = before
        x: Tensor | None = None
        for layer, memory in zip(self.layers, cache, strict=True):
            k = self.kernel // 2
            if x is not None:
                memory.left[:, :, :, k + column : k + column + 1] = x
            seen = memory.left[:, :, :, column : column + k + (x is not None)]
            found = layer.right(seen, memory.links[:, :, :, column : column + 1], memory.biases[1])  # type: ignore[operator]
            x = found if x is None else x + found
        assert x is not None
        return self.logits(x).flatten(1)  # type: ignore[no-any-return]

    def _begin(self, cache: list[_Memory], codes: Tensor, row: int) -> None:
        """The vertical stack of a row, from the rows above it."""
        columns, x = codes.size(2), None
        for layer, memory in zip(self.layers, cache, strict=True):
            k = self.kernel // 2
            if x is None and row:
                memory.above[:, :, k + row - 1, k : k + columns] = self.codes(codes[:, row - 1]).movedim(2, 1)
            elif x is not None:
                memory.above[:, :, k + row : k + row + 1, k : k + columns] = x
            seen = memory.above[:, :, row : row + k + (x is not None)]
            x, links = layer.down(seen, memory.biases[0])  # type: ignore[operator]
            memory.links.copy_(links)
