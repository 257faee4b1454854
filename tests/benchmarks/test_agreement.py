"""Whether the same seed shows the same image at few steps and at many."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.agreement import agreement, main
from train.evaluation.feature_network import FeatureNetwork


class Bright(nn.Module):
    """The class is whether an image is bright."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images.float().mean(dim=(1, 2, 3))
        return mean[:, None], torch.stack([127 - mean, mean - 127], dim=1)


def test_agreement_is_the_fraction_of_the_same_class_and_the_difference_of_pixels() -> None:
    few = torch.tensor([0, 10, 200, 250]).to(torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    many = torch.tensor([0, 200, 200, 199]).to(torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    network = FeatureNetwork("bright", "", Bright(), rgb=False, device="cpu")
    found = agreement(few, many, network)
    assert found.same_class == 0.75
    assert found.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert found.difference == pytest.approx(((190**2 + 51**2) / 4) ** 0.5 / 255)


def test_the_same_number_of_steps_shows_the_same_images(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_run), "stochastic", "fixed", "sampler=ddim", "--n=6", "--seed=5"]
    assert main([*words, "--steps", "3", "3"]) == 0
    text = capsys.readouterr().out
    assert "6 images of seed 5 at 3 and 3 steps; sampler=ddim grid=" in text
    for policy in ("stochastic", "fixed"):
        assert f"| {policy} | 100.0 ± 0.0 % | 0.000 |" in text
    assert "balanced" not in text
    assert main([*words, "--steps", "1", "30"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "| fixed |" in line)
    assert float(line.split("|")[3]) > 0.001
