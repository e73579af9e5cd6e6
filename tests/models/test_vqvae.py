"""VQ-VAE: what it computes, that its codes are exact, how it trains, and what it refuses."""

import copy
import importlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as close

from pyseq.data import tiles
from pyseq.models import VQVAE
from pyseq.models._convolutions import Residual

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"batch_norm": False, "blocks": 2},
    "averages": {"decay": 0.9, "code_dim": 3, "downsampling": 8},
    "two levels": {"levels": 2, "decay": 0.9, "quantizer": {"kmeans_init": True}},
    "two levels, heads": {"levels": 2, "downsampling": 2, "quantizer": {"heads": 2, "metric": "cosine"}},
}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def built(channels: int = 3, **options: Any) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(channels, **{"width": 8, "num_codes": 16, "blocks": 1} | options)


def images(step: int = 0, *shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(step)) * 2 - 1


def train(model: Any, optimizer: Any, *steps: int) -> Any:
    for step in steps:
        optimizer.zero_grad()
        model(images(step)).loss.backward()
        optimizer.step()
    return model


def trained(**options: Any) -> VQVAE:
    model = built(**options)
    return train(model, torch.optim.Adam(model.parameters(), 0.01), *range(3))  # type: ignore[no-any-return]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def each(codes: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return (codes,) if isinstance(codes, Tensor) else codes


@every
@pytest.mark.parametrize("size", [(16, 16), (32, 48)], ids=str)
def test_shapes_and_loss(options: Any, size: tuple[int, int]) -> None:
    model, x = built(**options), images(1, 2, 3, *size)
    out = model(x)
    assert out.reconstruction.shape == x.shape
    assert out.reconstruction.abs().max() <= 1
    assert tuple(codes.shape[1:3] for codes in each(out.codes)) == model.grids(*size)
    heads = (2,) if model.heads == 2 else ()
    assert all(codes.shape[3:] == heads and codes.dtype == torch.int64 for codes in each(out.codes))
    down = options.get("downsampling", 4)
    assert model.grids(*size)[-1] == (size[0] // down, size[1] // down)
    close(out.reconstruction_loss, (out.reconstruction - x).square().mean())
    close(out.loss, out.reconstruction_loss + sum(level.loss for level in out.quantizers))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if options.get("batch_norm") is False:
        assert model(images(1, 0, 3, *size)).reconstruction.shape == (0, 3, *size)


def test_network_and_loss_are_the_posts() -> None:
    """Layer by layer, and with the loss of its script: pixels, 1 times the codebook's, 0.25 times the commitment's."""

    def kinds(layers: Any) -> list[str]:
        return [type(layer).__name__ for layer in layers]

    norm, residual, up = "BatchNorm2d", "Residual", "ConvTranspose2d"
    model = VQVAE(num_codes=64)
    assert kinds(model.encoder) == ["Conv2d", norm, "ReLU", "Conv2d", norm] + [residual, norm] * 2 + [residual]
    assert kinds(model.decoder) == [norm, residual] * 3 + [up, norm, "ReLU", up]
    assert kinds(model.encoder[5].inner) == ["ReLU", "Conv2d", norm, "ReLU", "Conv2d"]  # type: ignore[union-attr, index]
    assert [p.shape[0] for p in model.encoder.parameters() if p.dim() == 4] == [128] * 8
    assert not any(isinstance(m, nn.BatchNorm2d) for m in VQVAE(batch_norm=False, width=8).modules())
    model = built().eval()
    x, codebook = images(), model.quantizers[0].codebook
    z = model.encoder(x)
    vectors = codebook[0, model.encode(x)].movedim(3, 1)  # type: ignore[index]
    pixels = (torch.tanh(model.decoder(z + (vectors - z).detach())) - x).square().mean()
    wanted = pixels + (z.detach() - vectors).square().mean() + 0.25 * (z - vectors.detach()).square().mean()
    found = model(x).loss
    close(found, wanted)
    inputs = [*model.parameters()]
    close(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs))


def test_residual_block_adds() -> None:
    block, x = Residual(4, True), torch.randn(2, 4, 5, 5)
    for p in block.inner[-1].parameters():
        nn.init.zeros_(p)
    assert torch.equal(block(x), x)


