"""A safetensors file written some rows at a time, so that it may be larger than the memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ddm.artifacts import replaced

_CHUNK_BYTES = 2**24
# In the order of a file: safetensors puts the most aligned first.
_DTYPES = {torch.int64: "I64", torch.uint8: "U8"}


def write_rows(
    path: Path,
    tensors: Mapping[str, Tensor],
    rows: Tensor,
    release: Callable[[], object] = lambda: None,
) -> None:
    """Write `rows` (int64 `[n]`) of tensors (int64 or uint8), whole or not at all.

    The file is, byte for byte, that of `write_tensors` for `tensor[rows]`. `release` is called after
    every few rows, to give the memory of mapped sources back.

    Raises `ArtifactError` naming a file that cannot be written.
    """
    order = sorted(tensors, key=lambda name: ([*_DTYPES].index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + len(rows) * _row_bytes(tensor)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": [len(rows), *tensor.shape[1:]],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replaced(path) as scratch, scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            count = max(1, _CHUNK_BYTES // max(1, _row_bytes(tensor)))
            for some in rows.split(count):
                file.write(tensor[some].numpy().tobytes())
                release()


def _row_bytes(tensor: Tensor) -> int:
    return tensor[:1].numel() // max(1, len(tensor[:1])) * tensor.element_size()
