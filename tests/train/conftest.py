"""Fixtures and computations that several tests of `train` use."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where resized images are kept, of this test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ddm"


@pytest.fixture
def data_log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """`data_log()`: what the loading of images has logged in this test."""
    caplog.set_level(logging.INFO)
    return lambda: [
        record.getMessage() for record in caplog.records if record.name.startswith("train.data")
    ]


class Means(torch.nn.Module):
    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, self.side).flatten(1)


@pytest.fixture
def script_file() -> Callable[..., Path]:
    """`script_file(path, side=4)`: a TorchScript file; features are means of squares of a side."""

    def written(path: Path, side: int = 4) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pytest.warns(Warning, match="torch.jit"):
            torch.jit.script(Means(side)).save(path)
        return path

    return written


@pytest.fixture
def means(tmp_path: Path, script_file: Callable[..., Path]) -> Path:
    """A TorchScript file whose features are the means of an image's quarters."""
    return script_file(tmp_path / "means.pt")


def means_of(images: torch.Tensor, side: int = 4) -> np.ndarray:
    """The features of `script_file` by numpy, `[N, d]`; networks see grey images as RGB."""
    n, channels, height, width = images.shape
    squares = (
        images.double().numpy().reshape(n, channels, height // side, side, width // side, side)
        / 255
    )
    return np.broadcast_to(
        squares.mean(axis=(3, 5)), (n, 3, height // side, width // side)
    ).reshape(n, -1)


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """`|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` of two (mean, covariance)."""
    (m1, s1), (m2, s2) = a, b
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features `[N, d]`."""
    return features.mean(axis=0), np.cov(features, rowvar=False)
