"""Images as people and files have them: uint8, sheets, PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clipped to it) as uint8, any shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def contact_sheet(rows: Sequence[Tensor], least_side: int = 32) -> Tensor:
    """uint8 `[C, H, W]`: images in rows (uint8 `[n, C, h, w]` each), small ones enlarged to `least_side` pixels or more.

    Enlarged smoothly, because people read an 8x8 digit better without the edges of its pixels.
    """
    scale = max(1, -(-least_side // rows[0].shape[-1]))
    channels, side, gap = rows[0].shape[1], rows[0].shape[-1] * scale, 2
    columns = max(len(row) for row in rows)
    sheet = torch.full(
        (channels, len(rows) * (side + gap) - gap, columns * (side + gap) - gap),
        255,
        dtype=torch.uint8,
    )
    for i, row in enumerate(rows):
        large = F.interpolate(row.float(), scale_factor=scale, mode="bicubic") if scale > 1 else row
        for j, image in enumerate(large.round().clamp(0, 255).to(torch.uint8)):
            top, left = i * (side + gap), j * (side + gap)
            sheet[:, top : top + side, left : left + side] = image
    return sheet


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


def write_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image `[C, H, W]`, grey or RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image))
