from pathlib import Path

import numpy as np
import torch
from PIL import Image

from serve.model.images import contact_sheet, to_uint8, write_png


def test_the_range_from_minus_one_to_one_becomes_0_to_255() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_a_sheet_shows_every_image_in_its_place() -> None:
    rows = [
        torch.full((2, 3, 32, 32), 10, dtype=torch.uint8),
        torch.full((1, 3, 32, 32), 200, dtype=torch.uint8),
    ]
    sheet = contact_sheet(rows)
    assert sheet.shape == (3, 66, 66)
    assert sheet[:, :32, :32].unique().tolist() == sheet[:, :32, 34:].unique().tolist() == [10]
    assert sheet[:, 34:, :32].unique().tolist() == [200]
    assert sheet[:, 34:, 34:].unique().tolist() == [255]


def test_a_small_image_is_enlarged_and_keeps_its_mean() -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 3 + 20
    sheet = contact_sheet([image])
    assert sheet.shape == (1, 32, 32)
    assert abs(float(sheet.float().mean() - image.float().mean())) < 1


def test_a_png_read_back_is_the_image(tmp_path: Path) -> None:
    for channels in (1, 3):
        image = torch.randint(
            0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)
        ).to(torch.uint8)
        write_png(tmp_path / "a" / "b.png", image)
        read = np.asarray(Image.open(tmp_path / "a" / "b.png")).reshape(5, 7, channels)
        assert np.array_equal(read, image.permute(1, 2, 0).numpy())
