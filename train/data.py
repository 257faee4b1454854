"""The data sets: real images as one uint8 tensor, with whatever labels or attributes they come with."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddm.artifacts import digest, read_tensors, write_tensors
from ddm.errors import DataError, require
from train.progress import bar

log = logging.getLogger(__name__)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_CELEBA_ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"


@dataclass
class DataConfig:
    """Which images: the set's name, where it lies, the side in pixels, and how many of them."""

    name: Literal["digits", "cifar10", "celeba_hq", "folder"] = "digits"
    root: str = "data"
    size: int = 64  # side in pixels for celeba_hq and folder; digits are 8, cifar10 is 32
    limit: int | None = None  # take only the first so many
    flip: bool = False  # mirror images at random in training
    download: bool = False  # cifar10 only: fetch it where it is missing

    def check(self) -> None:
        """Raise `ConfigError` naming the key `data.…` of a value out of its range."""
        require(self.size >= 4, "data.size", "be at least 4 pixels", self.size)
        require(
            self.limit is None or self.limit >= 1,
            "data.limit",
            "be at least 1, or null for all",
            self.limit,
        )

    def build(self) -> "ImageSet":
        """Load the images. Raises `DataError` saying what is missing and how to get it, or which image is corrupt."""
        match self.name:
            case "digits":
                return _digits(self)
            case "cifar10":
                return _cifar10(self)
            case "celeba_hq":
                return _celeba_hq(self)
            case "folder":
                return _folder(self)


@dataclass(frozen=True)
class ImageSet:
    """`images` uint8 `[N, C, H, W]`; `labels` int64 `[N]` and their names; `attributes` bool `[N, A]` and their names."""

    images: Tensor
    labels: Tensor | None = None
    label_names: Sequence[str] = ()
    attributes: Tensor | None = None
    attribute_names: Sequence[str] = ()

    @property
    def hash(self) -> str:
        """The content hash of images, labels and attributes."""
        parts = [self.images, self.labels, self.attributes]
        return digest([None if p is None else [list(p.shape), _digest_bytes(p)] for p in parts])


def _digest_bytes(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _digits(config: DataConfig) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    return ImageSet(
        images[: config.limit],
        torch.from_numpy(digits.target)[: config.limit].long(),
        [str(d) for d in range(10)],
    )


def _cifar10(config: DataConfig) -> ImageSet:
    from torchvision.datasets import CIFAR10

    try:
        train = CIFAR10(config.root, train=True, download=config.download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"CIFAR-10 is not in {config.root}, or is damaged ({error}): put cifar-10-batches-py there, or let torchvision "
            "fetch it with data.download=true"
        ) from error
    images = torch.from_numpy(train.data[: config.limit]).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(train.targets[: config.limit]), train.classes)


def _celeba_hq(config: DataConfig) -> ImageSet:
    root = Path(config.root)
    root = root / "celeba_hq" if (root / "celeba_hq").is_dir() else root
    listing = root / _CELEBA_ATTRIBUTES
    folder = next(
        (root / name for name in ("images", "CelebA-HQ-img") if (root / name).is_dir()), None
    )
    if folder is None or not listing.is_file():
        raise DataError(
            f"CelebA-HQ is not in {root}: put its images into {root}/images (or CelebA-HQ-img) and {_CELEBA_ATTRIBUTES} beside "
            "them, as CelebAMask-HQ is distributed; any resolution will do"
        )
    _count, header, *rows = listing.read_text().splitlines()
    names = header.split()
    facts = dict(row.split(maxsplit=1) for row in rows if row.strip())
    files = [
        path
        for path in _image_files(folder)
        if path.name in facts or path.with_suffix(".jpg").name in facts
    ][: config.limit]
    if not files:
        raise DataError(f"{folder} holds no image that {listing} lists")
    values = [facts.get(path.name) or facts[path.with_suffix(".jpg").name] for path in files]
    attributes = torch.tensor([[value == "1" for value in row.split()] for row in values])
    return ImageSet(
        _resized(files, config.size, root / "cache"), attributes=attributes, attribute_names=names
    )


def _folder(config: DataConfig) -> ImageSet:
    root = Path(config.root)
    classes = (
        sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "cache")
        if root.is_dir()
        else []
    )
    files = [path for name in classes for path in _image_files(root / name)]
    if not files:
        raise DataError(
            f"{root} holds no images: data.name=folder takes one sub-folder a class, with PNG, JPEG or WebP files in it"
        )
    if config.limit is not None:  # evenly over the classes
        files = files[:: max(1, len(files) // config.limit)][: config.limit]
    labels = torch.tensor([classes.index(path.parent.name) for path in files])
    return ImageSet(_resized(files, config.size, root / "cache"), labels, classes)


def _image_files(folder: Path) -> list[Path]:
    """The images in a folder, in the order of their numbers where their names are numbers."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    return sorted(files, key=lambda path: (int(path.stem) if path.stem.isdigit() else 0, path.name))


def _resized(files: list[Path], size: int, cache: Path) -> Tensor:
    """The images at `size` x `size`, cut to a square about the middle; made once and kept in the folder `cache`."""
    listing = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    cached = cache / f"{size}-{digest(listing)[:16]}.safetensors"
    if cached.is_file():
        return read_tensors(cached)["images"]
    with bar(f"images to {size} x {size}", len(files)) as advance, ThreadPoolExecutor() as pool:
        images = torch.stack(list(pool.map(_reader(size, advance), files)))
    try:
        write_tensors(cached, {"images": images})
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): the images will be resized again next time", cached, error
        )
    return images


def _reader(size: int, advance: Callable[[], None]) -> Callable[[Path], Tensor]:
    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").resize(
                    (size, size),
                    Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC,
                    (left, top, left + side, top + side),
                )
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} is no image that can be read: {error}") from error
        advance()
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    return read
