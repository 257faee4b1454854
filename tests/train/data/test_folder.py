"""Folders of classes: what is read, what is passed over and said, and what is refused."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddm.errors import DataError
from train.data import DataConfig, ImageSet
from train.data.image_files import image_suffixes

DataLog = Callable[[], list[str]]


def save(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


def load(root: Path, **more: int) -> ImageSet:
    return DataConfig(name="folder", root=str(root), **{"size": 8, **more}).build()


def reds(images: ImageSet) -> list[int]:
    return images.images[:, 0, 0, 0].tolist()


def test_classes_come_by_name_and_images_by_number(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "2.png", 200, (20, 10))
    save(tmp_path / "cat" / "10.png", 10)
    save(tmp_path / "ant" / "1.jpg", 90, (16, 16))
    images = load(tmp_path, size=4)
    assert images.label_names == ["ant", "cat"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    assert images.images.shape == (3, 3, 4, 4)
    assert reds(images)[1:] == [200, 10]


def test_every_suffix_of_a_still_image_is_read_in_any_case(tmp_path: Path) -> None:
    names = ["a.png", "b.PNG", "c.Tif", "d.tiff", "e.gif", "f.webp", "g.bmp", "h.JPEG", "i.avif"]
    for name in names:
        save(tmp_path / "c" / name)
    assert len(load(tmp_path).images) == len(names)
    assert {".jpg", ".jfif", ".jp2", ".ppm", ".apng"} < image_suffixes()
    assert not {".eps", ".pdf", ".mpg", ".h5"} & image_suffixes()


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", 1)
    save(tmp_path / "a" / "deep" / "er" / "2.png", 2)
    save(tmp_path / "b" / "deep" / "3.png", 3)
    images = load(tmp_path)
    assert images.labels is not None
    assert (reds(images), images.labels.tolist()) == ([1, 2, 3], [0, 0, 1])


def test_what_is_passed_over_is_counted_in_one_line(tmp_path: Path, data_log: DataLog) -> None:
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "._1.png")
    save(tmp_path / "a" / ".thumbnails" / "1.png")
    save(tmp_path / "a" / "__MACOSX" / "1.png")
    save(tmp_path / ".git" / "1.png")
    save(tmp_path / "2.png")
    for name in ("notes.txt", "raw.heic"):
        (tmp_path / "a" / name).write_text("no image")
    images = load(tmp_path)
    assert (len(images.images), images.label_names) == (1, ["a"])
    (line,) = data_log()
    assert line.startswith(f"data       1 images of {tmp_path}; passed over: ")
    assert "2 hidden (" in line  # .git and ._1.png
    assert "2 hidden folders (" in line
    assert f"1 outside of a class ({tmp_path}/2.png)" in line
    assert f"2 of another type ({tmp_path}/a/notes.txt)" in line


def test_how_images_were_read_is_said_also_when_they_come_from_the_cache(
    tmp_path: Path, data_log: DataLog
) -> None:
    for i in range(3):
        Image.new("RGBA", (8, 8)).save(save(tmp_path / "a" / f"{i}.png"))
    assert load(tmp_path).hash == load(tmp_path).hash
    first, second = data_log()
    assert first == second
    assert first.endswith(f"passed over: none; 3 transparent, shown on white ({tmp_path}/a/0.png)")


def test_a_class_may_be_named_cache(tmp_path: Path) -> None:
    save(tmp_path / "cache" / "1.png", 1)
    save(tmp_path / "other" / "1.png", 2)
    assert load(tmp_path).label_names == ["cache", "other"]


def test_nothing_is_written_beside_the_images(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "1.png")
    load(tmp_path)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_resized_images_are_kept_by_path_time_and_decoder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a" / "1.png", 100)
    first = load(tmp_path)
    (kept,) = cache.glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    assert torch.equal(load(tmp_path).images, first.images)
    assert kept.stat().st_mtime_ns == written
    save(path, 101)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert reds(load(tmp_path)) == [101]
    save(tmp_path / "b" / "1.png", 100)
    assert reds(load(tmp_path)) == [101, 100]
    assert load(tmp_path, size=4).images.shape == (2, 3, 4, 4)
    count = len(list(cache.glob("*.safetensors")))
    monkeypatch.setattr("train.data.resized.DECODER", -1)
    load(tmp_path)
    assert len(list(cache.glob("*.safetensors"))) == count + 1


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    save(tmp_path / "a" / "1.png", 100)
    load(tmp_path)
    (kept,) = cache.glob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5] + b"12345")
    assert reds(load(tmp_path)) == [100]
    assert kept.read_bytes() == whole


def test_large_sets_are_written_as_they_are_read_and_mapped(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, data_log: DataLog
) -> None:
    for n in range(7):
        save(tmp_path / "set" / "a" / f"{n}.png", 30 * n)
    whole = load(tmp_path / "set")
    (kept,) = cache.glob("*.safetensors")
    before = kept.read_bytes()
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr("train.data.resized._LARGE_BYTES", 0)
    monkeypatch.setattr("train.data.resized._BATCH", 3)
    found = load(tmp_path / "set")
    assert kept.read_bytes() == before
    found.release()
    assert torch.equal(found.images, whole.images)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(load(tmp_path / "set").images, whole.images)
    assert any("images are read into memory" in line for line in data_log())
    (tmp_path / "set" / "a" / "3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"3.png"):
        load(tmp_path / "set")


def test_images_are_read_without_a_cache_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_log: DataLog
) -> None:
    save(tmp_path / "set" / "a" / "1.png", 100)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reds(load(tmp_path / "set")) == [100]
    assert "images are resized again next time" in data_log()[0]


@pytest.mark.parametrize("name", ["²", "٣", "9" * 200, "a b", "1.2.3", "%s", "$x$", "_"])
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / f"{name}.png", 100)
    images = load(tmp_path)
    assert (images.label_names, reds(images)) == ([name], [100])


def test_a_class_name_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) / "1.png")
    (name,) = load(tmp_path).label_names
    assert name.encode() == "caf\N{REPLACEMENT CHARACTER}".encode()


def test_an_image_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    path = tmp_path / "a" / "1.png"
    path.symlink_to("/nowhere/1.png")
    with pytest.raises(DataError, match=r"a/1.png cannot be read: No such file"):
        load(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(DataError, match=r"a/1.png cannot be read: Too many"):
        load(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"a/1.png must be a regular file"):
        load(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"a/1.png must be a regular file"):
        load(tmp_path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        with pytest.raises(DataError, match=r"a/1.png must be a regular file"):
            load(tmp_path)


def test_a_pipe_that_is_not_an_image_is_passed_over(tmp_path: Path, data_log: DataLog) -> None:
    save(tmp_path / "a" / "0.png")
    os.mkfifo(tmp_path / "a" / "control")
    os.mkfifo(tmp_path / "control")
    assert len(load(tmp_path).images) == 1
    assert "1 outside of a class" in data_log()[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b" / "0.png")
    (tmp_path / "a" / "b").chmod(0)
    try:
        with pytest.raises(DataError, match=r"a/b cannot be read as a folder: Permission denied"):
            load(tmp_path)
    finally:
        (tmp_path / "a" / "b").chmod(0o700)


def test_a_folder_that_fails_to_list_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a" / "0.png")

    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", broken)
    with pytest.raises(DataError, match=r"cannot be read as a folder: Input/output error"):
        load(tmp_path)


def test_linked_folders_are_followed_once(tmp_path: Path, data_log: DataLog) -> None:
    save(tmp_path / "elsewhere" / "0.png", 5)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert reds(load(tmp_path / "set")) == [5]
    assert "1 links to a folder that they are in" in data_log()[0]


def test_a_bomb_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a" / "0.png", size=(20, 20))
    for most in (399, 199):  # Pillow warns from one on, and refuses from twice that on
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(DataError, match=r"a/0.png cannot be read as an image: .* bomb"):
            load(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert len(load(tmp_path).images) == 1


def test_a_root_without_classes_says_what_it_should_hold(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"one sub-folder per class.*1 outside of a class"):
        load(tmp_path)
    for root in (tmp_path / "nothing", tmp_path / "0.png", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="holds no images: data.name=folder takes"):
            load(root)


def test_the_limit_is_even_over_classes_of_one_size(tmp_path: Path) -> None:
    for place, name in enumerate("abc"):
        for i in range(8):
            save(tmp_path / name / f"{i}.png", 10 * place + i)
    images = load(tmp_path, limit=16)
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [6, 5, 5]
    assert reds(images) == [*range(6), *range(10, 15), *range(20, 25)]
