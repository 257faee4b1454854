"""Randomness that is counted, not consumed.

Every random number of this project is a function of (seed, what it is for, image or step, place), through the counter
based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). There is no state
to save: image 3 gets the same noise alone, in a batch, on a server or after a crash. Whole batches are drawn at once
with integer tensor operations, which are exact on every device.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class RngStream(IntEnum):
    """What a random number is for; two uses never share a counter."""

    START = 0  # the noise at t = 1 of image i
    STEP = 1  # the noise of image i at step n of a stochastic sampler
    CHOICE = 2  # the draw of an expert for image i at step n
    BATCH = 3  # which images make the batch of training step n
    TIME = 4  # the times of training step n
    NOISE = 5  # the noise of training step n
    FLIP = 6  # which images of training step n are mirrored
    DROPOUT = 7  # the seed of torch's own generator at training step n
    EXPERT = 8  # the seed of expert k
    ROUTER = 9  # the seed of the router


def philox(counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Philox4x32-10: four counter words (int64 tensors of 32-bit values) and a key, which broadcast -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words fits 64 bits; as int64 it wraps, and the mask restores its upper word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return [c0, c1, c2, c3]


def _words(
    seed: int | Tensor, use: RngStream, index: Tensor, step: int | Tensor, count: int
) -> Tensor:
    """`[B, count]` random 32-bit words (int64): for each index `[B]` the first of the stream (seed, use, index, step)."""
    block = torch.arange(-(-count // 4), device=index.device)[None]
    key = seed[:, None] if isinstance(seed, Tensor) else seed
    counter = (
        block,
        index[:, None] & _MASK,
        # A number is filled in: to copy it to a device would wait for all that the device has still to do.
        (
            step.to(index.device)
            if isinstance(step, Tensor)
            else torch.full((1,), step, device=index.device)
        ).reshape(-1, 1),
        (index[:, None] >> 32 & 0xFFFFFF) << 8 | int(use),
    )
    words = philox(counter, (key & _MASK, key >> 32 & _MASK))
    return torch.stack([w.expand(len(index), -1) for w in words], dim=2).flatten(1)[:, :count]


def uniform(
    seed: int | Tensor, use: RngStream, index: Tensor, step: int | Tensor = 0, count: int = 1
) -> Tensor:
    """Uniform float64 numbers `[B, count]` strictly inside (0, 1), for the int64 indices `[B]`; seed, step: one, or `[B]`."""
    return (_words(seed, use, index, step, count).double() + 0.5) / 2**32


def normal(
    seed: int | Tensor,
    use: RngStream,
    index: Tensor,
    step: int | Tensor = 0,
    shape: Sequence[int] = (),
) -> Tensor:
    """Standard normal float32 numbers `[B, *shape]`, by Box and Muller's transform; arguments as `uniform`'s."""
    count = math.prod(shape)
    u = uniform(seed, use, index, step, count + count % 2)
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    return z[:, :count].float().reshape(len(index), *shape)


def derive_seed(seed: int, use: RngStream, step: int) -> int:
    """A 63-bit seed for a generator that is not ours (dropout), a function of (seed, use, step)."""
    high, low = _words(seed, use, torch.zeros(1, dtype=torch.int64), step, 2)[0].tolist()
    return (high << 32 | low) >> 1
