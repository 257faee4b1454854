"""Counter-based random numbers (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011).

Every random number of this project is a function of (seed, stream, index of the image, step,
position). There is no state to save: image 3 gets the same noise alone, in a batch, on a server or
after a crash. Whole batches are computed at once with integer tensor operations, which are exact on
every device.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

_Word = TypeVar("_Word", Tensor, int)


class RngStream(IntEnum):
    """What random numbers are for; no two streams share a counter."""

    START = 0  # the noise at t = 1 of image i
    STEP = 1  # the noise of image i at step n of a stochastic sampler
    CHOICE = 2  # the choice of an expert for image i at step n
    BATCH = 3  # which images make the batch of training step n
    TIME = 4  # the times of training step n
    NOISE = 5  # the noise of training step n
    FLIP = 6  # which images of training step n are mirrored
    DROPOUT = 7  # the seed of torch's generator at training step n
    EXPERT = 8  # the seed of expert k
    ROUTER = 9  # the seed of the router
    SWITCH = 10  # when image i changes its expert under the policy `switching`, and to which
    SEED_MODEL = 11  # the seed of the seed model
    HELD_OUT = 12  # the noise of held-out images in a validation
    CONDITION = 13  # which conditions of training step n are left out


def philox(counter: Sequence[_Word], key: tuple[int | _Word, int | _Word]) -> list[_Word]:
    """Philox4x32-10: four counter words (int64 tensors of 32-bit values, or numbers) and a key,
    which broadcast, to four random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words fits 64 bits; as int64 it wraps, and the mask restores its
        # upper word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return [c0, c1, c2, c3]


IMAGES_OF_A_SEED = 2**56  # whose numbers are told apart


def _words(
    seed: int | Tensor, stream: RngStream | Tensor, index: Tensor, step: int | Tensor, count: int
) -> Tensor:
    """Random 32-bit words, int64 `[B, count]`: the first `count` of (seed, stream, index, step) for
    each index `[B]`.
    """
    block = torch.arange(-(-count // 4), device=index.device)[None]
    kind = stream[:, None] if isinstance(stream, Tensor) else int(stream)
    key = seed[:, None] if isinstance(seed, Tensor) else seed
    if not isinstance(step, Tensor):
        # Filled in on the device: a copy to it would wait for its queue.
        step = torch.full((1,), step, device=index.device)
    low, high = index[:, None] & _MASK, index[:, None] >> 32 & 0xFFFFFF
    counter = (block, low, step.to(index.device).reshape(-1, 1), high << 8 | kind)
    words = philox(counter, (key & _MASK, key >> 32 & _MASK))
    return torch.stack([w.expand(len(index), -1) for w in words], dim=2).flatten(1)[:, :count]


def uniform(
    seed: int | Tensor,
    stream: RngStream | Tensor,
    index: Tensor,
    step: int | Tensor = 0,
    count: int = 1,
) -> Tensor:
    """Uniform float64 numbers in (0, 1), `[B, count]`.

    index: int64 `[B]`, in [0, 2^56). seed, stream, step: one number or int64 `[B]`.
    """
    return (_words(seed, stream, index, step, count).double() + 0.5) / 2**32


def normal(
    seed: int | Tensor,
    stream: RngStream,
    index: Tensor,
    step: int | Tensor = 0,
    shape: Sequence[int] = (),
) -> Tensor:
    """Standard normal float32 numbers, `[B, *shape]`, by the Box-Muller transform; arguments as in
    `uniform`.
    """
    count = math.prod(shape)
    u = uniform(seed, stream, index, step, count + count % 2)
    radius = (-2 * u[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)
    return z[:, :count].float().reshape(len(index), *shape)


def derive_seed(seed: int, stream: RngStream, step: int) -> int:
    """A 63-bit seed for another generator, such as torch's for dropout: a function of (seed,
    stream, step).
    """
    high, low, *_ = philox((0, 0, step, int(stream)), (seed & _MASK, seed >> 32 & _MASK))
    return (high << 32 | low) >> 1
