"""Vector quantisation: the nearest code of a codebook to each vector, exactly and without a matrix of distances."""

from typing import Literal

from torch import Tensor

from pyseq.kernels.codebook import Search
from pyseq.ops import _check, _codebook
from pyseq.ops._backend import Backend
from pyseq.ops._codebook import BACKENDS

Metric = Literal["l2", "cosine"]
_ONE = _check.Signature(
    x="scores (vectors, heads, width)", codebook="sums (heads, codes+, width)", mask="booleans (vectors,)?"
)


@BACKENDS.op
def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "l2",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The nearest code to each vector, and how near it is.

    x: (..., D) float32, float64, bfloat16 or float16. codebook: (K, D) of any float dtype, K at least 1, float64 only
    beside float64 x. Or H heads that know nothing of one another: x (..., H, D), codebook (H, K, D).
    metric: "l2" looks for the least distance, "cosine" for the largest cosine.
    mask: bool, of the shape of x without D (and H), False where a vector is not to be looked at; None: all are.
    Returns indices int64 and the squared distance or the cosine, float64 for float64 x, else float32; both of the
    shape of x without D. Of equal codes the lowest index. A vector that is masked or not finite has index -1 and NaN,
    as have all where no code is finite; a code that is not finite never wins; of a zero vector every cosine is 0.
    Not differentiable: indices are none, and for distances look the codes up.
    Exact: with m the mean of the finite codes, the chosen code's squared distance exceeds the least one by at most
    (D + 4) 2^-22 (|x - m| + |c - m|)^2, with 2^-51 for float64, so a common offset costs no digits. The same input
    gives the same bits for any number of threads and rows beside; near ties may differ between backends.
    Raises ValueError for other shapes, devices or a metric, TypeError for another dtype.
    Time O(N K D), memory O(N + K D) beside the arguments; the reference holds some N x K scores at a time.

    >>> codes = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> ops.nearest_code(torch.tensor([[0.9, 1.0], [0.1, 0.2]]), codes)[0]
    tensor([1, 0])
    """
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    heads = codebook.dim() == 3
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must have shape (codes, width) or (heads, codes, width), got {(*codebook.shape,)}")
    if x.dim() < 1 + heads or x.shape[-1] != codebook.shape[-1] or (heads and x.shape[-2] != codebook.shape[0]):
        wanted = f"(..., {codebook.shape[0]}, {codebook.shape[2]})" if heads else f"(..., {codebook.shape[1]})"
        raise ValueError(f"x must have shape {wanted} beside a codebook of {(*codebook.shape,)}, got {(*x.shape,)}")
    outer = x.shape[: -1 - heads]
    if mask is not None and mask.shape != outer:
        raise ValueError(f"mask must have the shape {(*outer,)} of the vectors, got {(*mask.shape,)}")
    count = outer.numel()
    flat = x.reshape(count, codebook.shape[0] if heads else 1, x.shape[-1])
    search = Search(flat, codebook if heads else codebook.unsqueeze(0), None if mask is None else mask.reshape(count))
    indices, distance = _codebook.nearest(_ONE(search), metric == "cosine", backend)
    shape = x.shape[:-1]
    return indices.view(shape), distance.view(shape)
