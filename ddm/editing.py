"""Sampling from an image: from its noised copy on (SDEdit), or with some of its pixels kept
(inpainting), and the way between two noises.

Neither needs a network of its own or a gradient, so that both work with any denoiser, any sampler,
and experts on other machines.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.samplers import Course, Sampler, Step, Times
from ddm.schedules import Coeffs


class Given(NamedTuple):
    """Images that sampling starts from.

    image: `[B, C, H, W]`. mask: `[B, 1, H, W]` in [0, 1], 1 where a pixel is to be sampled and 0
    where it is kept; None to sample all of them.
    """

    image: Tensor
    mask: Tensor | None = None

    def rows(self, rows: slice) -> "Given":
        """Some of them."""
        return Given(self.image[rows], None if self.mask is None else self.mask[rows])


def noised(given: Given, noise: Tensor, c: Coeffs, whole: bool) -> Tensor:
    """`a image + s noise`, the forward process at one time: what SDEdit starts from (arXiv
    2108.01073, algorithm 1).

    whole: with the pixels that are to be sampled; without them they are noise alone, so that
    nothing of what a mask hides is left.
    """
    image = given.image
    if given.mask is not None and not whole:
        image = image * (1 - given.mask)
    return c.a * image + c.s * noise


def keep(given: Given, denoised: Tensor) -> Tensor:
    """The denoised images `[B, C, H, W]` with the pixels that are kept in their place:
    `(1 - m) image + m D`, DDNM's (arXiv 2212.00490, equation 10, with the mask as the operator).

    They are known, so theirs is the exact posterior mean. Along the ODE they then follow `a image +
    s eps`, which is the replacement of arXiv 2011.13456 (appendix I.2) with one noise throughout.
    """
    if given.mask is None:
        return denoised
    return torch.lerp(given.image, denoised, given.mask.expand_as(denoised))


def restore(given: Given, x: Tensor) -> Tensor:
    """The end of a trajectory, `[B, C, H, W]`, with exactly the image where the mask is 0: a sampler
    may end before t = 0, or a little beside the denoised image.
    """
    if given.mask is None:
        return x
    return torch.where(given.mask == 0, given.image, x)


def resampled(method: Sampler, times: Times, repeats: int) -> tuple[Sampler, list[Tensor]]:
    """The sampler whose every step is taken `repeats` times, and its times: between two, the noise
    of the step is added back by the forward process.

    It is RePaint's resampling (arXiv 2201.09865, algorithm 1) with jumps of one step, for any
    sampler. A mask alone lets the kept pixels act on the others only as fast as the noise falls;
    each repetition lets the two agree once more at the same noise. What a sampler remembers of
    earlier steps belongs to another noise and is dropped.
    """
    times = list(times)
    if repeats == 1:
        return method, times
    visits = [t for t in times[:-1] for _ in range(repeats)]
    return replace(method, step=partial(_resampled, method, repeats)), [*visits, times[-1]]


def _resampled(method: Sampler, repeats: int, course: Course, m: int, *carry: Tensor) -> Step:
    n, round_ = divmod(m, repeats)
    times = course.times[::repeats]
    numbers = 2 * len(times)  # of noises, more than the sampler uses in all its steps
    own = Course(course.schedule, times, lambda i: course.noise(round_ * numbers + i))
    after = yield from method.step(own, n, *carry)
    if round_ == repeats - 1:
        return after
    c, c_next = own.coeffs(n), own.coeffs(n + 1)
    r = c.a / c_next.a
    added = (c.s**2 - (r * c_next.s) ** 2).clamp_min(0).sqrt()
    return (r * after[0] + added * course.noise((repeats + round_) * numbers + n),)


def slerp(first: Tensor, last: Tensor, fractions: Tensor) -> Tensor:
    """The way from one noise to another, `[n, ...]` at fractions `[n]` of it, along the great circle
    (Shoemake, SIGGRAPH 1985): the points between are as long as noise is.

    A straight line's would be shorter, and an average of two noises is not a sample of noise.
    """
    angle = torch.acos(
        torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1)
    )
    parts = fractions.to(first).reshape(-1, *[1] * first.ndim)
    if angle.sin() < 1e-4:
        return torch.lerp(first, last, parts)
    return (torch.sin((1 - parts) * angle) * first + torch.sin(parts * angle) * last) / angle.sin()
