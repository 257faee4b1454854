"""The UNet that an expert is made of, at any size from an 8x8 grey digit to a 64x64 face."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.blocks import Encoder, ResidualBlock, check_encoder, group_norm, zeroed


@dataclass
class UNetConfig:
    """Sizes of a `UNet`; the defaults make the CIFAR-10 network of DDPM (arXiv 2006.11239, appendix B)."""

    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    blocks: int = 2  # residual blocks a level
    attention: list[int] = field(
        default_factory=lambda: [16]
    )  # sides of the feature maps that get self-attention
    dropout: float = 0.1

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigError` naming the key of a size that cannot be for images `[C, H, W]`."""
        check_encoder(self.channels, self.multipliers, self.blocks, self.dropout, shape)

    def build(self, shape: Sequence[int]) -> "UNet":
        """A fresh network for images `[C, H, W]`. Raises `ConfigError` naming the key of a size that cannot be."""
        self.check(shape)
        # What convolutions like, on CPUs as on tensor cores:
        return UNet(shape, self).to(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """`(x [B, C, H, W], t [] or [B])` -> `[B, C, H, W]`; zero at the start, because its last layer is.

    Residual blocks with adaptive group norm (arXiv 2105.05233), skips from every feature map of the encoder.
    """

    def __init__(self, shape: Sequence[int], config: UNetConfig) -> None:
        super().__init__()
        c = config
        self.encoder = Encoder(shape, c.channels, c.multipliers, c.blocks, c.attention, c.dropout)
        skips = list(self.encoder.widths)
        width, embedding = skips[-1], 2 * c.channels
        attends = (
            len(c.attention) > 0
        )  # as in DDPM, also in the middle of a network that attends anywhere
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, embedding, c.dropout, attention=attends),
                ResidualBlock(width, width, embedding, c.dropout, attention=False),
            ]
        )
        self.stages = nn.ModuleList()
        for level in reversed(range(len(c.multipliers))):
            side, out = shape[-1] // 2**level, c.channels * c.multipliers[level]
            for _ in range(c.blocks + 1):
                self.stages.append(
                    ResidualBlock(
                        width + skips.pop(), out, embedding, c.dropout, side in c.attention
                    )
                )
                width = out
            if level > 0:
                self.stages.append(Upsample(width))
        self.head = nn.Sequential(
            group_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, shape[0], 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        maps, embedding = self.encoder(x, t)
        h = maps[-1]
        for block in self.middle:
            h = block(h, embedding)
        for stage in self.stages:
            h = (
                stage(h)
                if isinstance(stage, Upsample)
                else stage(torch.cat([h, maps.pop()], dim=1), embedding)
            )
        return self.head(h)
