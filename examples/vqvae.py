"""What does a VQ-VAE keep of real pictures, and do priors over its codes draw new ones?

Trains autoencoders on satellite tiles, with codebooks of several kinds and sizes, and priors over the codes of digits
and tiles, and writes a row of `docs/evidence/vqvae.csv` for each finished run, then the page and the figures beside it.
A restart skips the runs that have rows; delete the file to start anew. `--quick` writes to `runs/`.
"""

import argparse
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _study import (
    Row,
    Run,
    Verdict,
    aligned,
    facts,
    figure,
    interval,
    markdown,
    paired,
    progress,
    read,
    seen,
    spread,
    work_off,
)
from _study import text as texts
from torch import Tensor, nn
from torch.nn import functional as F

from pyseq.data import digits, tiles
from pyseq.models import VQVAE, PixelAttention, PixelCNN

ROOT = Path(__file__).resolve().parents[1]
SIDE, WIDTH, CODES, BATCH, RATE = 64, 64, 512, 16, 2e-3
PRIOR_BATCH, PRIOR_RATE = 32, 1e-3
EMA: dict[str, Any] = {"decay": 0.99}
NO_EXPIRY = {"quantizer": {"dead_code_threshold": 0.0}}
PLAIN, GRADIENT, UNQUANTISED, BICUBIC = "moving averages", "gradients", "not quantised", "bicubic, 4 x"
NORM = "moving averages, batch norm"
VARIANTS: dict[str, dict[str, Any]] = {  # what differs from moving averages over 512 codes
    PLAIN: EMA,
    GRADIENT: {"decay": None},
    NORM: EMA | {"batch_norm": True},
    "moving averages, no expiry": EMA | NO_EXPIRY,
    "gradients, no expiry": {"decay": None} | NO_EXPIRY,
    "moving averages, rotation": EMA | {"quantizer": {"estimator": "rotation"}},
    "moving averages, k-means first": EMA | {"quantizer": {"kmeans_init": True}},
    "32 codes": EMA | {"num_codes": 32},
    "128 codes": EMA | {"num_codes": 128},
    "2048 codes": EMA | {"num_codes": 2048},
    "two levels": EMA | {"levels": 2},
    UNQUANTISED: EMA,
    BICUBIC: {},
}
SEEDS = {PLAIN: 3, GRADIENT: 3}  # elsewhere one
ATTENTION, CONVOLUTION = "PixelAttention", "PixelCNN"
DIGIT_CODES = 64
PRIORS: dict[str, Callable[[int, tuple[int, int], int | None], PixelAttention | PixelCNN]] = {
    ATTENTION: lambda k, grid, classes: PixelAttention(k, grid, num_classes=classes, dropout=0.1),
    CONVOLUTION: lambda k, grid, classes: PixelCNN(k, grid, num_classes=classes, width=64, layers=8, dropout=0.1),
}
PRESETS = {  # one tile and one digit in `every`; epochs on tiles and on digits, and of the priors of digits and tiles
    "quick": {"every": 12, "epochs": 4, "digit_epochs": 3, "prior_epochs": 3, "tile_prior_epochs": 2},
    "published": {"every": 1, "epochs": 30, "digit_epochs": 10, "prior_epochs": 20, "tile_prior_epochs": 8},
}
OF = {"reconstruct": ("epochs",), "digits": ("digit_epochs", "prior_epochs"), "tiles": ("epochs", "tile_prior_epochs")}
SHOWN, COOL = 8, 0.8  # pictures in a row, the temperature at which they are drawn
POINTS = 33  # of the curve of how often codes are used
FIELDS = (
    "parameters", "mse", "psnr", "photo_psnr", "unquantised_psnr", "perplexity", "used", "bits_per_pixel", "usage",
    "bits_per_code", "bits_per_dim", "train_bits_per_code", "epoch", "sample_s", "uncached_s", "epoch_s", "seconds",
)  # fmt: skip


def scaled(images: Tensor) -> Tensor:
    """Of uint8, to [-1, 1]."""
    return images.float() / 127.5 - 1


