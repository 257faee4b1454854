"""Uploaded images: read, cut and scaled to those of a model."""

import base64
import binascii
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ddm.errors import ConfigError, require, shown
from serve.model.edits import RESAMPLINGS, Edit
from serve.model.images import eight_bits

_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS = 16 << 20


@dataclass(frozen=True)
class Uploads:
    """An image and a mask as files, and how to edit the image; see `Edit`."""

    image: bytes
    mask: bytes | None = None
    strength: float | None = None
    resamplings: int = RESAMPLINGS

    def edit(self, shape: list[int]) -> Edit:
        """What to start from, for images `[C, H, W]`.

        As in OpenAI's API the transparent pixels, of the mask or else of the image, are sampled,
        and the others are kept. Raises `ConfigError` naming `image` or `mask`.
        """
        rule = "be left out of a model whose images have neither 1 nor 3 channels"
        require(shape[0] in (1, 3), "image", rule, f"one for {shape[0]} channels")
        whole = read_image(self.image, "image")
        image, alpha = fitted(whole, shape)
        if self.mask is not None:
            mask_of_it = read_image(self.mask, "mask")
            _check_proportions(mask_of_it.size, whole.size)
            alpha = fitted(mask_of_it, shape)[1]
            rule = "be an image with transparent pixels, which are to be sampled"
            require(alpha is not None, "mask", rule, "an opaque one")
        mask = None if alpha is None else 1 - alpha
        return Edit(image, mask, self.strength, self.resamplings)


def from_base64(key: str, text: str) -> bytes:
    """The bytes of a file. Raises `ConfigError` naming the key."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        rule = "be a file in base64, without line breaks"
        raise ConfigError(f"{key} must {rule}, got {shown(text)}", key) from error


def read_image(file: bytes, key: str) -> Image.Image:
    """A PNG, JPEG or WebP file as RGBA, upright. Raises `ConfigError` naming the key."""
    rule = f"be a PNG, JPEG or WebP image of at most {_MOST_PIXELS} pixels"
    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as opened:
            require(opened.width * opened.height <= _MOST_PIXELS, key, rule, opened.size)
            return eight_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
    except ConfigError:
        raise
    except Exception as error:
        # Pillow's are of many kinds, as struct.error for wrong types in EXIF.
        raise ConfigError(
            f"{key} must {rule}, got {len(file)} bytes of another kind", key
        ) from error


def _check_proportions(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise `ConfigError` unless a mask has an image's proportions, but for a pixel that was rounded."""
    apart = abs(mask[0] * image[1] - mask[1] * image[0])
    rule = f"have the proportions of the image, {image[0]}x{image[1]}"
    require(apart <= max(*mask, *image), "mask", rule, f"{mask[0]}x{mask[1]}")


def fitted(whole: Image.Image, shape: list[int]) -> tuple[Tensor, Tensor | None]:
    """The middle of an RGBA image in [-1, 1] `[C, H, W]`, and its alpha in [0, 1] `[1, H, W]`, None
    if it is opaque.
    """
    channels, height, width = shape
    middle = ImageOps.fit(whole, (width, height), Image.Resampling.BOX)
    alpha = _tensor(middle.getchannel("A"))
    colors = _tensor(middle.convert("L" if channels == 1 else "RGB"))
    return colors * 2 - 1, None if bool((alpha == 1).all()) else alpha


def _tensor(image: Image.Image) -> Tensor:
    """In [0, 1], `[C, H, W]`."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
