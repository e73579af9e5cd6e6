"""Autoencoders of images with discrete codes: VQ-VAE, and VQ-VAE-2 with codes on two levels."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyseq.models._checks import Configured, check_images, check_range, evaluating
from pyseq.models._convolutions import decoder, encoder
from pyseq.nn import VectorQuantizer, VectorQuantizerOutput
from pyseq.nn.quantizer import _whole

Codes: TypeAlias = Tensor | tuple[Tensor, Tensor]
OWN = ("dim", "num_codes", "codebook_dim", "decay", "beta", "gamma", "channel_dim")  # of a quantiser, set by the model


class VQVAEOutput(NamedTuple):
    """What a training step of VQVAE needs.

    reconstruction: as x, in [-1, 1]. loss: scalar, reconstruction_loss and the loss of each quantiser added up; NaN
    where the encoder gave what is not finite, which has code -1.
    reconstruction_loss: scalar, the mean of squared differences over all elements. codes: as of `encode`.
    quantizers: the VectorQuantizerOutput of each level, top first, with its loss, perplexity and usage.
    """

    reconstruction: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    codes: Codes
    quantizers: tuple[VectorQuantizerOutput, ...]


class VQVAE(Configured):
    """Images as grids of discrete codes, and back.

    channels: of the images. width: of all layers between. num_codes: K, of each level. code_dim: dimension of a code;
    None: width, else linear layers project to it and back. downsampling: pixels to a code along each side, a power of
    two: one 4 x 4 convolution of stride 2 for each doubling. blocks: residual blocks of the encoder, and as many of the
    decoder. batch_norm: as in the post; False: none, as in the paper.
    levels: 2 for VQ-VAE-2, whose top codes stand for twice as many pixels a side; the bottom features see the decoded
    top codes before they are quantised, and the decoder sees both.
    decay: of a codebook that follows by moving averages; None: one trained by gradients, as the post's and the paper's
    was. beta: weight of the codebook's loss (decay=None only). gamma: that of the commitment loss, the paper's beta.
    quantizer: further options of `nn.VectorQuantizer`, for each level: heads, metric, kmeans_init, dead_code_threshold,
    estimator, loss_reduction, accumulation_steps.

    Defaults are the post's network and loss, but for K (the post has 64) and the revival of dead codes.
    `VQVAE(width=256, blocks=2, batch_norm=False)` is the paper's for CIFAR-10, but with one code a position for ten.

    Images are floats (B, channels, H, W) in [-1, 1], of the model's dtype or under autocast, H and W multiples of
    `stride`, which is downsampling * levels. Codes are int64 (B, H / downsampling, W / downsampling), with heads behind
    where there are several; of two levels a tuple (top, bottom), the top grid half as large each way.
    `encode`, `decode`, `reconstruct` and `interpolate` work without gradients and as in eval, whatever the mode, and
    leave the mode as it was. They are called on the module itself: `ddp.module.encode(x)`, or under FSDP2 after
    `register_fsdp_forward_method`. A state dict says how its model was built; another model refuses it.

    Raises ValueError for an image or a code of another shape or, on the CPU in eager mode, out of range, TypeError for
    another dtype, and in the constructor for numbers that cannot be.
    Source: van den Oord, Vinyals and Kavukcuoglu 2017, "Neural Discrete Representation Learning"; Razavi, van den Oord
    and Vinyals 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2"; Su 2019, https://kexue.fm/archives/6760.

    >>> model = VQVAE(width=8, num_codes=16, blocks=1)
    >>> images = torch.rand(2, 3, 16, 24) * 2 - 1
    >>> out = model(images)
    >>> out.loss.backward()
    >>> out.reconstruction.shape, out.codes.shape
    (torch.Size([2, 3, 16, 24]), torch.Size([2, 4, 6]))
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 128,
        num_codes: int = 512,
        code_dim: int | None = None,
        downsampling: int = 4,
        blocks: int = 3,
        batch_norm: bool = True,
        levels: Literal[1, 2] = 1,
        decay: float | None = None,
        beta: float = 1.0,
        gamma: float = 0.25,
        quantizer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.num_codes, width = map(
            _whole, ("channels", "num_codes", "width"), (channels, num_codes, width)
        )
        self.downsampling, blocks = _whole("downsampling", downsampling), _whole("blocks", blocks)
        halvings = self.downsampling.bit_length() - 1
        if self.downsampling != 2**halvings or not halvings:
            raise ValueError(f"downsampling must be a power of two from 2, got {downsampling}")
        if levels not in (1, 2):
            raise ValueError(f"levels must be 1 or 2, got {levels!r}")
        options = dict(quantizer or {})
        if own := [name for name in OWN if name in options]:
            mend = "".join(f"; give {'code_dim' if x == 'codebook_dim' else x}= to VQVAE itself" for x in own[:1])
            mend = "" if own[0] in ("dim", "channel_dim") else mend
            raise ValueError(f"quantizer must not name what VQVAE sets, got {', '.join(own)}{mend}")
        options |= {"codebook_dim": code_dim, "decay": decay, "beta": beta, "gamma": gamma, "channel_dim": 1}
        self.levels, self.stride = levels, self.downsampling * levels
        self.encoder = encoder(self.channels, width, halvings, blocks, batch_norm)
        self.decoder = decoder(width, self.channels, halvings, blocks, batch_norm)
        try:
            self.quantizers = nn.ModuleList(VectorQuantizer(width, num_codes, **options) for _ in range(levels))
        except ValueError as error:  # in this class's words
            text = str(error).replace("codebook_dim", "code_dim").replace("divide dim", "divide width")
            raise ValueError(text) from None
        if levels == 2:
            self.top_encoder = nn.Sequential(nn.ReLU(), encoder(width, width, 1, blocks, batch_norm))
            self.top_decoder = decoder(width, width, 1, blocks, batch_norm)
            self.condition, self.join = (nn.Conv2d(2 * width, width, 1) for _ in range(2))
        first: Any = self.quantizers[0]
        self.heads: int = first.heads
        self._configure(
            channels=channels, width=width, num_codes=num_codes, code_dim=first.codebook_dim, heads=self.heads,
            downsampling=downsampling, blocks=blocks, batch_norm=batch_norm, levels=levels,
            moving_averages=decay is not None, cosine=options.get("metric") == "cosine",
            revival=any(name.endswith("ema_counts") for name, _ in first.named_buffers()),
        )  # fmt: skip

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Reconstruct images through their codes, with the loss; in training the codebooks learn.

        x: (B, channels, H, W), as the class says.

        >>> out = VQVAE(1, width=8, num_codes=16, blocks=1, levels=2)(torch.zeros(2, 1, 16, 16))
        >>> [tuple(codes.shape) for codes in out.codes]
        [(2, 2, 2), (2, 4, 4)]
        >>> torch.equal(out.loss, out.reconstruction_loss + sum(level.loss for level in out.quantizers))
        True
        """
        features = self._features(x)
        vectors, found = self._quantized(features)
        reconstruction = self._decoded(vectors)
        error = F.mse_loss(reconstruction, x)
        loss = error + sum(level.loss for level in found)
        for level in features:  # the quantiser passes over vectors that are not finite, but training must not
            loss = loss + 0 * level.mean(dtype=torch.promote_types(level.dtype, torch.float32))
        return VQVAEOutput(reconstruction, loss, error, self._codes(found), found)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """The codes of images; -1 where a vector is not finite.

        >>> VQVAE(width=8, num_codes=16, blocks=1).encode(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 2, 2])
        """
        with evaluating(self):
            return self._codes(self._quantized(self._features(x))[1])

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """The images of codes, as `reconstruct` gives them of the images that had these codes, to the bit.

        codes: as of `encode`, of any grid; int32, too.

        >>> model, images = VQVAE(width=8, num_codes=16, blocks=1), torch.zeros(2, 3, 8, 8)
        >>> torch.equal(model.decode(model.encode(images)), model.reconstruct(images))
        True
        """
        given = tuple(codes) if isinstance(codes, (tuple, list)) else (codes,)
        if len(given) != self.levels:
            raise ValueError(f"codes must be {'(top, bottom)' if self.levels == 2 else 'one tensor'}, got {len(given)}")
        shape = "(B, h, w)" if self.heads == 1 else f"(B, h, w, heads={self.heads})"
        for level in given:
            check_range("codes", level, -1, self.num_codes, "a prior must have as many codes: prior.check(...)")
            if level.dim() != 3 + (self.heads > 1) or (self.heads > 1 and level.size(3) != self.heads):
                raise ValueError(f"codes must have shape {shape}, got {(*level.shape,)}")
        top, bottom = given[0].shape[:3], given[-1].shape[:3]
        if self.levels == 2 and bottom != (top[0], 2 * top[1], 2 * top[2]):
            raise ValueError(f"bottom codes must be (B, 2 h, 2 w) to top codes (B, h, w), got {(*bottom,)}, {(*top,)}")
        with evaluating(self):
            indices = [level.unsqueeze(3) if self.heads == 1 else level for level in given]
            vectors = [q.codes_to_vectors(x) for q, x in zip(self.quantizers, indices, strict=True)]  # type: ignore[operator]
            kind = given[0].device.type
            if torch.is_autocast_enabled(kind):  # whose encoder gives vectors of this type
                vectors = [x.to(torch.get_autocast_dtype(kind)) for x in vectors]
            return self._decoded(vectors)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, quantize: bool = True) -> Tensor:
        """Images through the autoencoder; quantize=False: past the codes, to see what these cost.

        >>> VQVAE(width=8, num_codes=16, blocks=1).reconstruct(torch.zeros(2, 3, 8, 8), quantize=False).shape
        torch.Size([2, 3, 8, 8])
        """
        with evaluating(self):
            return self._decoded(self._quantized(self._features(x), quantize)[0])

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """Images between images: encoder outputs are interpolated, then quantised and decoded.

        a, b: images of one shape (B, channels, H, W). steps: at least 2. Returns (B, steps, channels, H, W), which
        begins with `reconstruct(a)` and ends with `reconstruct(b)`, but for rounding.

        >>> model, (a, b) = VQVAE(width=8, num_codes=16, blocks=1), torch.zeros(2, 4, 3, 8, 8)
        >>> model.interpolate(a, b, steps=5).shape
        torch.Size([4, 5, 3, 8, 8])
        """
        if _whole("steps", steps) < 2:
            raise ValueError(f"steps must be at least 2, for both ends, got {steps}")
        if a.shape != b.shape:
            raise ValueError(f"a and b must have one shape, got {(*a.shape,)} and {(*b.shape,)}")
        with evaluating(self):
            mixed = []
            for left, right in zip(self._features(a), self._features(b), strict=True):
                share = torch.linspace(0, 1, steps, device=left.device, dtype=left.dtype).view(steps, 1, 1, 1)
                mixed.append(torch.lerp(left.unsqueeze(1), right.unsqueeze(1), share).flatten(0, 1))
            images = self._decoded(self._quantized(mixed)[0])
            return images.view(len(a), steps, *images.shape[1:])

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The grid of codes (h, w) of each level, top first, for images of this size, in pixels.

        Raises ValueError for a size that is no multiple of `stride`.

        >>> VQVAE(levels=2).grids(64, 32)
        ((8, 4), (16, 8))
        """
        if height % self.stride or width % self.stride or min(height, width) < 1:
            wanted = f"height and width must be multiples of {self.stride} (downsampling * levels)"
            raise ValueError(f"{wanted}, got {height} x {width}; crop, pad or resize the images")
        scales = [self.downsampling * 2**level for level in reversed(range(self.levels))]
        return tuple((height // scale, width // scale) for scale in scales)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Encoder outputs (B, width, h, w), top first."""
        check_images(x, self.channels, next(self.parameters()).dtype)
        self.grids(x.size(2), x.size(3))
        bottom = self.encoder(x)
        return [bottom] if self.levels == 1 else [self.top_encoder(bottom), bottom]

    def _quantized(
        self, features: list[Tensor], quantize: bool = True
    ) -> tuple[list[Tensor], tuple[VectorQuantizerOutput, ...]]:
        """The vectors that are decoded, and what the quantisers said, top first."""
        vectors: list[Tensor] = []
        found: list[VectorQuantizerOutput] = []
        for level, quantizer in zip(features, self.quantizers, strict=True):
            if vectors:
                level = self.condition(torch.cat((self.top_decoder(vectors[0]), level), 1))
            if quantize:
                found.append(quantizer(level))
                level = found[-1].quantized
            vectors.append(level)
        return vectors, tuple(found)

    def _decoded(self, vectors: list[Tensor]) -> Tensor:
        x = vectors[-1]
        if self.levels == 2:
            x = self.join(torch.cat((self.top_decoder(vectors[0]), x), 1))
        return torch.tanh(self.decoder(x))

    def _codes(self, found: tuple[VectorQuantizerOutput, ...]) -> Codes:
        codes = [level.indices.squeeze(3) if self.heads == 1 else level.indices for level in found]
        return codes[0] if self.levels == 1 else (codes[0], codes[1])