cached_tiles, cached_digits = cache(tiles), cache(digits)


@cache
def photographs() -> Tensor:
    """(N, 3, 64, 64) uint8: colour photographs of scikit-image, cut into tiles; nothing like a satellite's."""
    from skimage import data

    found = []
    for picture in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]):
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)
        cut = image.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)  # [3, rows, columns, side, side]
        found.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(found)


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of tiles, mirrored or turned by a quarter, as it falls."""
    flip, turn = (int(torch.randint(n, (), generator=generator)) for n in (2, 4))
    return torch.rot90(x.flip(3) if flip else x, turn, (2, 3))


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of digits, moved by up to two pixels each way."""
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(x, (down, right), (2, 3))


def epochs_of(
    images: Tensor, epochs: int, seed: int, change: Callable[..., Tensor], batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and images of each batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for some in torch.randperm(len(images), generator=generator).split(batch):
            if len(some) > 1:
                yield some, change(scaled(images[some]), generator)


def unquantised(model: VQVAE, x: Tensor) -> Tensor:
    return torch.tanh(model.decoder(model.encoder(x)))


def autoencoder(
    images: Tensor, options: dict[str, Any], epochs: int, seed: int, change: Callable[..., Tensor], what: str,
    quantise: bool = True,
) -> VQVAE:  # fmt: skip
    torch.manual_seed(seed)
    model = VQVAE(images.size(1), width=WIDTH, **({"num_codes": CODES, "batch_norm": False} | options))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a sixth faster
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05, cycle_momentum=False)
    with progress(what, steps) as bar:
        for _, x in epochs_of(images, epochs, seed, change, BATCH):
            x = x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = model(x).loss if quantise else F.mse_loss(unquantised(model, x), x)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return model.eval()


