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
        image, alpha = read_image(self.image, "image", shape)
        if self.mask is not None:
            alpha = read_image(self.mask, "mask", shape)[1]
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


def read_image(file: bytes, key: str, shape: list[int]) -> tuple[Tensor, Tensor | None]:
    """An image in [-1, 1] `[C, H, W]`, from the middle of a PNG, JPEG or WebP file, and its alpha
    in [0, 1] `[1, H, W]`, None if it is opaque.

    Raises `ConfigError` naming the key.
    """
    channels, height, width = shape
    rule = f"be a PNG, JPEG or WebP image of at most {_MOST_PIXELS} pixels"
    try:
        with Image.open(io.BytesIO(file), formats=_FORMATS) as opened:
            require(opened.width * opened.height <= _MOST_PIXELS, key, rule, opened.size)
            whole = ImageOps.exif_transpose(opened).convert("RGBA")
    except ConfigError:
        raise
    except Exception as error:
        # Pillow's are of many kinds, as struct.error for wrong types in EXIF.
        raise ConfigError(
            f"{key} must {rule}, got {len(file)} bytes of another kind", key
        ) from error
    fitted = ImageOps.fit(whole, (width, height), Image.Resampling.BOX)
    alpha = _tensor(fitted.getchannel("A"))
    colors = _tensor(fitted.convert("L" if channels == 1 else "RGB"))
    return colors * 2 - 1, None if bool((alpha == 1).all()) else alpha


def _tensor(image: Image.Image) -> Tensor:
    """In [0, 1], `[C, H, W]`."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
