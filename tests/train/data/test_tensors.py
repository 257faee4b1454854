"""`data.name=tensors`: one file of images, mapped."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddm.errors import DataError
from train.data import DataConfig, ImageSet

IMAGES = torch.arange(10 * 3 * 16).reshape(10, 3, 4, 4).to(torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 4])


def load(path: Path, limit: int | None = None) -> ImageSet:
    return DataConfig(name="tensors", root=str(path), limit=limit).build()


def saved(path: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_images_and_labels_are_those_of_the_file_also_after_release(tmp_path: Path) -> None:
    found = load(saved(tmp_path / "set", images=IMAGES, labels=LABELS, other=LABELS + 1))
    for _ in range(2):
        assert torch.equal(found.images, IMAGES)
        found.release()
    assert found.labels is not None
    assert torch.equal(found.labels, LABELS)
    assert found.label_names == ["0", "1", "2", "3", "4"]
    assert found.hash == ImageSet(IMAGES, LABELS).hash


def test_a_limit_keeps_the_classes(tmp_path: Path) -> None:
    found = load(saved(tmp_path / "set", images=IMAGES, labels=LABELS), 5)
    assert found.labels is not None
    assert sorted(found.labels.unique().tolist()) == [0, 1, 2, 4]
    alone = load(saved(tmp_path / "alone", images=IMAGES), 3)
    assert alone.labels is None
    assert torch.equal(alone.images, IMAGES[:3])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"labels": LABELS}, "must hold the tensor images, uint8 [N, C, H, W]"),
        ({"images": IMAGES.long()}, "must hold the tensor images, uint8 [N, C, H, W]"),
        ({"images": IMAGES.float()}, "images is {'data_offsets': [0, 1920], 'dtype': 'F32'"),
        ({"images": IMAGES[0]}, "must hold the tensor images, uint8 [N, C, H, W]"),
        ({"images": IMAGES, "labels": LABELS[1:]}, "must hold labels of at least 0, one for each"),
        ({"images": IMAGES, "labels": LABELS - 1}, "must hold labels of at least 0, one for each"),
    ],
)
def test_tensors_of_another_kind_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], said: str
) -> None:
    path = saved(tmp_path / "set", **tensors)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{re.escape(said)}"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set is missing: data.name=tensors takes a safetensors"):
        load(tmp_path / "set")
    whole = saved(tmp_path / "set", images=IMAGES).read_bytes()
    for content in (b"", b"abc", b"\0" * 100, whole[:20], whole[:200]):
        (tmp_path / "set").write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / 'set'))}"):
            load(tmp_path / "set")
