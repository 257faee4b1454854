"""One safetensors file that holds all images; it is mapped, not read, so it may be larger than the memory."""

import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.errors import DataError, shown
from train.data.image_set import ImageSet, stratified

_MAX_HEADER_BYTES = 2**20
_DTYPES = {"U8": torch.uint8, "I64": torch.int64}


def load_tensors(root: str, limit: int | None) -> ImageSet:
    """The images of the file `root`: `images` uint8 `[N, C, H, W]` and, if it has them, `labels` int64 `[N]`, at least 0.

    With a limit, `limit` of them are read. Raises `DataError` naming a file that is not such a one.
    """
    path = Path(root)
    if not path.is_file():
        raise DataError(f"{root} is missing: data.name=tensors takes a safetensors file of images")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = _header(path, file.read(min(size, _MAX_HEADER_BYTES)))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = {
        name: _tensor(path, name, header.get(name), mapped, 8 + size) for name in ("images", "labels")
    }
    images, labels = found["images"], found["labels"]
    if images is None or images.dim() != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise DataError(f"{path} must hold the tensor images, uint8 [N, C, H, W], N at least 1")
    if labels is not None and (labels.shape != images.shape[:1] or labels.min() < 0):
        raise DataError(f"{path} must hold labels of at least 0, one for each of the images")
    names = [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)]
    if limit is not None and limit < len(images):
        groups = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        chosen = stratified(groups, limit)
        return ImageSet(images[chosen], None if labels is None else labels[chosen], names)

    def release() -> None:
        mapped.madvise(mmap.MADV_DONTNEED)  # nothing is ever written to the mapping

    return ImageSet(images, None if labels is None else labels.clone(), names, release=release)


def _header(path: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a safetensors file: its header is {shown(header)}")
    return header


def _tensor(path: Path, name: str, facts: Any, mapped: mmap.mmap, start: int) -> Tensor | None:
    """A view of the mapped file; None if there is no such tensor."""
    if facts is None:
        return None
    try:
        dtype, shape = _DTYPES[facts["dtype"]], [int(side) for side in facts["shape"]]
        first, last = facts["data_offsets"]
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + first).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: {name} is {shown(facts)}, which cannot be read ({reason})") from error
