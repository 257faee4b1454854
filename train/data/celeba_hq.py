"""CelebA-HQ: one folder of images, and a list of their attributes."""

import os
from pathlib import Path

import torch

from ddm.errors import DataError
from train.data.folder import log_read
from train.data.image_files import Tally, find_images, image_suffixes
from train.data.image_set import ImageSet
from train.data.resized import resized

LIST = "CelebAMask-HQ-attribute-anno.txt"

# What lists call the column of the images, if they name it.
_NAME_COLUMN = {
    "", "file", "file_name", "filename", "id", "idx", "image", "image_id", "image_name", "img",
    "img_id", "index", "name", "path",
}  # fmt: skip
_VALUES = {"1": True, "0": False, "-1": False}


def load_celeba_hq(root: str, size: int, limit: int | None) -> ImageSet:
    """The images that the list has a row for, `size` x `size`, or the first `limit` of them.

    Raises `DataError` if files are missing, or naming the file, and the line of the list, that
    cannot be read.
    """
    base = Path(root)
    if os.path.isdir(base / "celeba_hq"):
        base = base / "celeba_hq"
    folders = [base / name for name in ("images", "CelebA-HQ-img") if os.path.isdir(base / name)]
    if not folders or not (base / LIST).is_file():
        raise DataError(
            f"CelebA-HQ is not in {base}: put its images into {base}/images (or CelebA-HQ-img) and "
            f"{LIST} beside them, as CelebAMask-HQ is distributed; any resolution will do"
        )
    attributes = AttributeList(base / LIST)
    passed_over = Tally()
    files = attributes.listed(find_images(folders[0], passed_over), passed_over)
    if not files:
        raise DataError(f"{folders[0]} holds no image that {base / LIST} lists")
    images, notes, release = resized(files[:limit], size)
    log_read(len(images), len(files), folders[0], passed_over, notes)
    rows = torch.tensor([attributes.rows[_stem(path.name)] for path in files[:limit]])
    names = attributes.names
    return ImageSet(images, attributes=rows, attribute_names=names, release=release)


class AttributeList:
    """A list of attributes: an optional line with their number of rows, a header, and the rows.

    Columns are separated by spaces, tabs, commas or semicolons. The header may name the column of
    the images. Values are 1 and -1, or 1 and 0. `names` are the attributes, `rows` their values
    by the image's name without a suffix. Raises `DataError` naming the file and the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [(n, line) for n, line in enumerate(_lines(path), start=1) if line.strip()]
        count = int(lines.pop(0)[1]) if lines and lines[0][1].strip().isdecimal() else None
        if not lines:
            raise DataError(f"{path} must hold a header and one row per image: it is empty")
        number, header = lines[0]
        self.separator = next((mark for mark in ",;" if mark in header), None)
        self.names = self._header(number, header, lines[1:2])
        self.rows: dict[str, list[bool]] = {}
        self._read_rows(lines[1:])
        if count is not None and count != len(self.rows):
            raise DataError(
                f"{path}, line 1: says {count} rows, and {len(self.rows)} follow: "
                "restore the rows, or take the line out"
            )

    def listed(self, files: list[Path], passed_over: Tally) -> list[Path]:
        """The files that have a row; the others, and rows without a file, are counted."""
        found: dict[str, Path] = {}
        for path in files:
            stem = _stem(path.name)
            if stem not in self.rows:
                passed_over.add(f"without a row in {self.path.name}", path)
            elif stem in found:
                raise DataError(f"{path} and {found[stem]} both belong to the row {stem}")
            else:
                found[stem] = path
        missing = next((stem for stem in self.rows if stem not in found), None)
        passed_over.add("rows without an image", missing, len(self.rows) - len(found))
        return list(found.values())

    def _header(self, number: int, line: str, first_row: list[tuple[int, str]]) -> list[str]:
        names = self._cells(line)
        if len(names) > 1 and set(names[1:]) <= _VALUES.keys():
            self._refuse(number, "must be the names of the attributes, and is a row")
        width = len(self._cells(first_row[0][1])) if first_row else len(names) + 1
        if names[0].lower() in _NAME_COLUMN and width == len(names):
            names = names[1:]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            self._refuse(number, f"names the attribute {repeated[0]!r} twice")
        return names

    def _read_rows(self, lines: list[tuple[int, str]]) -> None:
        first_line: dict[str, int] = {}
        negative: tuple[int, str] | None = None
        for number, line in lines:
            name, *values = self._cells(line)
            stem = _stem(name)
            if len(values) != len(self.names):
                self._refuse(
                    number, f"must hold a name and {len(self.names)} values, got {len(values)}"
                )
            if stem in first_line:
                self._refuse(number, f"{name} is already on line {first_line[stem]}")
            for value in values:
                if value not in _VALUES:
                    self._refuse(number, f"values must be 1 and -1, or 1 and 0, got {value!r}")
                if value != "1":
                    negative = negative or (number, value)
                    if value != negative[1]:
                        self._refuse(
                            number, f"has {value}, where line {negative[0]} has {negative[1]}"
                        )
            first_line[stem] = number
            self.rows[stem] = [_VALUES[value] for value in values]

    def _cells(self, line: str) -> list[str]:
        if self.separator is None:
            return line.split()
        return [cell.strip().strip('"') for cell in line.split(self.separator)]

    def _refuse(self, number: int, why: str) -> None:
        raise DataError(f"{self.path}, line {number}: {why}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error


def _stem(name: str) -> str:
    """A file's name without the suffix of an image."""
    path = Path(name)
    return path.stem if path.suffix.lower() in image_suffixes() else path.name
