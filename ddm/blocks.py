"""The building blocks that the experts' UNet and the router's encoder share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddm.errors import require


@dataclass
class BlockStyle:
    """How blocks are built. The defaults are those of this project; the others make them those of
    other projects, whose weights then fit (docs/diffusers.md).

    adaptive_norm: the time embedding scales and shifts the second norm of a block (arXiv
    2105.05233); false: it is added before that norm, as in DDPM.
    embedding: widths of the time embedding's two layers, in multiples of the channels; DDPM's are
    4 and 4.
    cos_first: the embedding's cosines before its sines.
    freq_shift: 1: its lowest frequency is 1/10000; 0: the next one would be.
    timesteps: 0: the network is told 1000 t; N: the number `N t - 1`, at least 0, of a step of a
    process of N discrete steps.
    groups: of the group norms; 0 for groups of 4 channels up to width 128, and 32 above.
    norm_eps: added to the variance in group norms, above 0.
    head_channels: channels of an attention head; 0 for one head.
    asymmetric: convolutions that halve the side pad right and bottom alone, as in DDPM.
    """

    adaptive_norm: bool = True
    embedding: list[int] = field(default_factory=lambda: [6, 2])
    cos_first: bool = False
    freq_shift: int = 1
    timesteps: int = 0
    groups: int = 0
    norm_eps: float = 1e-5
    head_channels: int = 0
    asymmetric: bool = False

    def check_style(self, channels: int, attending: Sequence[int]) -> None:
        """Raise `ConfigError` naming the key of a value that cannot be for a network whose widths
        are multiples of `channels`, with attention at the widths `attending`.
        """
        two = len(self.embedding) == 2 and all(1 <= factor <= 64 for factor in self.embedding)
        require(two, "embedding", "be two whole numbers in [1, 64]", self.embedding)
        require(self.freq_shift in (0, 1), "freq_shift", "be 0 or 1", self.freq_shift)
        steps = self.timesteps
        require(0 <= steps <= 1_000_000, "timesteps", "be in [0, 1000000]", steps)
        divides = self.groups >= 0 and (self.groups == 0 or channels % self.groups == 0)
        require(divides, "groups", f"be 0 or divide channels = {channels}", self.groups)
        require(0 < self.norm_eps <= 1, "norm_eps", "be in (0, 1]", self.norm_eps)
        head = self.head_channels
        for width in attending:
            whole = head >= 0 and (head == 0 or width % head == 0)
            rule = f"be 0 or divide the width {width} of a level that attends"
            require(whole, "head_channels", rule, head)


_USUAL = BlockStyle()


def group_norm(channels: int, style: BlockStyle = _USUAL) -> nn.GroupNorm:
    """Group normalization as in DDPM: 32 groups; groups of 4 channels up to width 128; fewer if 32
    does not divide the width. Or the groups of a style.
    """
    usual = channels // 4 if channels <= 128 else math.gcd(32, channels)
    return nn.GroupNorm(style.groups or usual, channels, eps=style.norm_eps)


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with all parameters zero: its residual branch starts out as the
    identity.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeEmbedding(nn.Module):
    """t `[B]` in [0, 1] -> `[B, width]`: sines and cosines of 1000 t (arXiv 2006.11239), then two
    linear layers.

    The embedding is usually half as wide as DDPM's, because adaptive group norm needs two numbers
    per channel and DDPM one. With a hidden layer of 6c the CIFAR-10 network keeps DDPM's 35.7M
    parameters.
    """

    def __init__(self, channels: int, style: BlockStyle = _USUAL) -> None:
        super().__init__()
        self.channels = channels
        self.style = style
        hidden, self.width = (channels * factor for factor in style.embedding)
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, self.width)
        )

    def forward(self, t: Tensor) -> Tensor:
        half, steps = self.channels // 2, self.style.timesteps
        rate = -math.log(10000) / (half - self.style.freq_shift)
        frequency = torch.exp(rate * torch.arange(half, device=t.device))
        told = (steps * t - 1).clamp_min(0) if steps else 1000 * t
        phase = told[:, None] * frequency
        waves = [phase.cos(), phase.sin()] if self.style.cos_first else [phase.sin(), phase.cos()]
        return self.layers(torch.cat(waves, dim=1))


class SelfAttention(nn.Module):
    """Residual self-attention over all positions of a feature map `[B, C, H, W]`."""

    def __init__(self, channels: int, style: BlockStyle = _USUAL) -> None:
        super().__init__()
        self.heads = channels // (style.head_channels or channels)
        self.norm = group_norm(channels, style)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # [B, 3, heads, channels of a head, positions]
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))


class HalveAsymmetrically(nn.Conv2d):
    """Half the side by a 3 x 3 convolution, with zeros right and bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ResidualBlock(nn.Module):
    """Two convolutions; the time embedding scales and shifts the group norm before the second, or
    is added before it.

    Self-attention follows if `attention` is set. `[B, in, H, W]`, `[B, embedding]` ->
    `[B, out, H, W]`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        attention: bool,
        style: BlockStyle = _USUAL,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs, style)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.scale_shift: nn.Linear | None = None
        self.shift: nn.Linear | None = None
        if style.adaptive_norm:
            self.scale_shift = nn.Linear(embedding, 2 * outputs)
        else:
            self.shift = nn.Linear(embedding, outputs)
        self.norm2 = group_norm(outputs, style)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = SelfAttention(outputs, style) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.shift is not None:
            h = self.norm2(h + self.shift(F.silu(embedding))[:, :, None, None])
        else:
            assert self.scale_shift is not None
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
    `[B, embed.width]`: that of the time, plus `beside` of the same shape if it is given.
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
        style: BlockStyle = _USUAL,
    ) -> None:
        super().__init__()
        self.embed = TimeEmbedding(channels, style)
        self.patch = patch
        self.stem = nn.Conv2d(shape[0] * patch**2, channels, 3, padding=1)
        self.stages = nn.ModuleList()
        self.widths = [channels]
        side, width = shape[-1] // patch, channels
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.stages.append(
                    HalveAsymmetrically(width)
                    if style.asymmetric
                    else nn.Conv2d(width, width, 3, stride=2, padding=1)
                )
                self.widths.append(width)
                side //= 2
            for _ in range(blocks):
                out = channels * multiplier
                self.stages.append(
                    ResidualBlock(width, out, self.embed.width, dropout, side in attention, style)
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
