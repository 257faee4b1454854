"""A folder with one sub-folder per class."""

import logging
import os
from pathlib import Path

import torch

from ddm.errors import DataError
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
