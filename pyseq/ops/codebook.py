"""Vector quantisation: the nearest code of a codebook to each vector, exactly and without a matrix of distances."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyseq.kernels.codebook import Chosen, Search
from pyseq.ops import _check, _codebook
from pyseq.ops._backend import Backend
from pyseq.ops._codebook import SEARCH, STATISTICS

Metric = Literal["l2", "cosine"]
Estimator = Literal["straight_through", "rotation"]
Reduction = Literal["mean", "vector", "sum"]
MOST_CODES = 2**31 - 64
SEARCHED = _check.Signature(
    x="scores (vectors, heads, width)", codebook="sums (heads, codes+, width)", mask="booleans (vectors,)?"
)
CHOSEN = _check.Signature(x="scores (vectors, heads, width)", indices="integers (vectors, heads)")


@SEARCH.op
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
    search = _search(x, codebook, metric, mask)
    indices, distance = _codebook.nearest(SEARCHED(search), metric == "cosine", backend)
    shape = x.shape[:-1]
    return indices.view(shape), distance.view(shape)


@STATISTICS.op
def code_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, heads: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """How many vectors have each code, and their sum.

    x: (..., D) float32, float64, bfloat16 or float16. indices: int64 or int32, of the shape of x without D; -1 is
    counted nowhere, and neither are other indices out of range where values are not looked at (CUDA, graphs).
    num_codes: K, at least 1. heads: the last dimension before D, and the last of indices, is H heads with codes of
    their own.
    Returns counts (K,) int64 and sums (K, D), float64 for float64 x, else float32; with heads (H, K) and (H, K, D).
    Not differentiable. Sums are added up in float64, each code's rows in their order by chunks of 512: the same bits
    for any number of threads, and in no way by products with one-hot rows.
    Raises ValueError for other shapes and devices, on the CPU for indices out of range; TypeError for another dtype.
    Time O(N D + K D), memory O(N + (K + N / 512) D) beside the results.

    >>> ops.code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, -1, 1]), 3)
    (tensor([0, 2, 0]), tensor([[0.],
            [5.],
            [0.]]))
    """
    _tensors(x=x, indices=indices)
    if isinstance(num_codes, bool) or not isinstance(num_codes, (int, torch.SymInt)) or num_codes < 1:
        raise ValueError(f"num_codes must be a whole number from 1, got {num_codes!r}")
    if x.dim() < 1 + heads or indices.shape != x.shape[:-1]:
        wanted = "(..., heads, width)" if heads else "(..., width)"
        raise ValueError(
            f"x must have shape {wanted} and indices the same without width, got {(*x.shape,)} and {(*indices.shape,)}"
        )
    many = x.shape[-2] if heads else 1
    rows = math.prod(x.shape[: -1 - heads])  # numel() would fix a graph's size
    chosen = CHOSEN(Chosen(x.reshape(rows, many, x.shape[-1]), indices.reshape(rows, many)))
    counts, sums = _codebook.statistics(chosen, num_codes, backend)
    return (counts, sums) if heads else (counts.squeeze(0), sums.squeeze(0))


class Quantized(NamedTuple):
    """What `quantize` returns.

    quantized: as x. indices: int64, of the shape of x without D. loss: scalar. counts: int64 (K,), or (H, K).
    perplexity: scalar, e to the entropy of how often each code was chosen, the mean over heads.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    counts: Tensor
    perplexity: Tensor


@SEARCH.op
def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "l2",
    mask: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 0.25,
    estimator: Estimator = "straight_through",
    loss_reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Quantized:
    """Vectors replaced by their nearest codes, with gradients for both.

    x: (..., D) or (..., H, D), codebook: (K, D) or (H, K, D), metric, mask: as for `nearest_code`. With "cosine" both
    are divided by their lengths first, and what is said below is said of that.
    The loss is beta |sg(x) - q|^2 + gamma |x - sg(q)|^2, q the code of x and sg without gradient: beta moves codes to
    vectors (1 in the paper), gamma commits vectors to codes (beta in the paper).
    loss_reduction: "mean" divides the sum of squares by the number of elements, "vector" by that of vectors (of each
    head), "sum" by nothing; masked vectors count nowhere.
    estimator: what reaches x of the gradient of q. "straight_through": the same; "rotation": the same, turned back
    with the rotation from x to q and scaled with |q| / |x|. Nothing of it reaches the codebook.
    Returns (quantized, indices, loss, counts, perplexity); quantized is the code itself, bit for bit in the dtype of
    x. A vector that is masked or not finite has index -1, zeros for a code, and no part in anything else; its
    gradient is 0. The loss is of the dtype of sums: float64 for float64 x, else float32.
    Differentiable in x and codebook, also twice. Forward-mode derivatives and torch.func transforms raise RuntimeError.
    Raises ValueError and TypeError as `nearest_code`, and ValueError for another estimator, reduction, beta or gamma.
    Time O(N K D) forward, O((N + K) D) backward, memory O((N + K) D).
    Sources: van den Oord, Vinyals and Kavukcuoglu 2017, "Neural Discrete Representation Learning"; Fifty et al. 2024,
    "Restructuring Vector Quantization with the Rotation Trick".

    >>> x = torch.tensor([[0.9, 1.0], [0.1, 0.2]], requires_grad=True)
    >>> out = ops.quantize(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> out.quantized.sum().backward()
    >>> out.indices, x.grad
    (tensor([1, 0]), tensor([[1., 1.],
            [1., 1.]]))
    """
    options = loss_options(metric, beta, gamma, estimator, loss_reduction)
    found = _codebook.quantize(SEARCHED(_search(x, codebook, metric, mask)), options._replace(backend=backend))
    quantized, indices, loss, counts, *_ = found
    perplexity = perplexity_of(counts).to(loss.dtype)
    counts = counts if codebook.dim() == 3 else counts.squeeze(0)
    return Quantized(quantized.view(x.shape), indices.view(x.shape[:-1]), loss, counts, perplexity)


