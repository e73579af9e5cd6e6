"""A vector quantiser whose codebook learns by moving averages or by gradients, and does not collapse."""

import math
from operator import index
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyseq.kernels.codebook import Search
from pyseq.nn._codebook import Averages, draw, followed, k_means, reduced, revived
from pyseq.ops import _codebook, _torch
from pyseq.ops._backend import settings
from pyseq.ops.codebook import SEARCHED, Estimator, Metric, Reduction, loss_options, perplexity_of
from pyseq.reference.codebook import unit

USE_DECAY = 0.99  # of how often codes are used, where the codebook learns by gradients
STATE = ("codebook", "ema_counts", "ema_sums", "pending_counts", "pending_sums")  # is never of half precision


class VectorQuantizerOutput(NamedTuple):
    """What a quantiser returns, all by the codebook before the step's update.

    quantized: as x. indices: int64 (..., heads), -1 for what is masked or not finite. loss: scalar. perplexity: scalar,
    e to the entropy of how often codes were chosen, the mean over heads. usage: scalar, the share of codes that were
    chosen. Both count the rows of all ranks while the codebook learns, of this rank else.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    usage: Tensor


class VectorQuantizer(nn.Module):
    """Vectors replaced by the nearest of K learnt codes, as in VQ-VAE.

    dim: of the vectors. num_codes: K. heads: parts of a vector that are quantised alone, each with K codes of its own.
    codebook_dim: D, the dimension of a code, of each head; None: dim / heads. If heads * codebook_dim is not dim,
    linear layers project to it and back.
    decay: of the moving averages by which codes follow their vectors, in [0, 1); None: a codebook trained by gradients.
    beta: weight of the codebook's term of the loss, with decay=None only. gamma: that of the commitment term (the
    paper's beta). loss_reduction, estimator, metric: as for `ops.quantize`; with "cosine" codes have length one.
    kmeans_init: the first training batch, of all ranks, gives the codes by ten rounds of k-means.
    dead_code_threshold: a code that is chosen less often than this fraction of the mean becomes a vector of the batch,
    in [0, 1); 0: never.
    channel_dim: the dimension of x that holds the vectors, 1 for images (B, C, H, W).
    accumulation_steps: forwards whose statistics make one update of the codebook, for gradient accumulation.

    State: codebook (heads, K, D), a parameter where decay is None, else a buffer; ema_counts, ema_sums, steps,
    quarantined (parts of vectors, one a head, met in training that were not masked and not finite) and initialized.
    Codes and averages stay in float32 when the model is cast to half precision. Nothing changes in eval, after
    `freeze()`, or when activation checkpointing runs a forward again. Averages begin with each code counted once; a
    code with fewer than 0.001 rows stays where it is. A state dict is to be loaded on every rank.

    In training ranks of the default process group share one all_reduce of (heads, K, 2 D + 2) numbers a step, so their
    codebooks, if equal at first, stay equal, and with as many valid rows on each are those of one process with the
    joined batch. In eval there is no communication. A gradient codebook inside FSDP2 needs
    `fully_shard(..., ignored_params={quantizer.codebook})`, and its gradient averaged by you, for FSDP2 then leaves it
    alone; or dead_code_threshold=0, for revived codes would be lost with the gathered weights.
    Activation checkpointing is right for one call of a quantiser before each backward pass, and not around or inside
    of compiled code: docs/quantizer.md, Limits.

    Time of a forward O(N K D) for N vectors, of all else O(N D + K D); no N x K matrix is ever made.
    Raises ValueError for numbers or words out of range, TypeError for what is no whole number.
    Source: van den Oord, Vinyals and Kavukcuoglu 2017, "Neural Discrete Representation Learning", appendix A.1.

    >>> quantizer = VectorQuantizer(dim=8, num_codes=16)
    >>> out = quantizer(torch.randn(4, 10, 8))
    >>> out.quantized.shape, out.indices.shape
    (torch.Size([4, 10, 8]), torch.Size([4, 10, 1]))
    """

    codebook: Tensor
    ema_counts: Tensor | None
    ema_sums: Tensor | None
    pending_counts: Tensor | None
    pending_sums: Tensor | None
    steps: Tensor
    quarantined: Tensor
    initialized: Tensor

    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        codebook_dim: int | None = None,
        heads: int = 1,
        decay: float | None = 0.99,
        beta: float = 1.0,
        gamma: float = 0.25,
        metric: Metric = "l2",
        kmeans_init: bool = False,
        dead_code_threshold: float = 0.1,
        estimator: Estimator = "straight_through",
        loss_reduction: Reduction = "mean",
        channel_dim: int = -1,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__()
        self.dim, self.num_codes, self.heads = (
            _whole("dim", dim),
            _whole("num_codes", num_codes),
            _whole("heads", heads),
        )
        if codebook_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} and {dim}; or give codebook_dim, to project")
        self.codebook_dim = dim // heads if codebook_dim is None else _whole("codebook_dim", codebook_dim)
        for name, number in (("decay", decay), ("dead_code_threshold", dead_code_threshold)):
            if number is None and name == "decay":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1:
                raise ValueError(f"{name} must be in [0, 1), got {number!r}")
        if decay is not None and beta != 1:
            raise ValueError(f"beta weighs a term that moving averages do without: got {beta} and decay={decay}")
        self._options = loss_options(metric, beta if decay is None else 0.0, gamma, estimator, loss_reduction)
        self.decay, self.dead_code_threshold, self.channel_dim = decay, dead_code_threshold, index(channel_dim)
        self.accumulation_steps = _whole("accumulation_steps", accumulation_steps)
        inner = self.heads * self.codebook_dim
        self.project_in: nn.Module = nn.Identity() if inner == dim else nn.Linear(dim, inner)
        self.project_out: nn.Module = nn.Identity() if inner == dim else nn.Linear(inner, dim)
        codes, counts = torch.empty(self.heads, self.num_codes, self.codebook_dim), torch.empty(self.heads, num_codes)
        if decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        averages = decay is not None or dead_code_threshold > 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("quarantined", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.int64))
        # what may be None is last: torch.export trips over a None before others
        self.register_buffer("ema_counts", torch.empty_like(counts) if averages else None)
        self.register_buffer("ema_sums", torch.empty_like(codes) if decay is not None else None)
        pending = accumulation_steps > 1 and averages
        self.register_buffer("pending_counts", torch.empty_like(counts) if pending else None)
        self.register_buffer("pending_sums", torch.empty_like(codes) if pending and decay is not None else None)
        self.kmeans_init, self.frozen = bool(kmeans_init), False
        self._dtype: torch.dtype | None = None  # to which the module was cast
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw codes from the uniform distribution on [-1/K, 1/K], or for cosines from the sphere; forget all use."""
        if self._options.cosine:
            self.codebook.copy_(unit(torch.randn_like(self.codebook)))
        else:
            self.codebook.uniform_(-1 / self.num_codes, 1 / self.num_codes)
        self._start(Averages(self.codebook, torch.ones_like(self.codebook[..., 0]), self.codebook))
        for name in ("pending_counts", "pending_sums", "steps", "quarantined"):
            if (buffer := getattr(self, name)) is not None:
                buffer.zero_()
        self.initialized.fill_(int(not self.kmeans_init))
        self._ready = not self.kmeans_init  # a Python flag, so that a graph has no branch on a value
        self._last: Tensor | None = None  # the codes that the latest training forward read
        for projection in (self.project_in, self.project_out):
            if isinstance(projection, nn.Linear):
                projection.reset_parameters()

    def freeze(self, frozen: bool = True) -> "VectorQuantizer":
        """Let the codebook stay as it is, in training too, or learn again. Returns the module.

        >>> quantizer = VectorQuantizer(dim=8, num_codes=16).freeze()
        >>> before = quantizer.codebook.clone()
        >>> out = quantizer(torch.randn(100, 8))
        >>> torch.equal(before, quantizer.codebook)
        True
        """
        self.frozen = frozen
        if isinstance(self.codebook, nn.Parameter):
            self.codebook.requires_grad_(not frozen)
        return self

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, compute: Literal["quantize", "codes_to_vectors"] = "quantize"
    ) -> Any:
        """Quantise, and let the codebook learn while in training.

        x: float tensor of any rank, of size dim along channel_dim. mask: bool, of the shape of x without that
        dimension, False where a vector is not to be looked at: index -1, zeros in quantized, no part in anything else.
        compute: "codes_to_vectors" for that method's result, with its indices in place of x.
        Returns a VectorQuantizerOutput. Raises ValueError for another shape or device, TypeError for another dtype.

        >>> quantizer = VectorQuantizer(dim=8, num_codes=16, heads=2, channel_dim=1)
        >>> images = torch.randn(4, 8, 5, 5, requires_grad=True)
        >>> out = quantizer(images)
        >>> (out.quantized.square().mean() + out.loss).backward()
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([4, 8, 5, 5]), torch.Size([4, 5, 5, 2]))
        """
        if compute == "codes_to_vectors":
            return self._vectors(x)
        if compute != "quantize":
            raise ValueError(f"compute must be 'quantize' or 'codes_to_vectors', got {compute!r}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not -x.dim() <= self.channel_dim < x.dim() or x.size(self.channel_dim) != self.dim:
            raise ValueError(
                f"x must be of size dim={self.dim} along channel_dim={self.channel_dim}, got {(*x.shape,)}"
            )
        inner = x.movedim(self.channel_dim, -1)
        shape = inner.shape[:-1]
        if not isinstance(self.project_in, nn.Identity):  # whose weight's gradient is 0 times what is not finite, else
            finite = inner.isfinite().all(-1, keepdim=True)
            inner = torch.where(finite, self.project_in(torch.where(finite, inner, 0.0)), torch.nan)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask is not None and mask.shape != shape:
            raise ValueError(f"mask must have the shape {(*shape,)} of the vectors, got {(*mask.shape,)}")
        rows = inner.reshape(math.prod(shape), self.heads, self.codebook_dim)
        learns = self.training and not self.frozen
        again = learns and _torch.in_backward()  # activation checkpointing runs the forward once more
        flat = None if mask is None else mask.reshape(-1)
        if learns and not self._ready and not torch.compiler.is_compiling():  # DDP and averages copy buffers alone
            self._ready = bool(self.initialized)
        if learns and not again and not self._ready:
            SEARCHED(Search(rows, self.codebook, flat))  # before anything changes
            self._initialize(rows.detach(), flat)
        codes = self._codes(learns, again)
        sums = learns and self.decay is not None  # again, too: checkpointing compares what both forwards save
        search = SEARCHED(Search(rows, codes, flat))
        quantized, indices, loss, counts, sums_, _ = _codebook.quantize(search, self._options._replace(sums=sums))
        if learns and not again:
            counts = self._learn(search, indices, counts, sums_ if sums else None)
        usage = (counts > 0).to(loss.dtype).mean()
        out = self._projected(quantized, indices).view(*shape, self.dim).movedim(-1, self.channel_dim)
        perplexity = perplexity_of(counts).to(loss.dtype)
        return VectorQuantizerOutput(out, indices.view(*shape, self.heads), loss, perplexity, usage)

    def codes_to_vectors(self, indices: Tensor) -> Tensor:
        """What `quantized` is for these indices.

        indices: int64 or int32 (..., heads); -1 gives a part of zeros, and a vector of zeros where all are -1.
        Returns vectors of size dim along channel_dim, of the dtype that the module was cast to (at first float32), with
        gradients for a gradient codebook.
        Raises ValueError for another shape, and below -1 or from K on (on the CPU in eager mode), TypeError for another
        dtype.

        >>> quantizer = VectorQuantizer(dim=8, num_codes=16).eval()
        >>> out = quantizer(torch.randn(5, 8))
        >>> torch.equal(quantizer.codes_to_vectors(out.indices), out.quantized)
        True
        """
        return self(indices, compute="codes_to_vectors")  # type: ignore[no-any-return]

    def _vectors(self, indices: Tensor) -> Tensor:
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices must be a tensor of dtype torch.int64 or torch.int32, got {got}")
        if indices.dim() == 0 or indices.size(-1) != self.heads:
            raise ValueError(f"indices must have shape (..., heads={self.heads}), got {(*indices.shape,)}")
        if settings.check or (indices.is_cpu and not _torch.traced()):
            _codebook.raise_bad_indices(indices, self.num_codes)
        flat = indices.reshape(-1, self.heads).long()
        heads = torch.arange(self.heads, device=indices.device)
        codes = unit(self.codebook) if self._options.cosine else self.codebook
        found = codes[heads, flat.clamp(0, self.num_codes - 1)]
        found = torch.where((flat >= 0).unsqueeze(2), found, 0.0)
        found = found if self._dtype is None else found.to(self._dtype)
        out = self._projected(found, flat).view(*indices.shape[:-1], self.dim)
        return out.movedim(-1, self.channel_dim)

    def _projected(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Rows (N, H, D) as vectors (N, dim), zeros where no head has a code."""
        if isinstance(self.project_out, nn.Identity):
            return rows.flatten(1)
        weight = self.project_out.weight
        out: Tensor = self.project_out(rows.flatten(1).to(weight.dtype))  # type: ignore[arg-type]
        return torch.where((indices >= 0).any(1, keepdim=True), out, 0.0)

    def _codes(self, learns: bool, again: bool) -> Tensor:
        """The codebook as it is now, for backward needs it after the update; or as it was the last time."""
        if again and self._last is not None:
            moved: Tensor = self.codebook - self.codebook.detach()  # nothing, with a gradient
            return self._last + moved if self.decay is None else self._last
        if not learns or self.ema_counts is None:
            return self.codebook
        codes = self.codebook.clone()
        self._last = codes.detach()
        return codes

    @torch.no_grad()
    def _initialize(self, rows: Tensor, mask: Tensor | None) -> None:
        found = k_means(rows, mask, self.codebook.detach(), self._options.cosine, self.steps)
        if not torch.compiler.is_compiling() and not found.counts.any():  # on no rank was there a row to begin from
            return
        self._start(found)
        self.codebook.copy_(found.codes)
        self.initialized.fill_(1)
        self._ready = True

    def _start(self, averages: Averages) -> None:
        if self.ema_counts is not None:
            self.ema_counts.copy_(averages.counts)
        if self.ema_sums is not None and averages.sums is not None:
            self.ema_sums.copy_(averages.sums)

    @torch.no_grad()
    def _learn(self, search: Search, indices: Tensor, counts: Tensor, sums: Tensor | None) -> Tensor:
        """Update the state; returns the counts of all ranks."""
        dtype, valid = self.codebook.dtype, indices >= 0
        looked = valid.numel() if search.mask is None else search.mask.sum() * self.heads
        parts = [counts.to(dtype), (looked - counts.sum()).to(dtype)]
        if sums is not None:
            parts.append(sums.to(dtype))
        if self.dead_code_threshold:
            found, mine = draw(search.x.detach(), valid, self.num_codes, self.steps)
            parts += [mine.to(dtype), unit(found.to(dtype)) if self._options.cosine else found.to(dtype)]
        counts, lost, *rest = reduced(*parts)
        self.quarantined += lost.long()
        self.steps += 1
        if self.ema_counts is None:
            return counts
        sums = rest.pop(0) if sums is not None else None
        new_counts = counts if self.pending_counts is None else self.pending_counts.add_(counts)
        new_sums = sums if self.pending_sums is None or sums is None else self.pending_sums.add_(sums)
        before = Averages(self.codebook, self.ema_counts, self.ema_sums)
        decay = USE_DECAY if self.decay is None else self.decay
        after = followed(before, new_counts, new_sums, decay, self._options.cosine)
        if rest:
            after = revived(after, rest[1], rest[0] == 1, self.dead_code_threshold)
        due = self.steps % self.accumulation_steps == 0
        for old, new in zip(before, after, strict=True):
            if old is not None and new is not None and old is not new:
                old.copy_(new if self.accumulation_steps == 1 else torch.where(due, new, old))
        for pending in (self.pending_counts, self.pending_sums):
            if pending is not None:
                pending.masked_fill_(due, 0)
        return counts

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initialized.is_meta:
            self._ready, self._last = bool(self.initialized), None

    def _apply(self, fn: Any, recurse: bool = True) -> "VectorQuantizer":
        state = [x for name in STATE if (x := getattr(self, name)) is not None]
        own = {id(x) for x in (*state, *(x.grad for x in state))}

        def kept(x: Tensor) -> Tensor:
            moved: Tensor = fn(x)
            half = id(x) in own and moved.is_floating_point() and moved.element_size() < 4
            return x.to(moved.device) if half else moved

        like = self.codebook.new_empty(0, dtype=self._dtype)
        self._dtype = fn(like).dtype if self._dtype or fn(like).dtype != like.dtype else None
        super()._apply(kept, recurse)
        self._last = None
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_codes}, codebook_dim={self.codebook_dim}, heads={self.heads}, decay={self.decay}"


def _whole(name: str, number: Any) -> int:
    """A whole number from 1, else TypeError or ValueError."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {number!r}")
    if index(number) < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return index(number)