def peak(error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of mean squared errors in [-1, 1]."""
    return 10 * math.log10(4 / float(error.mean()))


@torch.no_grad()
def through(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(scaled(some)) for some in images.split(BATCH)])


def bicubic(x: Tensor) -> Tensor:
    """A quarter of the pixels each way, 48 of 8 bits for each 768, and back."""
    small = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
    small = ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)


def levels_of(codes: Any) -> list[Tensor]:
    return [codes] if isinstance(codes, Tensor) else list(codes)


def errors(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return (through(run, images) - scaled(images)).square()


def reconstruct(run: Run, folder: Path) -> dict[str, Any]:
    """An autoencoder of tiles: trained, and measured on tiles of other regions and on photographs."""
    data, name = cached_tiles(SIDE), run["variant"]
    train, test, photos = (x[:: run["every"]] for x in (data.images[data.train], data.images[data.test], photographs()))
    if name == BICUBIC:
        shown, model = bicubic, None
        found: dict[str, Any] = {"bits_per_pixel": 3 * 8 / 16}
    else:
        began = time.process_time()
        options, quantise = VARIANTS[name], name != UNQUANTISED
        model = autoencoder(train, options, run["epochs"], run["seed"], turned, f"{name}, {run['seed']}", quantise)
        found = {"epoch_s": (time.process_time() - began) / run["epochs"]}
        found["parameters"] = sum(p.numel() for p in model.parameters())
        shown = model.reconstruct if quantise else partial(unquantised, model)
    error = errors(shown, test)
    found |= {"mse": float(error.mean()) / 4, "psnr": peak(error), "photo_psnr": peak(errors(shown, photos))}
    if model is None or name == UNQUANTISED:
        return found
    found["unquantised_psnr"] = peak(errors(partial(model.reconstruct, quantize=False), test))
    batches = [levels_of(model.encode(scaled(some))) for some in test.split(BATCH)]
    counts = [
        torch.cat([x[i].flatten() for x in batches]).bincount(minlength=model.num_codes) for i in range(model.levels)
    ]
    shares = [x.double() / x.sum() for x in counts]
    found["perplexity"] = mean(float(torch.special.entr(p).sum().exp()) for p in shares)
    found["used"] = mean(float((x > 0).double().mean()) for x in counts)
    positions = sum(h * w for h, w in model.grids(SIDE, SIDE))
    found["bits_per_pixel"] = positions * math.log2(model.num_codes) / SIDE**2
    ranked = shares[-1].sort(descending=True).values.cumsum(0)
    at = torch.linspace(0, model.num_codes - 1, POINTS).long()
    found["usage"] = " ".join(f"{x:.4f}" for x in ranked[at].tolist())
    if name == PLAIN and run["seed"] == 0:
        pictures(model, test, photos, folder)
    return found


def pictures(model: VQVAE, test: Tensor, photos: Tensor, folder: Path) -> None:
    """Reconstructions of tiles and photographs, and interpolations between tiles."""
    ranks = torch.linspace(0, len(test) / 2, SHOWN).long()
    vivid = test[test.float().var((1, 2, 3)).argsort(descending=True)[ranks]]
    some = torch.cat([vivid, photos[torch.linspace(0, len(photos) - 1, SHOWN).long()]])
    ways = (scaled, bicubic, model.reconstruct, partial(model.reconstruct, quantize=False))
    rows = [through(run, some) if run is not scaled else scaled(some) for run in ways]
    labels = ("original", "bicubic, 4 x", "through codes", "past the codes")
    sheet(
        [x[part] for part in (slice(SHOWN), slice(SHOWN, None)) for x in rows], labels * 2, folder / "vqvae_tiles.png"
    )
    left, right = scaled(vivid[: SHOWN // 2]), scaled(vivid[SHOWN // 2 :])
    sheet([*model.interpolate(left, right, SHOWN)], [""] * len(left), folder / "vqvae_between.png")


def sheet(rows: Sequence[Tensor], labels: Sequence[str], path: Path, zoom: float = 1.2) -> None:
    """Rows of images (N, C, H, W) in [-1, 1] as one picture, each with a label."""
    images = [torch.cat([F.pad(x, (1, 1, 1, 1), value=1.0) for x in row], 2) for row in rows]
    whole = ((torch.cat(images, 1) + 1) / 2).clamp(0, 1).permute(1, 2, 0)
    width, height = whole.size(1) / 100 * zoom, whole.size(0) / 100 * zoom
    with figure(path, size=(width + 2 * any(labels), height)) as axes:
        axes.imshow(whole.numpy().squeeze(), cmap="gray" if whole.size(2) == 1 else None, interpolation="nearest")
        step = whole.size(0) / len(rows)
        axes.set_yticks([step * (i + 0.5) for i in range(len(rows))], labels, size=9)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)


def coded(model: VQVAE, x: Tensor) -> Tensor:
    """Codes (B, h, w) of images by an autoencoder of one level."""
    (codes,) = levels_of(model.encode(x))
    return codes


def bits(prior: PixelAttention | PixelCNN, codes: Tensor, labels: Tensor | None) -> float:
    """A code."""
    with torch.no_grad():
        each = zip(codes.split(100), [None] * len(codes) if labels is None else labels.split(100), strict=False)
        nats = sum(float(F.cross_entropy(prior(x, y).flatten(0, 2), x.flatten(), reduction="sum")) for x, y in each)
    return nats / math.log(2) / codes.numel()


def draw(run: Run, folder: Path) -> dict[str, Any]:
    """A prior over the codes of an autoencoder that is trained here, too: of digits by their class, or of tiles."""
    seed, kind, of_digits = run["seed"], run["variant"], run["what"] == "digits"
    if of_digits:
        data = cached_digits()
        images, side, classes = data.images.unsqueeze(1), 28, 10
        model = autoencoder(
            images[data.train][:: run["every"]], EMA | {"num_codes": DIGIT_CODES}, run["digit_epochs"], seed, moved,
            f"digits for {kind}, {seed}",
        )  # fmt: skip
        parts = [part[:: run["every"]] for part in (data.train, data.valid, data.test)]
        labels: list[Tensor | None] = [data.labels[part] for part in parts]
        change: Callable[..., Tensor] = moved
    else:
        world = cached_tiles(SIDE)
        images, side, classes = world.images, SIDE, None
        parts = [part[:: run["every"]] for part in (world.train, world.valid, world.test)]
        model = autoencoder(images[parts[0]], EMA, run["epochs"], seed, turned, f"tiles for {kind}, {seed}")
        labels, change = [None] * 3, turned
    train, valid, test = (images[part] for part in parts)
    torch.manual_seed(seed)
    prior = PRIORS[kind](model.num_codes, model.grids(side, side)[0], classes)
    prior.check(model, (side, side))
    epochs = run["prior_epochs" if of_digits else "tile_prior_epochs"]
    steps = math.ceil(len(train) / PRIOR_BATCH)
    optimizer = torch.optim.AdamW(prior.parameters(), PRIOR_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRIOR_RATE, steps * epochs, pct_start=0.05, cycle_momentum=False
    )
    held = [torch.cat([coded(model, scaled(x)) for x in part.split(100)]) for part in (valid, test)]
    best: dict[str, Any] = {"valid": math.inf}
    began, generator = time.process_time(), torch.Generator().manual_seed(seed)
    with progress(f"{kind} of {run['what']}, {seed}", steps * epochs) as bar:
        for epoch in range(1, epochs + 1):
            prior.train()
            losses = []
            shuffle = int(torch.randint(1 << 30, (), generator=generator))
            for some, x in epochs_of(train, 1, shuffle, change, PRIOR_BATCH):
                codes, known = coded(model, x), None if labels[0] is None else labels[0][some]
                optimizer.zero_grad()
                loss = F.cross_entropy(prior(codes, known).flatten(0, 2), codes.flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            prior.eval()
            score = bits(prior, held[0], labels[1])
            if score < best["valid"]:
                state = {name: x.clone() for name, x in prior.state_dict().items()}
                best = {
                    "valid": score,
                    "epoch": epoch,
                    "train_bits_per_code": mean(losses) / math.log(2),
                    "state": state,
                }
    found: dict[str, Any] = {"epoch_s": (time.process_time() - began) / epochs, "epoch": best["epoch"]}
    prior.load_state_dict(best["state"])
    found["train_bits_per_code"], found["bits_per_code"] = best["train_bits_per_code"], bits(prior, held[1], labels[2])
    elements = images[0].numel()
    found["bits_per_dim"] = found["bits_per_code"] * held[1][0].numel() / elements
    found["bits_per_pixel"] = held[1][0].numel() * math.log2(model.num_codes) / side**2
    found["parameters"] = sum(p.numel() for p in prior.parameters())
    n, each = (100, torch.arange(10).repeat_interleave(10)) if of_digits else (4 * SHOWN, None)
    for name, cached in (("sample_s", True), ("uncached_s", False)):
        before, count = time.process_time(), n if cached else n // 8
        few = None if each is None else each[:count]
        prior.sample(count, few, generator=generator.manual_seed(seed), cached=cached)
        found[name] = (time.process_time() - before) / count
    if seed == 0:
        drawn = prior.sample(
            n, each, temperature=COOL if of_digits else 1.0, top_p=0.95, generator=generator.manual_seed(seed)
        )
        rows = [*model.decode(drawn).unflatten(0, (-1, 10 if of_digits else SHOWN))]
        sheet(rows, [str(i) for i in range(10)] if of_digits else [""] * len(rows), folder / picture(run["what"], kind))
    return found


def picture(what: str, kind: str) -> str:
    return f"vqvae_{what}_{kind}.png"


def work(run: Run, threads: int, folder: Path) -> list[Row]:
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    found = (reconstruct if run["what"] == "reconstruct" else draw)(run, folder)
    shown = {name: f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in found.items()}
    shown["seconds"] = f"{time.perf_counter() - began:.1f}"
    settings = dict.fromkeys(PRESETS["published"], "") | texts(run)
    return [{**settings, **dict.fromkeys(FIELDS, ""), **shown, **facts(threads)}]


def values(rows: Sequence[Row], what: str, variant: str, name: str) -> list[float]:
    """Of the runs of a variant that have it, by seed."""
    own = sorted((x for x in rows if (x["what"], x["variant"]) == (what, variant)), key=lambda x: int(x["seed"]))
    return [float(x[name]) for x in own if x[name]]


def cell(rows: Sequence[Row], what: str, variant: str, name: str, digits: int, by: float = 1) -> str:
    found = [by * x for x in values(rows, what, variant, name)]
    return spread(found, digits) if found else ""


def autoencoders_table(rows: Sequence[Row]) -> list[list[str]]:
    columns = (
        ("PSNR, dB", "psnr", 2, 1), ("past the codes", "unquantised_psnr", 2, 1),
        ("photographs, dB", "photo_psnr", 2, 1), ("bits a pixel", "bits_per_pixel", 3, 1),
        ("perplexity", "perplexity", 0, 1), ("codes in use, %", "used", 0, 100), ("CPU s an epoch", "epoch_s", 1, 1),
    )  # fmt: skip
    lines = [[name, *(cell(rows, "reconstruct", name, *x) for _, *x in columns)] for name in VARIANTS]  # type: ignore[arg-type]
    return [["", *(head for head, *_ in columns)], *lines]


def priors_table(rows: Sequence[Row]) -> list[list[str]]:
    columns = (
        ("parameters", "parameters", 0, 1), ("bits a code", "bits_per_code", 3, 1),
        ("in training", "train_bits_per_code", 3, 1), ("bits/dim", "bits_per_dim", 4, 1), ("best epoch", "epoch", 0, 1),
        ("CPU s an epoch", "epoch_s", 1, 1), ("ms a sample", "sample_s", 1, 1e3), ("uncached", "uncached_s", 1, 1e3),
    )  # fmt: skip
    kinds = [("digits", ATTENTION), ("digits", CONVOLUTION), ("tiles", ATTENTION)]
    lines = [[f"{what}, {kind}", *(cell(rows, what, kind, *x) for _, *x in columns)] for what, kind in kinds]  # type: ignore[arg-type]
    return [["", *(head for head, *_ in columns)], *lines]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say, in sentences."""

    def one(name: str, column: str = "psnr") -> float:
        return mean(values(rows, "reconstruct", name, column))

    def pairs(a: str, b: str, what: str, column: str, unit: str) -> Verdict:
        return Verdict(paired(values(rows, what, a, column), values(rows, what, b, column)), unit=unit, digits=3)

    loss, gain = one(PLAIN, "unquantised_psnr") - one(PLAIN), one(PLAIN) - one(BICUBIC)
    apart, norm = one(UNQUANTISED) - one(PLAIN), one(NORM) - values(rows, "reconstruct", PLAIN, "psnr")[0]
    learnt = pairs(PLAIN, GRADIENT, "reconstruct", "psnr", "dB")
    drawn = pairs(CONVOLUTION, ATTENTION, "digits", "bits_per_code", "bits a code")
    low, high = interval(drawn.gains)
    size = mean(drawn.gains) / mean(values(rows, "digits", CONVOLUTION, "bits_per_code"))
    lost = {name: one(name, "used") for name in (PLAIN, GRADIENT, f"{PLAIN}, no expiry", f"{GRADIENT}, no expiry")}
    cost = {what: mean(values(rows, what, ATTENTION, "uncached_s")) / mean(values(rows, what, ATTENTION, "sample_s"))
            for what in ("digits", "tiles")}  # fmt: skip
    return [
        f"Quantising costs {loss:.2f} dB against the same network's encoder outputs, decoded past the codes "
        f"({'within' if loss <= 2 else 'more than'} 2 dB), and {apart:.2f} dB against a network trained without a "
        f"quantiser, which may keep 64 numbers a position; the codes are {gain:.2f} dB "
        f"{'above' if gain > 0 else 'below'} bicubic sampling, 4 x, with "
        f"{one(BICUBIC, 'bits_per_pixel') / one(PLAIN, 'bits_per_pixel'):.1f} times fewer bits.",
        f"Moving averages are better than gradients: {learnt}.",
        f"Batch norm, as the post has it, changes PSNR by {norm:+.2f} dB after as many steps.",
        f"An attention prior is better than PixelCNN: {drawn}; {100 * size:.1f} % of PixelCNN's bits. "
        + ("The post says much better." if low > 0 else "The post says that it is, much." if high > 0 else ""),
        "Codes in use on held-out tiles: "
        + ", ".join(f"{name} {100 * x:.0f} %" for name, x in lost.items())
        + f"; rotation {100 * one(f'{PLAIN}, rotation', 'used'):.0f} %, which changes PSNR by "
        f"{one(f'{PLAIN}, rotation') - values(rows, 'reconstruct', PLAIN, 'psnr')[0]:+.2f} dB.",
        f"Cached sampling takes {cost['digits']:.1f} times less CPU time on 7 x 7 codes, {cost['tiles']:.1f} times on "
        "16 x 16 (PixelAttention).",
    ]


def page(rows: list[Row], name: str) -> str:
    """Markdown, its verdicts computed from the rows."""
    bullets = "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in verdicts(rows))
    machine, threads, version, date, preset = (
        seen(rows, column) for column in ("machine", "threads", "torch", "date", "preset")
    )
    epochs, digit_epochs, prior_epochs, tile_prior_epochs = (
        seen([x for x in rows if x[f"{what}epochs"]], f"{what}epochs")
        for what in ("", "digit_", "prior_", "tile_prior_")
    )
    minutes = sum(float(line["seconds"]) for line in rows) / 60
    seeds = len({line["seed"] for line in rows})
    return f"""# VQ-VAE on real pictures

{bullets}

![Tiles and photographs, through bicubic sampling, through codes and past them]({name}_tiles.png)

Above held-out satellite tiles, below photographs, of which no autoencoder saw one. "Past the codes": the same network's
encoder outputs, decoded without being quantised.

## Autoencoders

{markdown(autoencoders_table(rows))}

Of held-out tiles, those of other regions; mean ± standard deviation over {seeds} seeds where there are several, else of
one seed. PSNR of the mean squared error over all tiles. Moving averages over {CODES} codes where nothing else is said;
"past the codes": the same network's encoder outputs, decoded without being quantised; "not quantised": such a network
trained without a quantiser. Bits a pixel: the grid's codes at log2 K bits each; bicubic: 48 bytes for 256 pixels. Two
levels: means over levels of perplexity and use.

![PSNR over bits a pixel]({name}.png)

![How often codes are used]({name}_usage.png)

![Between tiles]({name}_between.png)

Encoder outputs of the left and the right tile, interpolated, then quantised and decoded.

## Priors

{markdown(priors_table(rows))}

Over 7 x 7 of {DIGIT_CODES} codes of MNIST-5000's digits, given their class, and 16 x 16 of {CODES} codes of
tiles. Bits a code of held-out pictures, of the epoch with the best validation; bits/dim: the same a pixel and colour.
It is the rate of the codes and no likelihood of the pictures, so it is not to be compared with models of pixels. A
sample: CPU time, of 100 digits or {4 * SHOWN} tiles drawn together, uncached of an eighth of that.

| {ATTENTION} | {CONVOLUTION} |
|---|---|
| ![By attention]({picture("digits", ATTENTION)}) | ![By convolutions]({picture("digits", CONVOLUTION)}) |

Digits of each class, drawn by the priors of the first seed at temperature {COOL}; below tiles, at 1; both with top_p =
0.95.

![Tiles drawn by attention]({picture("tiles", ATTENTION)})

## How it was done

Satellite tiles of {SIDE} x {SIDE} as `pyseq.data.tiles` splits them by region; photographs: scikit-image's astronaut,
chelsea, coffee, rocket and motorcycle, cut likewise; digits as `pyseq.data.digits` splits them. `models.VQVAE` of
width {WIDTH} without batch norm, but where it is said; Adam, rate {RATE} with warm-up and cosine decay, batches of
{BATCH}; {epochs} epochs on tiles, mirrored and turned, {digit_epochs} on digits, moved by up to two pixels. Priors:
{prior_epochs} epochs on digits, {tile_prior_epochs} on tiles, on the codes of pictures changed in the same way, AdamW,
rate {PRIOR_RATE}, batches of {PRIOR_BATCH}, dropout 0.1, about as many parameters. Equal seeds have equal encoders at
first, and equal batches.

A fair objection: one rate and one network for all; few epochs on {len(cached_tiles(SIDE).train):,} tiles; three seeds
at most give wide intervals; a PixelCNN that is deeper and slower may draw level.

Preset: {preset}. {machine}; threads a run: {threads}; torch {version}; {date}; {minutes:.0f} minutes of runs.
Each run is a row of [{name}.csv]({name}.csv); `make study STUDY=vqvae` makes all of it.
"""


def plot(rows: list[Row], path: Path) -> None:
    points = [(v, mean(values(rows, "reconstruct", v, "bits_per_pixel")), mean(values(rows, "reconstruct", v, "psnr")))
              for v in (PLAIN, GRADIENT, "32 codes", "128 codes", "2048 codes", "two levels", BICUBIC)]  # fmt: skip
    with figure(path, size=(7, 3.8)) as axes:
        for name, x, y in points:
            axes.plot(x, y, "o")
            left = name in (PLAIN, BICUBIC)  # of the point, lest labels meet
            axes.annotate(
                f"{name} ({CODES} codes)" if name in (PLAIN, GRADIENT) else name,
                (x, y),
                (-6 if left else 6, 3 if left else -3),
                textcoords="offset points",
                ha="right" if left else "left",
                size=8,
            )
        limit = mean(values(rows, "reconstruct", UNQUANTISED, "psnr"))
        axes.axhline(limit, color="black", linewidth=0.8, linestyle="--")
        axes.annotate("not quantised", (points[0][1], limit), (0, -11), textcoords="offset points", size=8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bits a pixel")
        axes.set_ylabel("PSNR of held-out tiles, dB")
        axes.margins(0.15, 0.1)
        axes.grid(alpha=0.3)
    with figure(path.with_name(f"{path.stem}_usage.png"), size=(7, 3.4)) as axes:
        for name in (PLAIN, GRADIENT, f"{PLAIN}, no expiry", f"{GRADIENT}, no expiry", f"{PLAIN}, rotation"):
            own = next(x for x in rows if x["variant"] == name and x["seed"] == "0")
            axes.plot(torch.linspace(0, 100, POINTS), [100 * float(x) for x in own["usage"].split()], label=name)
        axes.set_xlabel("codes, the most used first, %")
        axes.set_ylabel("of all positions, %")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and epochs, into runs/: two minutes")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (default: 1)")
    parser.add_argument("--csv", type=Path, help="instead of docs/evidence/vqvae.csv")
    args = parser.parse_args()
    preset, most = ("quick", 2) if args.quick else ("published", 3)
    path: Path = args.csv or ROOT / ("runs/vqvae-quick/vqvae.csv" if args.quick else "docs/evidence/vqvae.csv")
    shared = {"preset": preset, "every": PRESETS[preset]["every"]}
    runs = [("reconstruct", name, min(SEEDS.get(name, 1), most)) for name in VARIANTS]
    runs += [("tiles", ATTENTION, 1), *(("digits", kind, most) for kind in PRIORS)]
    queue = [
        {**shared, **{name: PRESETS[preset][name] for name in OF[what]}, "what": what, "variant": v, "seed": seed}
        for what, v, n in runs
        for seed in range(n)
    ]
    work_off(path, queue, partial(work, threads=args.threads, folder=path.parent), args.workers, bars=args.workers)
    rows = [row for run in queue for row in read(path, run)]
    print("\n" + aligned(autoencoders_table(rows)) + "\n\n" + aligned(priors_table(rows)))
    plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(rows, path.stem), encoding="utf-8")
    print(f"\nThe page: {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