def loss_options(
    metric: str, beta: float, gamma: float, estimator: str, loss_reduction: str
) -> _codebook.QuantizeOptions:
    """ValueError for words and numbers that `quantize` does not know."""
    for name, value, kind in (
        ("metric", metric, Metric), ("estimator", estimator, Estimator), ("loss_reduction", loss_reduction, Reduction)
    ):  # fmt: skip
        if value not in get_args(kind):
            raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(kind)))}, got {value!r}")
    for name, number in (("beta", beta), ("gamma", gamma)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number from 0, got {number!r}")
    cosine, rotation = metric == "cosine", estimator == "rotation"
    return _codebook.QuantizeOptions(cosine, rotation, float(beta), float(gamma), loss_reduction, False, "auto")


def perplexity_of(counts: Tensor) -> Tensor:
    """e to the entropy of counts (H, K), the mean over heads; 1 where nothing was counted."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    each: Tensor = torch.special.entr(share).sum(1).exp()
    return each.mean()


def straight_through(forward_fn: Callable[..., Tensor], backward_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the value of one function and the gradient of another.

    forward_fn, backward_fn: take the same arguments and return one tensor each, of one shape. forward_fn runs without
    gradients, so it need not have any, and must not change its arguments; its result is given bit for bit, whole
    numbers and booleans in the dtype of backward_fn's.
    Returns a function of these arguments, differentiable as often as backward_fn is. It raises ValueError when called
    if the shapes differ, and TypeError for what is no tensor. Time and memory: of both functions.

    >>> relu = ops.straight_through(torch.relu, lambda x: x)  # with a gradient where it is 0, too
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> relu(x).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """

    for name, function in (("forward_fn", forward_fn), ("backward_fn", backward_fn)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")

    def both(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = forward_fn(*args, **kwargs)
        proxy = backward_fn(*args, **kwargs)
        if not isinstance(value, Tensor) or not isinstance(proxy, Tensor):
            got = f"{type(value).__name__} and {type(proxy).__name__}"
            raise TypeError(f"forward_fn and backward_fn must return a tensor, got {got}")
        value = value if value.is_floating_point() or value.is_complex() else value.to(proxy.dtype)
        if value.shape != proxy.shape:
            raise ValueError(
                f"forward_fn and backward_fn must return one shape, got {(*value.shape,)} and {(*proxy.shape,)}"
            )
        return _Instead.apply(value, proxy)  # type: ignore[no-any-return]

    return both


class _Instead(torch.autograd.Function):
    """The first argument, as if it were the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, proxy: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, upstream.to(ctx.dtype)


def _tensors(**arguments: object) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _search(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> Search:
    """Vectors in rows, and a codebook of heads; ValueError for shapes that do not fit."""
    _tensors(x=x, codebook=codebook)
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    heads = codebook.dim() == 3
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must have shape (codes, width) or (heads, codes, width), got {(*codebook.shape,)}")
    if x.dim() < 1 + heads or x.shape[-1] != codebook.shape[-1] or (heads and x.shape[-2] != codebook.shape[0]):
        wanted = f"(..., {codebook.shape[0]}, {codebook.shape[2]})" if heads else f"(..., {codebook.shape[1]})"
        raise ValueError(f"x must have shape {wanted} beside a codebook of {(*codebook.shape,)}, got {(*x.shape,)}")
    if codebook.shape[-2] > MOST_CODES:
        raise ValueError(f"codebook must have fewer than 2^31 codes, got {codebook.shape[-2]}")
    outer = x.shape[: -1 - heads]
    if mask is not None:
        _tensors(mask=mask)
    if mask is not None and mask.shape != outer:
        raise ValueError(f"mask must have the shape {(*outer,)} of the vectors, got {(*mask.shape,)}")
    count = math.prod(outer)
    flat = x.reshape(count, codebook.shape[0] if heads else 1, x.shape[-1])
    return Search(flat, codebook if heads else codebook.unsqueeze(0), None if mask is None else mask.reshape(count))
