"""A folder with one sub-folder per class."""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ddm.errors import DataError
from ddm.row_file import CHUNK, Release
from train.data.image_files import Tally, entries, find_images, image_suffixes, is_hidden
from train.data.image_set import ImageSet, stratified
from train.data.resized import resized

log = logging.getLogger(__name__)


def load_folder(root: str, size: int, limit: int | None) -> ImageSet:
    """The images of every class, `size` x `size`, or `limit` of them.

    A class is a sub-folder that is not hidden; its images may lie in folders inside it.
    Raises `DataError` if there are none, or naming a file that cannot be read.
    """
    passed_over = Tally()
    folders = _class_folders(Path(root), passed_over)
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        of_class = find_images(folder, passed_over)
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        raise DataError(
            f"{root} holds no images: data.name=folder takes one sub-folder per class, with images "
            f"({' '.join(sorted(image_suffixes()))}) in it; passed over: {passed_over}"
        )
    chosen = stratified(torch.tensor(labels), limit)
    images, notes, release = resized([files[place] for place in chosen.tolist()], size)
    log_read(len(images), len(files), root, passed_over, notes)
    names = [_utf8(folder) for folder in folders]
    return ImageSet(images, torch.tensor(labels)[chosen], names, release=release)


def load_images(root: str, size: int, limit: int | None, grey: bool) -> ImageSet:
    """All images in a folder and the folders in it, `size` x `size`, or the first `limit` of them.

    If each lies in a sub-folder, these are their labels. `grey` images have one channel, others three.
    Raises `DataError` if there are none, or naming a file that cannot be read.
    """
    passed_over = Tally()
    found = find_images(Path(root), passed_over) if os.path.isdir(root) else []
    if not found:
        suffixes = " ".join(sorted(image_suffixes()))
        raise DataError(f"{root} holds no images ({suffixes}); passed over: {passed_over}")
    files = found[:limit]
    images, notes, release = resized(files, size)
    log_read(len(images), len(found), root, passed_over, notes)
    if grey:
        images, release = _grey(images, release), lambda: None
    inside = [file.relative_to(root).parts for file in files]
    if any(len(parts) == 1 for parts in inside):
        return ImageSet(images, release=release)
    names = sorted({parts[0] for parts in inside})
    labels = torch.tensor([names.index(parts[0]) for parts in inside])
    return ImageSet(images, labels, [_utf8(Path(name)) for name in names], release=release)


def _grey(images: Tensor, release: Release) -> Tensor:
    """Colour images as grey ones by ITU-R 601-2, a few at a time."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    parts = []
    for part in images.split(CHUNK):
        parts.append((part * weights).sum(dim=1, keepdim=True).round().to(torch.uint8))
        release()
    return torch.cat(parts)


def log_read(read: int, found: int, root: str | Path, passed_over: Tally, notes: Tally) -> None:
    """Log one line: how many images were read, which files were passed over, and why."""
    count = f"{read}" if read == found else f"{read} of {found}"
    read_how = f"; {notes}" if notes.counts else ""
    log.info("data       %s images of %s; passed over: %s%s", count, root, passed_over, read_how)


def _class_folders(root: Path, passed_over: Tally) -> list[Path]:
    if not os.path.isdir(root):
        return []
    folders = []
    for path in entries(root):
        if is_hidden(path.name):
            passed_over.add("hidden", path)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            passed_over.add("outside of a class", path)
    return folders


def _utf8(folder: Path) -> str:
    """A folder's name, with bytes that are not UTF-8 replaced: it goes into JSON and HTML."""
    return os.fsencode(folder.name).decode(errors="replace")