def test_two_levels_depend_as_in_vq_vae_2() -> None:
    """Bottom features see the decoded top codes, and the decoder sees both."""
    model, x = trained(levels=2).eval(), images()
    top, bottom = model.encode(x)
    other = (top + 1) % 16
    assert not torch.equal(model.decode((other, bottom)), model.decode((top, bottom)))
    assert not torch.equal(model.decode((top, (bottom + 1) % 16)), model.decode((top, bottom)))
    features = model._features(x)
    before = model._quantized(features)[1][1].quantized
    features[0] = features[0] + 10 * torch.randn(features[0].shape)
    assert not torch.equal(model._quantized(features)[1][1].quantized, before)


@every
@pytest.mark.parametrize("autocast", [False, True])
def test_decoded_codes_are_the_reconstruction_to_the_bit(options: Any, autocast: bool) -> None:
    """Also in training, which stays as it was, and with it all state."""
    model, x = trained(**options), images(9)
    before = state(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes, found = model.encode(x), model.reconstruct(x)
        assert torch.equal(model.decode(codes), found)
        one = each(codes)
        small = one[0].int() if len(one) == 1 else tuple(level.int() for level in one)
        assert torch.equal(model.decode(small), found)  # type: ignore[arg-type]
        assert not torch.equal(model.reconstruct(x, quantize=False), found)
        out = copy.deepcopy(model).eval()(x)
    assert torch.equal(out.reconstruction, found)
    assert all(torch.equal(a, b) for a, b in zip(each(out.codes), one, strict=True))
    assert all(module.training for module in model.modules())
    assert not found.requires_grad
    close(state(model), before, rtol=0, atol=0)


def test_without_quantising_the_decoder_gets_what_the_encoder_gives() -> None:
    model, x = trained().eval(), images(9)
    assert torch.equal(model.reconstruct(x, quantize=False), torch.tanh(model.decoder(model.encoder(x))))


@every
def test_interpolation_mixes_encoder_outputs(options: Any) -> None:
    model, (a, b) = trained(**options), (images(8), images(9))
    found = model.interpolate(a, b, steps=5)
    assert found.shape == (2, 5, 3, 16, 16)
    close(found[:, 0], model.reconstruct(a))
    close(found[:, 4], model.reconstruct(b))
    model.eval()
    with torch.no_grad():
        mixed = [0.75 * x + 0.25 * y for x, y in zip(model._features(a), model._features(b), strict=True)]
        close(found[:, 1], model._decoded(model._quantized(mixed)[0]))


def test_modes_come_back_each_its_own_also_after_an_error() -> None:
    model = built()
    model.decoder.eval()
    before = [module.training for module in model.modules()]
    model.encode(images())
    with pytest.raises(ValueError, match="from -1 to 1"):
        model.reconstruct(images() * 2)
    assert [module.training for module in model.modules()] == before


@every
def test_learns(options: Any) -> None:
    """Patches of a few colours."""
    model = built(**options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    colours = images(0, 2, 3, 4, 4).sign() * 0.8
    x, losses = colours.repeat_interleave(8, 2).repeat_interleave(8, 3), []
    for _ in range(60):
        optimizer.zero_grad()
        out = model(x)
        out.loss.backward()
        optimizer.step()
        losses.append(out.reconstruction_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.reconstruct(x).sub(x).square().mean() < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["default", "two levels, heads"])
def test_compiled_whole(name: str) -> None:
    """In one graph in training, another in eval, with the values and gradients of eager mode."""
    torch.compiler.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    model, eager = built(**OPTIONS[name]), built(**OPTIONS[name])
    fast: Any = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        found, wanted = fast(images(step)), eager(images(step))
        close((found.loss, found.reconstruction), (wanted.loss, wanted.reconstruction))
        close(
            torch.autograd.grad(found.loss, [*model.parameters()]),
            torch.autograd.grad(wanted.loss, [*eager.parameters()]),
        )
    assert counter.frame_count == 1
    close(state(model), state(eager))
    fast.eval()
    close(fast(images()).reconstruction, eager.eval()(images()).reconstruction)
    assert counter.frame_count == 2
    torch.compiler.reset()


@every
def test_half_precision(options: Any) -> None:
    """By autocast, whose gradients are near those of float32; and by a cast of the model."""
    model = trained(**options)
    wanted = copy.deepcopy(model)(images(6))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images(6))
    assert out.loss.dtype == torch.float32
    close(out.loss, wanted.loss, rtol=0.05, atol=0.01)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = model.bfloat16().eval()
    x = images(6).bfloat16()
    assert torch.equal(model.decode(model.encode(x)), model.reconstruct(x))


@every
def test_resumes_to_the_bit_from_a_plain_checkpoint(options: Any) -> None:
    model = built(**options)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 0, 1, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3, 4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(x, Tensor) for x in saved["model"].values())
    torch.manual_seed(5)
    again = VQVAE(3, **{"width": 8, "num_codes": 16, "blocks": 1} | options)
    again.load_state_dict(saved["model"])
    other = torch.optim.Adam(again.parameters(), 0.01)
    other.load_state_dict(saved["optimizer"])
    train(again, other, 3, 4)
    close(state(again), state(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, {"width": 4}), ({}, {"levels": 2}), ({}, {"batch_norm": False}), ({}, {"quantizer": {"metric": "cosine"}}),
        ({"decay": 0.9}, {}), ({}, {"num_codes": 15}), ({}, {"code_dim": 4}), ({}, {"downsampling": 2}),
    ],
)  # fmt: skip
def test_refuses_a_checkpoint_of_another_configuration(options: Any, other: Any) -> None:
    """Before anything is loaded, in words; also where every shape fits, as for another metric."""
    model = built(**other)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"the state is of a VQVAE with .*=.*, this one has .*; build it as that one was"
    ):
        model.load_state_dict(built(**options).state_dict())
    close(state(model), before, rtol=0, atol=0)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "channels must be at least 1, got 0"), ({"width": 8.0}, "width must be a whole number"),
    ({"downsampling": 6}, "downsampling must be a power of two from 2, got 6"), ({"downsampling": 1}, "from 2, got 1"),
    ({"levels": 3}, "levels must be 1 or 2, got 3"), ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ({"quantizer": {"decay": 0.5}}, "quantizer must not name what VQVAE sets, got decay; give decay= to VQVAE itself"),
    ({"decay": 0.9, "beta": 2.0}, "beta weighs a term that moving averages do without"),
    ({"gamma": -1.0}, "gamma must be a finite number from 0"),
]  # fmt: skip
IMAGES: list[tuple[Any, str]] = [
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"floats in \[-1, 1\], got torch.uint8; .* x / 127.5 - 1"),
    ([0.0], "images must be floats .* got list"),
    (torch.zeros(2, 3, 16, 16).double(), r"the model's dtype, torch.float32, got torch.float64; x.to\(torch.float32\)"),
    (torch.zeros(2, 1, 16, 16), r"images must have shape \(B, channels=3, H, W\), got \(2, 1, 16, 16\)"),
    (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
    (torch.zeros(2, 3, 16, 18), "height and width must be multiples of 4 .* got 16 x 18; crop, pad or resize"),
    (torch.zeros(2, 3, 0, 16), "got 0 x 16"),
    (torch.full((2, 3, 16, 16), 255.0), "images must be finite, from -1 to 1, got 255 to 255; bytes .*"),
    (torch.full((2, 3, 16, 16), -1.01), "from -1 to 1, got -1.01 to -1.01"),
    (torch.full((2, 3, 16, 16), torch.nan), "images must be finite, .* got nan to nan"),
]  # fmt: skip
CODES: list[tuple[dict[str, Any], Any, str]] = [
    ({}, torch.zeros(2, 4, 4), r"of dtype torch.int64 or torch.int32, got torch.float32; codes.long\(\) is one"),
    ({}, torch.zeros(4, 4).long(), r"codes must have shape \(B, h, w\), got \(4, 4\)"),
    ({}, torch.full((2, 4, 4), 16), r"codes must be from -1 to 15, got 16 to 16; a prior must have as many codes"),
    ({}, torch.full((2, 4, 4), -2), r"got -2 to -2"),
    ({}, (torch.zeros(2, 4, 4).long(),) * 2, "codes must be one tensor, got 2"),
    ({"levels": 2}, torch.zeros(2, 4, 4).long(), r"codes must be \(top, bottom\), got 1"),
    ({"levels": 2}, (torch.zeros(2, 4, 4).long(),) * 2, r"bottom codes must be \(B, 2 h, 2 w\) .* got \(2, 4, 4\)"),
    ({"quantizer": {"heads": 2}}, torch.zeros(2, 4, 4).long(), r"shape \(B, h, w, heads=2\), got \(2, 4, 4\)"),
]  # fmt: skip


