"""What a caller may start sampling from: an image, a mask, noise of their own; checked, and made
into what a sampling plan takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddm.editing import Given
from ddm.errors import ConfigError, require, shown
from ddm.rng import IMAGES_OF_A_SEED

STRENGTH = 0.5  # of an image without a mask
RESAMPLINGS = 4
MAX_RESAMPLINGS = 100


@dataclass(frozen=True, eq=False)
class Edit:
    """Sampling from an image in place of noise alone.

    image: in [-1, 1], `[C, H, W]` for all samples or `[n, C, H, W]` for each
    mask: in [0, 1], `[H, W]`, `[1, H, W]` or `[n, 1, H, W]`: 1 where pixels are to be sampled, 0
        where they are kept; None to sample all
    strength: the time in (0, 1] to which the image is noised; None for 1 with a mask and 0.5
        without one
    resamplings: how often each step is taken where there is a mask, in [1, 100]
    """

    image: Tensor
    mask: Tensor | None = None
    strength: float | None = None
    resamplings: int = RESAMPLINGS

    def check(self) -> None:
        """Raise `ConfigError` naming `strength` or `resamplings` if it is out of range."""
        strength, times = self.strength, self.resamplings
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        fits = strength is None or (number and 0 < float(strength) <= 1)
        require(fits, "strength", "be a number in (0, 1]", strength)
        whole = isinstance(times, int) and not isinstance(times, bool)
        rule = f"be a whole number in [1, {MAX_RESAMPLINGS}]"
        require(whole and 1 <= times <= MAX_RESAMPLINGS, "resamplings", rule, times)

    @property
    def start(self) -> float:
        """The time at which sampling starts."""
        if self.strength is not None:
            return float(self.strength)
        return STRENGTH if self.mask is None else 1.0

    @property
    def repeats(self) -> int:
        """How often each step is taken."""
        return 1 if self.mask is None else self.resamplings

    def given(self, n: int, shape: list[int], device: torch.device) -> Given:
        """The image and the mask of each of n samples of a shape `[C, H, W]`.

        Raises `ConfigError` naming `image` or `mask` if its shape or its values do not fit.
        """
        side = shape[1:]
        image = _rows("image", self.image, n, shape, [shape], (-1, 1))
        if self.mask is None:
            return Given(image.to(device))
        mask = _rows("mask", self.mask, n, [1, *side], [side, [1, *side]], (0, 1))
        return Given(image.to(device), mask.to(device))


def edit_of(
    image: Tensor | None, mask: Tensor | None, strength: float | None, resamplings: int
) -> Edit | None:
    """What an image, or its absence, and its options ask for.

    Raises `ConfigError` naming `mask` or `strength` where there is none without an image.
    """
    if image is not None:
        return Edit(image, mask, strength, resamplings)
    for key, given in (("mask", mask), ("strength", strength)):
        require(given is None, key, "be left out without an image", given)
    return None


def count_of(n: int | None, x: Tensor | None, image: Tensor | None) -> int:
    """How many samples are wanted: n, or as many as there are noises or images, or 1.

    Raises `ConfigError` naming `n` if it is not a whole number of at least 1.
    """
    if n is not None:
        check_whole("n", n, 1)
        return n
    for key, given in (("x", x), ("image", image)):
        if given is not None:
            _require_tensor(key, given)
            if given.ndim == 4:
                return len(given)
    return 1


def own_noise(x: Tensor, n: int, shape: list[int]) -> Tensor:
    """The caller's noise `[n, C, H, W]`. Raises `ConfigError` naming `x` if its shape is another."""
    _require_tensor("x", x)
    wanted = [n, *shape]
    fits = list(x.shape) == wanted
    require(fits, "x", f"have the shape {wanted} (n, C, H, W)", list(x.shape))
    require(bool(x.isfinite().all()), "x", "be finite, standard normal numbers", "others")
    return x.float()


def image_rows(key: str, images: Tensor, shape: list[int]) -> Tensor:
    """Images `[C, H, W]` or `[n, C, H, W]` in [-1, 1] as `[n, C, H, W]`.

    Raises `ConfigError` naming the key if their shape or their values do not fit.
    """
    _require_tensor(key, images)
    n = len(images) if images.ndim == 4 else 1
    require(n > 0, key, "be at least one image", "none")
    return _rows(key, images, n, shape, [shape], (-1, 1))


def _rows(
    key: str,
    value: Tensor,
    n: int,
    row: list[int],
    alone: list[list[int]],
    limits: tuple[int, int],
) -> Tensor:
    """A tensor of one of the shapes `alone`, or one such row or n of them, as `[n, *row]`."""
    _require_tensor(key, value)
    shape = list(value.shape)
    if shape in alone or shape == [1, *row]:
        value = value.reshape(1, *row).expand(n, *row)
    elif shape != [n, *row]:
        wanted = " or ".join(str(each) for each in [*alone, [n, *row]])
        raise ConfigError(f"{key} must have the shape {wanted}, got {shape}", key)
    value = value.float()
    low, high = limits
    inside = bool(((value >= low) & (value <= high)).all())
    if not inside:
        found = f"{float(value.min()):.4g} to {float(value.max()):.4g}"
        raise ConfigError(f"{key} must be numbers in [{low}, {high}], got {found}", key)
    return value


def _require_tensor(key: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ConfigError(f"{key} must be a tensor, got {shown(value)}", key)


def check_whole(key: str, value: object, least: int) -> None:
    """Raise `ConfigError` naming the key of what is not a whole number in [least, 2^63)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    rule = f"be a whole number in [{least}, 2^63)"
    require(whole and least <= value < 2**63, key, rule, value)  # type: ignore[operator]


def check_counts(**counts: object) -> None:
    """Raise `ConfigError` naming one of the numbers n and batch that is below 1, or another that is
    below 0, or that is no whole number.
    """
    for key, value in counts.items():
        check_whole(key, value, 1 if key in ("n", "batch") else 0)
    first, n = counts.get("first_index", 0), counts.get("n", 1)
    rule = "be at most 2^56 - n: a seed has so many images"
    require(first + n <= IMAGES_OF_A_SEED, "first_index", rule, first)  # type: ignore[operator]
