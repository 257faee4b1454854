"""Safetensors files that are mapped, not read: they may be larger than the memory."""

import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.errors import DataError, shown
from ddm.row_file import Release

_MAX_HEADER_BYTES = 2**20
_DTYPES = {"U8": torch.uint8, "I64": torch.int64}


def mapped(path: Path) -> tuple[dict[str, Tensor], Release]:
    """The uint8 and int64 tensors of a file, to be read only, and what gives their memory back.

    Raises `DataError` naming the file if it is not of safetensors, or holds others.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = _header(path, file.read(min(size, _MAX_HEADER_BYTES)))
        # Private: torch asks for memory that it may write to, and nothing written here reaches the file.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    facts = {name: value for name, value in header.items() if name != "__metadata__"}
    tensors = {name: _tensor(path, name, facts[name], content, 8 + size) for name in facts}

    def release() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            content.madvise(mmap.MADV_DONTNEED)

    return tensors, release


def _header(path: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise DataError(f"{path} is not a safetensors file: its header is {shown(header)}")
    return header


def _tensor(path: Path, name: str, facts: Any, content: mmap.mmap, start: int) -> Tensor:
    try:
        dtype, shape = _DTYPES[facts["dtype"]], [int(side) for side in facts["shape"]]
        first, last = facts["data_offsets"]
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(content, dtype=dtype, count=count, offset=start + first).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: {name} is {shown(facts)}, which cannot be read ({reason})"
        ) from error