def test_what_is_refused() -> None:
    """Nothing changes before it is."""
    for options, message in WRONG:
        with pytest.raises(TypeError if "whole" in message else ValueError, match=message):
            built(**options)
    model = built()
    before = state(model)
    for x, message in IMAGES:
        for method in (model, model.encode, model.reconstruct, lambda x: model.interpolate(x, x)):
            if isinstance(x, list) and method not in (model, model.encode, model.reconstruct):
                continue
            with pytest.raises(TypeError if re.search("floats|dtype", message) else ValueError, match=message):
                method(x)
    close(state(model), before, rtol=0, atol=0)
    for options, codes, message in CODES:
        with pytest.raises(TypeError if "dtype" in message else ValueError, match=message):
            built(**options).decode(codes)
    with pytest.raises(ValueError, match=r"a and b must have one shape, got .* and .*"):
        model.interpolate(images(), images()[:1])
    with pytest.raises(ValueError, match="steps must be at least 2, for both ends, got 1"):
        model.interpolate(images(), images(), 1)


def test_values_are_not_looked_at_in_graphs() -> None:
    torch.compiler.reset()
    fast = torch.compile(built().eval(), backend="aot_eager", fullgraph=True)
    assert fast(images() * 100).reconstruction.isfinite().all()
    torch.compiler.reset()


