"""What the autoregressive priors share: the codes they take, and how they are sampled."""

from abc import abstractmethod
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from pyseq.models._checks import Configured, check_range, evaluating, looked_at
from pyseq.models._sampling import check_rules, draw, progress
from pyseq.nn.quantizer import _whole

if TYPE_CHECKING:
    from pyseq.models.vqvae import VQVAE


class Prior(Configured):
    """A distribution over grids of codes, one code after another in raster order: from the left, rows from the top."""

    def __init__(self, num_codes: int, grid: tuple[int, int], num_classes: int | None, dropout: float) -> None:
        super().__init__()
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            raise ValueError(f"grid must be (rows, columns), got {grid!r}")
        self.num_codes, self.grid = (
            _whole("num_codes", num_codes),
            (_whole("rows", grid[0]), _whole("columns", grid[1])),
        )
        self.num_classes = None if num_classes is None else _whole("num_classes", num_classes)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")

    def _configure(self, **numbers: int) -> None:
        rows, columns = self.grid
        own = {"num_codes": self.num_codes, "rows": rows, "columns": columns, "num_classes": self.num_classes or 0}
        super()._configure(**own, **numbers)

    def check(self, autoencoder: "VQVAE", size: tuple[int, int], level: int = 0) -> None:
        """Raise ValueError unless this prior fits the codes of an autoencoder.

        size: of its images, (height, width) in pixels. level: of its codes, 0 the top one.

        >>> from pyseq.models import VQVAE, PixelAttention
        >>> PixelAttention(512, (16, 16)).check(VQVAE(num_codes=512), (64, 64))
        """
        if autoencoder.heads != 1:
            raise ValueError(f"a prior has one code a position, got an autoencoder with heads={autoencoder.heads}")
        if autoencoder.num_codes != self.num_codes:
            got = f"got {self.num_codes} and {autoencoder.num_codes}"
            raise ValueError(f"the prior must have as many codes as the autoencoder, {got}; build it with the latter")
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"size must be (height, width) of the images, got {size!r}")
        if level not in range(autoencoder.levels):
            raise ValueError(f"level must be from 0 (top) to {autoencoder.levels - 1}, got {level!r}")
        grid = autoencoder.grids(*size)[level]
        if grid != self.grid:
            images = f"images of {size[0]} x {size[1]} have, {grid}"
            raise ValueError(
                f"the prior's grid must be the one that {images}, got {self.grid}; build it with the former"
            )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Draw grids of codes, (n, rows, columns) int64, in eval mode; the mode is restored.

        labels: int64 (n,), or one for all; needed with num_classes and refused without. temperature: divides the
        logits, before all else; 0: the likeliest code each time. top_k: of the likeliest codes only; 0: all. top_p: of
        the likeliest codes that have this probability together, after top_k; the likeliest code always stays.
        generator: of the model's device; None: torch's own. A seed gives the same codes again on one machine.
        cached: remember what earlier positions computed, so that each step computes one; False: each step computes the
        whole grid. Their logits differ by rounding.
        To be called on the module itself, as `ddp.module.sample(...)`, or under FSDP2 after
        `register_fsdp_forward_method`. A bar shows on a terminal after two seconds, where tqdm is installed.
        Raises ValueError for numbers out of range, labels that do not fit and, on the CPU, logits that are NaN.

        >>> from pyseq.models import PixelAttention
        >>> prior, seed = PixelAttention(16, (4, 6), width=16, heads=2), torch.Generator()
        >>> codes = prior.sample(3, generator=seed.manual_seed(0), top_k=8)
        >>> codes.shape, torch.equal(codes, prior.sample(3, generator=seed.manual_seed(0), top_k=8))
        (torch.Size([3, 4, 6]), True)
        """
        check_rules(temperature, top_k, top_p)
        rows, columns = self.grid
        codes = self.configuration.new_zeros(_whole("n", n), rows, columns)
        each: Any = labels
        if isinstance(labels, SupportsIndex) and not isinstance(labels, Tensor):
            each = torch.full((n,), index(labels), device=codes.device)
        self._check_labels(each, n)
        with evaluating(self):
            cache = self._cache(n, each) if cached else None
            for step in progress(rows * columns):
                at = divmod(step, columns)
                logits = self(codes, each)[:, at[0], at[1]] if cache is None else self._next(cache, codes, *at)
                if looked_at(logits) and bool(logits.isnan().any()):
                    raise ValueError(f"the prior's logits at row {at[0]}, column {at[1]} are NaN: it has diverged")
                codes[:, at[0], at[1]] = draw(logits, temperature, top_k, top_p, generator)
        return codes

    @abstractmethod
    def _cache(self, n: int, labels: Tensor | None) -> Any:
        """What `_next` keeps between positions."""

    @abstractmethod
    def _next(self, cache: Any, codes: Tensor, row: int, column: int) -> Tensor:
        """Logits (n, K) at a position, of codes (n, rows, columns) that are known before it."""

    def _check(self, codes: Tensor, labels: Tensor | None) -> None:
        """Of forward's arguments."""
        mend = "an autoencoder must have as many codes: prior.check(...)"
        check_range("codes", codes, 0, self.num_codes, mend)
        if codes.dim() != 3 or codes.shape[1:] != self.grid:
            wanted = f"codes must have shape (B, rows={self.grid[0]}, columns={self.grid[1]})"
            raise ValueError(f"{wanted}, got {(*codes.shape,)}; a prior is built for one grid")
        self._check_labels(labels, codes.size(0))

    def _check_labels(self, labels: Any, n: int) -> None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels must be None for a prior without classes; build it with num_classes=")
            return
        if labels is None:
            raise ValueError(
                f"labels must be given, from 0 to {self.num_classes - 1}, for a prior with num_classes, got None"
            )
        check_range("labels", labels, 0, self.num_classes, "build the prior with more num_classes")
        if labels.shape != (n,):
            raise ValueError(f"labels must have shape ({n},), one a grid, got {(*labels.shape,)}")
