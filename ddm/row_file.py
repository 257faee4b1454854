"""Safetensors files that are written a few rows at a time, so that they may be larger than the memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.artifacts import replaced

Release = Callable[[], object]  # gives the memory of a mapped file back, after some of it was read

# Rows that are read at a time: those of a mapped file may each bring a megabyte of their neighbours.
CHUNK = 128
_DTYPES = {torch.int64: "I64", torch.uint8: "U8"}  # in the order of a file: the most aligned first


class Rows(NamedTuple):
    """A tensor of a file: int64 or uint8, its shape, and its rows, several at a time."""

    dtype: torch.dtype
    shape: Sequence[int]
    parts: Iterable[Tensor]


def write_streamed(path: Path, tensors: Mapping[str, Rows]) -> None:
    """Write tensors, whole or not at all: byte for byte the file of `write_tensors`.

    Raises `ArtifactError` naming a file that cannot be written.
    """
    order = sorted(tensors, key=lambda name: ([*_DTYPES].index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in order:
        dtype, shape, _ = tensors[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as scratch, scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in tensors[name].parts:
                assert part.dtype == tensors[name].dtype
                file.write(part.contiguous().numpy().tobytes())
        assert file.tell() == 8 + len(text) + end


def write_rows(
    path: Path, tensors: Mapping[str, Tensor], rows: Tensor, release: Release = lambda: None
) -> None:
    """Write `rows` (int64 `[n]`) of tensors, as `write_streamed`; `release` is called after every few."""

    def parts(tensor: Tensor) -> Iterator[Tensor]:
        for some in rows.split(CHUNK):
            yield tensor[some]
            release()

    streams = {
        name: Rows(tensor.dtype, [len(rows), *tensor.shape[1:]], parts(tensor))
        for name, tensor in tensors.items()
    }
    write_streamed(path, streams)
