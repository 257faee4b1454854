"""Images as uint8, contact sheets, and files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ddm.artifacts import replaced

_GAP = 2  # pixels between the images of a contact sheet


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped to it, as uint8 of the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def contact_sheet(rows: Sequence[Tensor], least_side: int = 32) -> Tensor:
    """Rows of square images (uint8 `[n, C, side, side]` each) as one uint8 image `[C, H, W]` on
    white.

    Images smaller than `least_side` are enlarged by a whole factor, smoothly: an 8x8 digit is
    easier to read without the edges of its pixels.
    """
    scale = math.ceil(least_side / rows[0].shape[-1])
    channels = rows[0].shape[1]
    side = rows[0].shape[-1] * scale
    pitch = side + _GAP
    height = len(rows) * pitch - _GAP
    width = max(len(row) for row in rows) * pitch - _GAP
    sheet = torch.full((channels, height, width), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(_enlarged(row, scale)):
            top = i * pitch
            left = j * pitch
            sheet[:, top : top + side, left : left + side] = image
    return sheet


def _enlarged(images: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return images
    large = F.interpolate(images.float(), scale_factor=scale, mode="bicubic")
    return large.round().clamp(0, 255).to(torch.uint8)


def encoded(image: Tensor, form: str = "png", quality: int | None = None) -> bytes:
    """A uint8 image `[C, H, W]`, grey or RGB, as the bytes of a png, webp or jpeg file.

    quality: in [0, 100], of a jpeg or webp; a webp without it is lossless.
    """
    options: dict[str, object] = {} if quality is None else {"quality": quality}
    if form == "webp" and quality is None:
        options["lossless"] = True
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(pixels).save(file, format=form.upper(), **options)
    return file.getvalue()


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel: Pillow would clip the values of one with 16."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value / 256).convert("L")


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image `[C, H, W]`, grey or RGB, whole or not at all. Raises `ArtifactError`."""
    with replaced(path) as scratch:
        scratch.write_bytes(encoded(image))
