"""Image files, written by Pillow in every form and compared with the array behind them."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddm.errors import DataError
from train.data.decoding import decode

SIDE = 8
GREY = np.linspace(0, 255, SIDE * SIDE).round().astype(np.uint8).reshape(SIDE, SIDE)
CORNERS = np.zeros((SIDE, SIDE, 3), np.uint8)  # every corner another colour
CORNERS[:4, :4] = 255
CORNERS[:4, 4:] = (255, 0, 0)
CORNERS[4:, :4] = (0, 255, 0)


def read(path: Path, size: int = SIDE) -> np.ndarray:
    return decode(path, size).pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.swapaxes(0, 1)),
        (6, np.rot90(CORNERS, -1)),
        (7, CORNERS[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(CORNERS)),
    ],
)
def test_the_exif_orientation_is_applied(
    tmp_path: Path, suffix: str, orientation: int, upright: np.ndarray
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(CORNERS).save(path, exif=exif, **lossless.get(suffix, {}))
    assert np.abs(read(path).astype(int) - upright).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    assert np.array_equal(read(path), np.repeat(GREY[:, :, None], 3, axis=2))


def test_sixteen_bits_that_count_from_white_are_inverted(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path, tiffinfo={262: 0})
    assert np.array_equal(read(path)[:, :, 0], 255 - GREY)


def test_floats_are_read_from_zero_to_one_and_refused_beyond(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray((GREY / 255).astype(np.float32)).save(path)
    assert np.array_equal(read(path)[:, :, 0], GREY)
    for beyond in (GREY.astype(np.float32), GREY / -255, np.full((8, 8), np.nan)):
        Image.fromarray(beyond.astype(np.float32)).save(path)
        with pytest.raises(DataError, match=r"a.tif cannot be read.*values must be in \[0, 1\]"):
            read(path)


def test_integers_without_a_stated_white_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(GREY.astype(np.int32)).save(path)
    with pytest.raises(DataError, match=r"a.tif .*32-bit integers have no stated white"):
        read(path)


def blended(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[:, :, None] / 255
    return (colour * opacity + 255 * (1 - opacity)).round()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white_and_not_its_hidden_colour(
    tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "a.png"
    rgba = np.dstack([CORNERS, GREY])
    image = Image.fromarray(rgba).convert(mode)
    image.save(path)
    colour = np.asarray(Image.fromarray(CORNERS).convert("L" if mode == "LA" else "RGB"))
    colour = np.broadcast_to(colour.reshape(SIDE, SIDE, -1), CORNERS.shape)
    assert np.abs(read(path) - blended(colour, GREY)).max() <= 1
    assert decode(path, SIDE).notes == ["transparent, shown on white"]


def test_the_transparent_colours_of_palettes_and_keys_show_white(tmp_path: Path) -> None:
    palette = Image.fromarray((CORNERS[:, :, 0] > 0).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.full((SIDE, SIDE, 3), 255)
    expected[:4] = (200, 100, 50)
    for suffix in ("png", "gif"):
        path = tmp_path / f"a.{suffix}"
        palette.save(path, transparency=0)
        assert np.array_equal(read(path), expected)
    path = tmp_path / "key.png"
    Image.fromarray(CORNERS).save(path, transparency=(0, 0, 0))
    expected = CORNERS.copy()
    expected[4:, 4:] = 255
    assert np.array_equal(read(path), expected)


def test_palettes_and_bits_and_inks_are_read_as_colours(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    Image.fromarray(CORNERS).quantize(4).save(path)
    assert np.array_equal(read(path), CORNERS)
    path = tmp_path / "bits.png"
    Image.fromarray(GREY > 100).save(path)
    assert np.array_equal(read(path)[:, :, 1], 255 * (GREY > 100))
    path = tmp_path / "inks.jpg"
    Image.fromarray(CORNERS).convert("CMYK").save(path, quality=100, subsampling=0)
    assert np.abs(read(path).astype(int) - CORNERS).max() <= 4


def test_the_first_of_several_frames_is_read_and_noted(tmp_path: Path) -> None:
    frames = [Image.fromarray(CORNERS), Image.fromarray(255 - CORNERS)]
    for suffix in ("gif", "tif", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        more = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **more)
        decoded = decode(path, SIDE)
        assert np.array_equal(decoded.pixels.permute(1, 2, 0).numpy(), CORNERS), suffix
        assert decoded.notes == ["with more than one frame, the first read"]


def test_an_image_is_cut_to_a_square_about_its_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "1.png")
    assert np.unique(read(tmp_path / "1.png")).tolist() == [255]


def test_a_smaller_square_is_the_mean_of_its_boxes(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "1.png")
    means = GREY.reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert (
        np.abs(read(tmp_path / "1.png", 4)[:, :, 2] - means).max() <= 1
    )  # rounded along each axis


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_a_file_cut_short_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    path = tmp_path / f"short.{suffix}"
    Image.fromarray(noise).save(path)
    for length in (0, 3, 20, path.stat().st_size // 2):
        os.truncate(path, length)
        with pytest.raises(DataError, match=rf"short.{suffix} cannot be read as an image"):
            decode(path, SIDE)
        Image.fromarray(noise).save(path)


def test_a_format_that_runs_programs_is_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "script.png"
    Image.fromarray(CORNERS).save(path, format="EPS")
    with pytest.raises(DataError, match="script.png cannot be read as an image"):
        decode(path, SIDE)


def test_degrees_of_transparency_in_a_palette_give_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("P", (SIDE, SIDE)).save(path, transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path).min() == 255
