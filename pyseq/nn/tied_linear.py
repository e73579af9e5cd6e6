"""The output layer that borrows the matrix of an embedding."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class TiedLinear(nn.Module):
    """Logits by an embedding's own matrix: x @ E.T + b, a row of E for each class.

    embedding: nn.Embedding, E of shape (num_embeddings, dim). It stays a part of the model it is in and no part of this
    layer, which reads `embedding.weight` at each call and has no weight of its own. So the tie holds through `to`,
    `to_empty`, `load_state_dict(assign=True)`, parametrizations, deepcopy and pickling of the model that holds both;
    deepcopy of this layer alone copies the embedding along. bias: whether to add b, at first zeros (num_embeddings,).

    State: bias alone.

    E's gradient is dense, the sum of both uses, also with `sparse=True`: an optimizer that skips rows without gradient
    skips none. `padding_idx` stops the gradient of the look-up alone: this layer trains that row. With `max_norm` a
    look-up shortens rows of E in place, so none may come between this layer's forward and its backward pass: torch
    raises RuntimeError.
    In FSDP2 the embedding and this layer must be in one group, as by one `fully_shard` of the model around both.

    Raises TypeError for what is no nn.Embedding.
    Source: Press and Wolf 2017, "Using the Output Embedding to Improve Language Models"; https://kexue.fm/archives/6985.

    >>> words = torch.nn.Embedding(100, 8)
    >>> head = TiedLinear(words)
    >>> head(words(torch.tensor([[1, 2, 3]]))).shape, [*head.state_dict()], head.weight is words.weight
    (torch.Size([1, 3, 100]), ['bias'], True)
    """

    embedding: nn.Embedding
    bias: nn.Parameter | None

    def __init__(self, embedding: nn.Embedding, bias: bool = True) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding, the module itself, got {type(embedding).__name__}")
        self.__dict__["embedding"] = embedding  # not registered: its weight is in the state once
        weight = embedding.weight
        zeros = torch.zeros(weight.size(0), dtype=weight.dtype, device=weight.device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix, (num_embeddings, dim); read only."""
        return self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the bias zero; the matrix is the embedding's."""
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim), of E's dtype, any under autocast. Returns logits (..., num_embeddings).

        Raises ValueError for another last dimension, TypeError for another dtype, RuntimeError where E is sharded.

        >>> TiedLinear(torch.nn.Embedding(100, 8), bias=False)(torch.randn(2, 8)).shape
        torch.Size([2, 100])
        """
        weight = self.weight
        if isinstance(x, Tensor):  # and no proxy of a tracer
            _check(x, weight)
        return linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """The sizes."""
        rows, dim = self.weight.shape
        return f"dim={dim}, num_embeddings={rows}, bias={self.bias is not None}"


def _check(x: Tensor, weight: Tensor) -> None:
    if hasattr(weight, "full_tensor") and not hasattr(x, "full_tensor"):
        raise RuntimeError(
            "the embedding's matrix is sharded (a DTensor) while this layer runs: put the embedding and the TiedLinear"
            " into one group, by one fully_shard of a module around both"
        )
    if x.dim() == 0 or x.size(-1) != weight.size(1):
        raise ValueError(f"x must have shape (..., dim={weight.size(1)}), got {(*x.shape,)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x must be of the embedding's dtype {weight.dtype}, got {x.dtype}: cast either, or use torch.autocast"
        )
