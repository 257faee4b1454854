"""The UNet of an expert, for square images from an 8x8 grey digit to a 64x64 face."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.blocks import BlockStyle, Encoder, ResidualBlock, check_encoder, group_norm, zeroed


@dataclass
class UNetConfig(BlockStyle):
    """Sizes of a `UNet`; the defaults are those of DDPM on CIFAR-10 (arXiv 2006.11239, appendix B).
    The keys of `BlockStyle` are its as well.

    channels: of the first level, a positive multiple of 4.
    multipliers: of the channels, one per level; each level halves the image's side.
    blocks: residual blocks per level, at least 1.
    attention: sides, in pixels, of the feature maps that get self-attention.
    dropout: in [0, 1).
    patch: side of the squares of pixels that the network takes for one, so that the first level is
    smaller and can be wider at the same cost; it divides the image's side.
    middle_attention: whether the lowest feature map gets self-attention; null if any level does.
    """

    channels: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    blocks: int = 2
    attention: list[int] = field(default_factory=lambda: [16])
    dropout: float = 0.1
    patch: int = 1
    middle_attention: bool | None = None

    @property
    def middle_attends(self) -> bool:
        """`middle_attention`, if it is given."""
        return bool(self.attention) if self.middle_attention is None else self.middle_attention

    def check(self, shape: Sequence[int]) -> None:
        """Raise `ConfigError` naming the key of a size that cannot be for images `[C, H, W]`."""
        check_encoder(self.channels, self.multipliers, self.blocks, self.dropout, shape, self.patch)
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        sides = [shape[-1] // self.patch // 2**level for level in range(len(widths))]
        attending = [
            width for width, side in zip(widths, sides, strict=True) if side in self.attention
        ]
        self.check_style(self.channels, attending + widths[-1:] * self.middle_attends)

    def build(self, shape: Sequence[int], condition: int = 0) -> "UNet":
        """A fresh network for images `[C, H, W]`; `condition` is the length of the condition's
        vector, 0 for a network without one.

        Raises `ConfigError` naming the key of a size that cannot be.
        """
        self.check(shape)
        # Convolutions are fastest in channels_last, on CPUs and on tensor cores.
        return UNet(shape, self, condition).to(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """`(x [B, C, H, W], t [] or [B])` -> `[B, C, H, W]`; zero at initialization, because its last
    layer is. With a condition, `(x, t, vector [B, condition])`.

    Residual blocks with adaptive group norm (arXiv 2105.05233), skips from every feature map of the
    encoder. The condition is embedded linearly and added to the time embedding; the embedding is
    zero at initialization, and for a vector of zeros.
    """

    def __init__(self, shape: Sequence[int], config: UNetConfig, condition: int = 0) -> None:
        super().__init__()
        c = config
        self.encoder = Encoder(
            shape, c.channels, c.multipliers, c.blocks, c.attention, c.dropout, c.patch, c
        )
        skips = list(self.encoder.widths)
        width, embedding = skips[-1], self.encoder.embed.width
        self.middle = nn.ModuleList(
            [
                ResidualBlock(width, width, embedding, c.dropout, c.middle_attends, c),
                ResidualBlock(width, width, embedding, c.dropout, attention=False, style=c),
            ]
        )
        self.stages = nn.ModuleList()
        for level in reversed(range(len(c.multipliers))):
            side, out = shape[-1] // c.patch // 2**level, c.channels * c.multipliers[level]
            for _ in range(c.blocks + 1):
                inputs, attends = width + skips.pop(), side in c.attention
                self.stages.append(ResidualBlock(inputs, out, embedding, c.dropout, attends, c))
                width = out
            if level > 0:
                self.stages.append(Upsample(width))
        pixels = shape[0] * c.patch**2
        self.head = nn.Sequential(
            group_norm(width, c), nn.SiLU(), zeroed(nn.Conv2d(width, pixels, 3, padding=1))
        )
        self.patch = c.patch
        self.condition: nn.Linear | None = None
        if condition > 0:
            self.condition = nn.Linear(condition, embedding, bias=False)
            nn.init.zeros_(self.condition.weight)

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None) -> Tensor:
        beside = None
        if self.condition is not None:
            assert vector is not None
            beside = self.condition(vector.to(x))
        maps, embedding = self.encoder(x, t, beside)
        h = maps[-1]
        for block in self.middle:
            h = block(h, embedding)
        for stage in self.stages:
            if isinstance(stage, ResidualBlock):
                skip = maps.pop()
                h = stage(torch.cat([h, skip], dim=1), embedding)
            else:
                h = stage(h)
        return F.pixel_shuffle(self.head(h), self.patch)