@pytest.mark.parametrize("decay", [None, 0.9])
def test_an_encoder_that_diverged_shows_in_the_loss(decay: float | None) -> None:
    """Though the quantiser passes over what is not finite."""
    model, images = VQVAE(width=8, num_codes=16, blocks=1, batch_norm=False, decay=decay), torch.zeros(2, 3, 8, 8)
    assert model(images).loss.isfinite()
    torch.nn.init.constant_(next(model.encoder.parameters()), float("inf"))
    assert model(images + 0.5).loss.isnan()
    codes: Any = model.encode(images + 0.5)
    assert (codes == -1).all()


def test_words_of_errors() -> None:
    model = VQVAE(width=8, num_codes=16, blocks=1)
    for wrong, message in (
        (torch.zeros(2, 8, 8, 3), r"got \(2, 8, 8, 3\); x.permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\); x.unsqueeze\(0\)"),
        (torch.full((2, 3, 8, 8), float("nan")), "got nan to nan$"),
        (torch.full((2, 3, 8, 8), 9.0), "got 9 to 9; bytes become such"),
    ):
        with pytest.raises(ValueError, match=message):
            model(wrong)
    codes: Any = model.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"got ndarray; torch\.as_tensor"):
        model.decode(codes.numpy())
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"dtype, torch\.float32, got torch\.float64"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="heads must divide width, got 10 and 256; or give code_dim"):
        VQVAE(width=256, quantizer={"heads": 10})
    with pytest.raises(ValueError, match="got codebook_dim; give code_dim= to VQVAE itself"):
        VQVAE(width=8, quantizer={"codebook_dim": 4})
    with pytest.raises(ValueError, match=r"revival=0, this one has revival=1"):
        model.load_state_dict(VQVAE(width=8, num_codes=16, blocks=1, quantizer={"dead_code_threshold": 0}).state_dict())


@pytest.mark.slow
def test_an_epoch_with_another_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On satellite tiles vector-quantize-pytorch's layer ends at the same loss; `python bench autoencoder` times it."""
    pytest.importorskip("vector_quantize_pytorch", reason="compares with it: make bench")
    try:
        world = tiles()
    except ModuleNotFoundError as error:  # importorskip would import the package, which `tiles` never does
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    bench = importlib.import_module("autoencoder")
    images = world.images[world.train] / 127.5 - 1
    losses = []
    for make in (bench.model, bench.with_other):
        model = make({"images": images})
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(0)
        found = []
        for some in torch.randperm(len(images), generator=generator).split(16):
            optimizer.zero_grad()
            out = model(images[some])
            out.loss.backward()
            optimizer.step()
            found.append(out.reconstruction_loss.item())
        losses.append(sum(found[-20:]) / 20)
    assert losses[0] == pytest.approx(losses[1], rel=0.01), losses
