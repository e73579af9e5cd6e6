"""The convolutional encoder and decoder of VQ-VAE, after https://kexue.fm/archives/6760."""

from torch import Tensor, nn


class Residual(nn.Module):
    """x and what a 3 x 3 and a 1 x 1 convolution add to it."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        first = (nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), *_norm(width, batch_norm))
        self.inner = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def encoder(channels: int, width: int, halvings: int, blocks: int, batch_norm: bool) -> nn.Sequential:
    """(B, channels, H, W) to (B, width, H / 2^halvings, W / 2^halvings)."""
    layers: list[nn.Module] = []
    for i in range(halvings):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Conv2d(width if i else channels, width, 4, stride=2, padding=1), *_norm(width, batch_norm)]
    for i in range(blocks):
        layers += [*(_norm(width, batch_norm) if i else []), Residual(width, batch_norm)]
    return nn.Sequential(*layers)


def decoder(width: int, channels: int, doublings: int, blocks: int, batch_norm: bool) -> nn.Sequential:
    """(B, width, h, w) to (B, channels, h 2^doublings, w 2^doublings)."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [*_norm(width, batch_norm), Residual(width, batch_norm)]
    for _ in range(doublings - 1):
        layers += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), *_norm(width, batch_norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1))


def _norm(width: int, batch_norm: bool) -> list[nn.Module]:
    return [nn.BatchNorm2d(width)] if batch_norm else []
