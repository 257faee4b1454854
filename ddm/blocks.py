"""The building blocks that the experts' UNet and the router's encoder share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.errors import require


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization as in DDPM: 32 groups; groups of 4 channels up to width 128; fewer if 32
    does not divide the width.
    """
    return nn.GroupNorm(channels // 4 if channels <= 128 else math.gcd(32, channels), channels)


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with all parameters zero: its residual branch starts out as the
    identity.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeEmbedding(nn.Module):
    """t `[B]` in [0, 1] -> `[B, 2c]`: sines and cosines of 1000 t (arXiv 2006.11239), then two
    linear layers.

    The embedding is half as wide as DDPM's, because adaptive group norm needs two numbers per
    channel and DDPM one. With a hidden layer of 6c the CIFAR-10 network keeps DDPM's 35.7M
    parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(
            nn.Linear(channels, 6 * channels), nn.SiLU(), nn.Linear(6 * channels, 2 * channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        frequency = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        phase = 1000 * t[:, None] * frequency
        return self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))


class SelfAttention(nn.Module):
    """Residual self-attention over all positions of a feature map `[B, C, H, W]`, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


class ResidualBlock(nn.Module):
    """Two convolutions; the time embedding scales and shifts the group norm before the second.

    Self-attention follows if `attention` is set. `[B, in, H, W]`, `[B, 2c]` -> `[B, out, H, W]`.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * outputs)
        self.norm2 = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))


class Encoder(nn.Module):
    """The descending half of a UNet with its time embedding.

    One level per entry of `multipliers`, with `blocks` residual blocks of width `channels *
    multiplier`; a strided convolution between levels; self-attention at feature maps whose side is
    in `attention`. Each `patch` x `patch` pixels become the channels of one pixel first
    (space-to-depth).

    `forward(x [B, C, H, W], t [] or [B])` returns the feature maps (the input convolution's, each
    block's, each strided convolution's; their channel counts are `widths`) and the embedding
    `[B, 2 channels]`: that of the time, plus `beside` of the same shape if it is given.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        dropout: float,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.embed = TimeEmbedding(channels)
        self.patch = patch
        self.stem = nn.Conv2d(shape[0] * patch**2, channels, 3, padding=1)
        self.stages = nn.ModuleList()
        self.widths = [channels]
        side, width = shape[-1] // patch, channels
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.stages.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                self.widths.append(width)
                side //= 2
            for _ in range(blocks):
                out = channels * multiplier
                self.stages.append(
                    ResidualBlock(width, out, 2 * channels, dropout, side in attention)
                )
                self.widths.append(out)
                width = out

    def forward(
        self, x: Tensor, t: Tensor, beside: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        embedding = self.embed(t.to(x.dtype).expand(len(x)))
        if beside is not None:
            embedding = embedding + beside
        maps = [self.stem(F.pixel_unshuffle(x, self.patch))]
        for stage in self.stages:
            maps.append(
                stage(maps[-1], embedding) if isinstance(stage, ResidualBlock) else stage(maps[-1])
            )
        return maps, embedding


def check_encoder(
    channels: int,
    multipliers: Sequence[int],
    blocks: int,
    dropout: float,
    shape: Sequence[int],
    patch: int = 1,
) -> None:
    """Raise `ConfigError` naming a size that makes no network for images of `shape` `[C, H, W]`."""
    require(
        4 <= channels <= 8192 and channels % 4 == 0,
        "channels",
        "be a multiple of 4 in [4, 8192]",
        channels,
    )
    factors = len(multipliers) > 0 and all(1 <= m <= 64 for m in multipliers)
    require(factors, "multipliers", "be whole numbers in [1, 64]", multipliers)
    require(1 <= blocks <= 32, "blocks", "be in [1, 32]", blocks)
    require(0 <= dropout < 1, "dropout", "be in [0, 1)", dropout)
    divides = patch >= 1 and shape[1] % patch == 0
    require(divides, "patch", f"divide the image's side of {shape[1]} pixels", patch)
    side = shape[1] // patch
    levels = len(multipliers)
    halves = levels <= side.bit_length() and side % 2 ** (levels - 1) == 0
    require(
        halves and shape[2] == shape[1],
        "multipliers",
        f"halve a square image of {side} x {shape[2] // patch} evenly",
        multipliers,
    )
