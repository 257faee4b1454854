"""Figures with the names that a user's clusters may have."""

import re
from pathlib import Path

import pytest
import torch

from train.evaluation import plots
from train.evaluation.samples import SampleSet

NAMES = ["$x$", "_private", "a^b$", r"\\frac{", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]


@pytest.fixture
def samples() -> SampleSet:
    steps, images, k = 3, 8, len(NAMES)
    alpha = torch.full((steps, images, k), 1 / k)
    chosen = torch.zeros(steps, images, k, dtype=torch.uint8)
    chosen[:, :, 1] = 1
    return SampleSet(
        images=torch.zeros(images, 1, 4, 4, dtype=torch.uint8),
        ends=torch.zeros(0, 1, 4, 4),
        t=torch.tensor([1.0, 0.6, 0.3]),
        load=chosen.float().mean(dim=1),
        certainty=alpha.amax(dim=2).mean(dim=1),
        alpha=alpha,
        chosen=chosen,
        nfe=3.0,
    )


def shown(text: str) -> str:
    return re.sub(r"\\\$", "$", text).strip()


def test_cluster_names_are_shown_as_they_are(samples: SampleSet, tmp_path: Path) -> None:
    load = plots.load({"Naive": samples}, NAMES, [0.2] * 5)
    ticks = [shown(label.get_text()) for label in load.axes[0].get_xticklabels()]
    assert ticks == NAMES
    over_time = plots.alpha_over_time(samples, NAMES)
    assert [shown(text.get_text()) for text in over_time.legends[0].get_texts()] == NAMES
    for place, figure in enumerate((load, over_time)):
        plots.save(tmp_path / f"{place}.png", figure)


def test_the_load_is_the_fraction_of_all_nfe(samples: SampleSet) -> None:
    (axes,) = plots.load({"Naive": samples}, NAMES, [0.5, 0.2, 0.1, 0.1, 0.1]).axes
    pi, naive = ([bar.get_height() for bar in group] for group in axes.containers)
    assert pi == [0.5, 0.2, 0.1, 0.1, 0.1]
    assert naive == [0, 1, 0, 0, 0]
