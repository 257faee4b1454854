"""The bundle of digits that comes with the program."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from ddm.errors import ArtifactError
from serve import load
from serve.model.loading import bundle_folder
from serve.settings import settings


def test_the_demo_samples_digits_of_the_clusters_asked_for() -> None:
    model = load("demo")
    real = load_digits()
    pixels = torch.from_numpy(real.data / 8 - 1).float()
    for digits in ((0, 1), (6, 7)):
        name = f"{digits[0]} + {digits[1]}"
        samples = model.sample(32, steps=10, clusters=[name]).flatten(1)
        nearest = torch.cdist(samples, pixels).argmin(dim=1)
        right = sum(int(real.target[place]) in digits for place in nearest.tolist())
        assert right >= 26, name


def test_the_demo_is_small_and_runs_in_float32() -> None:
    folder = bundle_folder("demo")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    assert {p.dtype for p in load("demo").experts[0].parameters()} == {torch.float32}


def test_a_folder_of_the_user_named_demo_is_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(ArtifactError, match=r"demo/manifest.json is missing"):
        load("demo")


def test_the_demo_is_served_by_its_name() -> None:
    assert settings({"run": "demo"}).name() == "demo"
