"""Image files resized once, and kept in the user's cache folder."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddm.artifacts import check_sha256, file_of, read_facts, sha256, write_json
from ddm.errors import ArtifactError, DdmError
from ddm.row_file import Release, Rows, write_streamed
from train.data.decoding import DECODER, Decoded, decode
from train.data.image_files import Tally
from train.data.mapped import mapped
from train.progress import bar

log = logging.getLogger(__name__)

_LARGE_BYTES = 2**28
_BATCH = 2048  # files that are decoded at a time


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ddm`, or `~/.cache/ddm`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(base) / "ddm"


class Resized(NamedTuple):
    """Images uint8 `[N, 3, size, size]`, notes on how they were read, and what gives their memory back."""

    images: Tensor
    notes: Tally
    release: Release = lambda: None


def resized(files: Sequence[Path], size: int) -> Resized:
    """The images of files.

    They are kept in the cache folder by the files' paths, sizes and times of change and by the version of
    the decoder, and mapped from there; those that take more than 256 MB are never all in memory if they can
    be kept. Raises `DataError` naming the first file that cannot be read.
    """
    stem = cache_folder() / f"images-{_key(files, size)}"
    cached = _cached(stem)
    if cached is not None:
        return cached
    notes, shape = Tally(), [len(files), 3, size, size]
    if torch.Size(shape).numel() > _LARGE_BYTES:
        try:
            _keep(stem, Rows(torch.uint8, shape, _decoded(files, size, notes)), notes)
            cached = _cached(stem)
        except (ArtifactError, OSError) as error:
            log.warning("%s cannot be written (%s): images are read into memory", stem, error)
        if cached is not None:
            return cached
        notes = Tally()
    images = torch.cat(list(_decoded(files, size, notes)))
    try:
        _keep(stem, Rows(torch.uint8, shape, [images]), notes)
    except (ArtifactError, OSError) as error:
        log.warning("%s cannot be written (%s): images are resized again next time", stem, error)
    return Resized(images, notes)


def _key(files: Sequence[Path], size: int) -> str:
    found = hashlib.sha256(f"[{DECODER}, {size}, [".encode())
    for place, path in enumerate(files):
        status = path.stat()
        entry = json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns])
        found.update(f"{', ' if place else ''}{entry}".encode())
    found.update(b"]]")
    return found.hexdigest()[:24]


def _keep(stem: Path, images: Rows, notes: Tally) -> None:
    weights = file_of(stem, ".safetensors")
    write_streamed(weights, {"images": images})
    facts = [[note, n, notes.examples[note]] for note, n in notes.counts.items()]
    write_json(file_of(stem, ".json"), {"notes": facts, "sha256": sha256(weights)})


def _cached(stem: Path) -> Resized | None:
    if not file_of(stem, ".json").exists():
        return None
    notes = Tally()
    try:
        facts = read_facts(stem)
        check_sha256(file_of(stem, ".safetensors"), facts["sha256"])
        for note, count, example in facts["notes"]:
            notes.add(note, example, count)
        tensors, release = mapped(file_of(stem, ".safetensors"))
        return Resized(tensors["images"], notes, release)
    except (DdmError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): images are resized again", stem, error)
        return None


def _decoded(files: Sequence[Path], size: int, notes: Tally) -> Iterator[Tensor]:
    """The images of a batch of files at a time; `notes` are added to."""

    def read(path: Path) -> Decoded:
        return decode(path, size)

    with (
        warnings.catch_warnings(),
        bar(f"images to {size} x {size}", len(files)) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(files), _BATCH):
            some = files[start : start + _BATCH]
            images = []
            for path, decoded in zip(some, pool.map(read, some), strict=True):
                images.append(decoded.pixels)
                for note in decoded.notes:
                    notes.add(note, path)
                advance()
            yield torch.stack(images)
