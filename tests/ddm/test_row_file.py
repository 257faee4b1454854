"""Files that are written some rows at a time are those of safetensors."""

from pathlib import Path

import pytest
import torch

from ddm import row_file
from ddm.artifacts import read_tensors, write_tensors
from ddm.row_file import write_rows


@pytest.mark.parametrize("rows", [[], [3], [0, 4, 2, 2], list(range(9))])
def test_the_bytes_are_those_of_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int]
) -> None:
    monkeypatch.setattr(row_file, "CHUNK", 3)
    index = torch.tensor(rows, dtype=torch.int64)
    tensors = {
        "images": torch.arange(9 * 12).reshape(9, 3, 2, 2).to(torch.uint8),
        "labels": torch.arange(9) * 2**40,
        "index": torch.arange(9),
    }
    calls: list[None] = []
    write_rows(tmp_path / "rows", tensors, index, lambda: calls.append(None))
    write_tensors(tmp_path / "whole", {name: tensor[index] for name, tensor in tensors.items()})
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(calls) >= 3
    assert torch.equal(read_tensors(tmp_path / "rows")["labels"], tensors["labels"][index])
