"""Image files resized once, and kept in the user's cache folder."""

import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddm.artifacts import digest, read_artifact, write_artifact
from ddm.errors import ArtifactError
from train.data.decoding import DECODER, Decoded, decode
from train.data.image_files import Tally
from train.progress import bar

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ddm`, or `~/.cache/ddm`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(base) / "ddm"


def resized(files: Sequence[Path], size: int) -> tuple[Tensor, Tally]:
    """The images of files, uint8 `[N, 3, size, size]`, and notes on how they were read.

    They are kept in the cache folder by the files' paths, sizes and times of change and by the
    version of the decoder. Raises `DataError` naming the first file that cannot be read.
    """
    stem = cache_folder() / f"images-{_key(files, size)}"
    cached = _cached(stem)
    if cached is not None:
        return cached
    images, notes = _decoded(files, size)
    facts = {"notes": [[note, n, notes.examples[note]] for note, n in notes.counts.items()]}
    try:
        write_artifact(stem, {"images": images}, facts)
    except (ArtifactError, OSError) as error:
        log.warning("%s cannot be written (%s): images are resized again next time", stem, error)
    return images, notes


def _key(files: Sequence[Path], size: int) -> str:
    listing = []
    for path in files:
        status = path.stat()
        listing.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return digest([DECODER, size, listing])[:24]


def _cached(stem: Path) -> tuple[Tensor, Tally] | None:
    if not stem.with_suffix(".json").exists():
        return None
    notes = Tally()
    try:
        tensors, facts = read_artifact(stem)
        for note, count, example in facts["notes"]:
            notes.add(note, example, count)
        return tensors["images"], notes
    except (ArtifactError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): images are resized again", stem, error)
        return None


def _decoded(files: Sequence[Path], size: int) -> tuple[Tensor, Tally]:
    notes = Tally()
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(path: Path) -> Decoded:
        return decode(path, size)

    with (
        warnings.catch_warnings(),
        bar(f"images to {size} x {size}", len(files)) as advance,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for place, (path, decoded) in enumerate(zip(files, pool.map(read, files), strict=True)):
            images[place] = decoded.pixels
            for note in decoded.notes:
                notes.add(note, path)
            advance()
    return images, notes
