"""Finding the image files of a folder, and counting what is passed over."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from ddm.errors import DataError

# Formats of still images that are recognised by their first bytes and decoded by Pillow itself:
# not TGA, which takes any bytes, and not EPS, which runs another program.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")

# Folders that systems and programs put beside images; some hold thumbnails of them.
_SYSTEM = {
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "Thumbs.db",
}


class Tally:
    """How many files something was noted of, by what was noted, with the first as an example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, note: str, example: object, count: int = 1) -> None:
        """Count `count` more files under a note."""
        if count > 0:
            self.counts[note] += count
            self.examples.setdefault(note, str(example))

    def __str__(self) -> str:
        notes = (f"{n} {note} ({self.examples[note]})" for note, n in self.counts.items())
        return ", ".join(notes) or "none"


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the formats that are read, in lower case with the dot."""
    Image.init()
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS
    )


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or the system's own, and neither an image nor a class."""
    return name.startswith(".") or name in _SYSTEM


def entries(folder: Path) -> list[Path]:
    """What a folder holds, by name. Raises `DataError` if it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read as a folder: {error.strerror}") from error


def find_images(folder: Path, passed_over: Tally) -> list[Path]:
    """The image files in a folder and the folders in it, those whose names are numbers by number.

    Everything else is counted in `passed_over`. Raises `DataError` naming a folder that cannot be
    listed, or a file that has the suffix of an image and is not a regular file that can be opened.
    """
    suffixes = image_suffixes()
    found = []
    for path in _files(folder, passed_over, ()):
        if is_hidden(path.name):
            passed_over.add("hidden", path)
        elif path.suffix.lower() not in suffixes:
            passed_over.add("of another type", path)
        else:
            _require_regular(path)
            found.append(path)
    return sorted(found, key=lambda path: (path.parent, _number(path.stem), path.name))


def require_regular_files(folder: Path) -> None:
    """Raise `DataError` naming a file in a folder whose reading might never end, if any."""
    if os.path.isdir(folder):
        for path in entries(folder):
            if not os.path.isdir(path):
                _require_regular(path)


def _files(folder: Path, passed_over: Tally, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:
        passed_over.add("links to a folder that they are in", folder)
        return
    for path in entries(folder):
        if not os.path.isdir(path):
            yield path
        elif is_hidden(path.name):
            passed_over.add("hidden folders", path)
        else:
            yield from _files(path, passed_over, (*above, here))


def _require_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} must be a regular file: it is a device, a pipe or a socket")


def _number(stem: str) -> int:
    return int(stem) if stem.isdecimal() else 0
