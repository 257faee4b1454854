"""`benchmarks.clusters` from made-up images to its figures, on few."""

import re
from pathlib import Path

import pytest

from benchmarks.clusters import main
from train.data import DataConfig


@pytest.mark.parametrize("files", [[], ["--files"]])
def test_made_up_classes_are_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str]
) -> None:
    words = ["--images=400", "--classes=8", "--k=8", f"--folder={tmp_path}", "partition.fine=40"]
    assert main([*words, *files]) == 0
    shown = capsys.readouterr().out
    found = re.search(
        r"^400 images in 8 clusters: .* at most [\d.]+ GiB; .*ARI ([\d.]+)$", shown, re.M
    )
    assert found is not None
    assert float(found[1]) > 0.9
    file = tmp_path / "images-400-8.safetensors"
    made = DataConfig(name="tensors", root=str(file)).build()
    assert made.labels is not None
    assert list(made.images.shape) == [400, 3, 32, 32]
    if files:
        read = DataConfig(name="folder", root=str(file.with_suffix("")), size=32).build()
        assert made.images[made.labels.argsort(stable=True)].equal(read.images)
