"""What several tests of `train` need."""

from pathlib import Path

import pytest
import torch


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.fixture
def means(tmp_path: Path) -> Path:
    """A TorchScript file whose features are the means of a picture's quarters: a judge that needs no training."""
    with pytest.warns(Warning, match="torch.jit"):
        torch.jit.script(Means()).save(tmp_path / "means.pt")
    return tmp_path / "means.pt"
