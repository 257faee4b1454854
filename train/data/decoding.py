"""One image file as a square of uint8 RGB, the right way up, in the right brightness."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ddm.errors import DataError
from train.data.image_files import FORMATS

DECODER = 2  # raise it when the same file gives other pixels: cached pixels are then made again
BACKGROUND = (255, 255, 255)  # what is transparent shows this colour

_BITS_TAG = 258  # of TIFF: bits per sample
_PHOTOMETRIC_TAG = 262  # of TIFF: 0 means that the value 0 is white
_PAGES = {"AVIF", "GIF", "PNG", "TIFF", "WEBP"}  # formats that may hold several images


class Decoded(NamedTuple):
    """An image, and what should be said of how it was read."""

    pixels: Tensor  # uint8 [3, size, size]
    notes: list[str]


def decode(path: Path, size: int) -> Decoded:
    """Read a file as a square about its middle, upright by its EXIF orientation, on white.

    Of several frames or pages the first is read. 16 bits of grey are scaled to 8. Colour profiles
    are not applied. Raises `DataError` naming a file that is damaged, too large to be safe
    (`PIL.Image.MAX_IMAGE_PIXELS`), or whose values have no stated white.
    """
    try:
        image, several = _read(path)
        notes = ["with more than one frame, the first read"] if several else []
        if image.has_transparency_data:
            notes.append("transparent, shown on white")
        rgb = _to_rgb(image)
    except Exception as error:  # Pillow raises almost anything for a damaged file
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image: {reason}") from error
    return Decoded(_square(rgb, size), notes)


def _read(path: Path) -> tuple[Image.Image, bool]:
    """The first frame, upright, and whether there are more."""
    with Image.open(path, formats=FORMATS) as file:
        several = file.format in _PAGES and getattr(file, "n_frames", 1) > 1
        tags = getattr(file, "tag_v2", {})
        bits = tags.get(_BITS_TAG, (16,))[0]
        inverted = tags.get(_PHOTOMETRIC_TAG) == 0
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey(image, bits, inverted, scaled=file.format == "PPM")
    return image, several


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, BACKGROUND)
    return Image.alpha_composite(background, rgba).convert("RGB")


def _grey(image: Image.Image, bits: int, inverted: bool, scaled: bool) -> Image.Image:
    """Grey of more than 8 bits as 8 bits; `scaled`: Pillow has scaled integers to 16 bits.

    Raises `ValueError` if it is not known which value is white.
    """
    if "transparency" in image.info:
        raise ValueError("a transparent colour in 16 bits is not supported: save it with 8 bits")
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 2.0**bits - 1
    elif scaled:
        white = 65535.0
    else:
        raise ValueError("32-bit integers have no stated white: save it with 8 or 16 bits")
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(
            f"values must be in [0, {white:g}], got {values.min():g} to {values.max():g}"
        )
    if inverted:
        values = white - values
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _square(image: Image.Image, size: int) -> Tensor:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    method = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    square = image.resize((size, size), method, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
