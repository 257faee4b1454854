"""The images that a table's page shows: what every method drew from the same noise, the best method's, and real ones."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from serve.model.images import contact_sheet, write_png
from train.config import Config
from train.evaluation.measure import Measurement
from train.evaluation.plots import save
from train.evaluation.results import Evaluation

_COLUMNS = 12
_SINGLE = ("MoG-a", "MoG-da", "balanced", "balanced-cv", "top-1")  # routed, one expert a step


def write(
    folder: Path, name: str, config: Config, measured: Measurement, evaluation: Evaluation
) -> list[str]:
    """Write `NAME-methods-STEPS.png`, `NAME-images.png` and `NAME-real.png`; returns the files' names."""
    few, middle = evaluation.steps[0], shown_steps(evaluation)
    drawn = {
        (draw.method.name, draw.steps): measured.drawn(draw).images
        for draw in measured.first_draws()
    }
    made = []
    for steps in sorted({few, middle}):
        rows = {method: drawn[method, steps][:_COLUMNS] for method in evaluation.versions}
        save(folder / f"{name}-methods-{steps}.png", _labelled(rows), dpi=100)
        made.append(f"{name}-methods-{steps}.png")
    write_png(
        folder / f"{name}-images.png",
        contact_sheet(drawn[shown_method(evaluation), middle][: 8 * _COLUMNS].split(_COLUMNS), 48),
    )
    whole = measured.cut.all(config.folder / "partition")
    any_real = torch.randperm(len(whole["images"]), generator=torch.Generator().manual_seed(0))[
        : 4 * _COLUMNS
    ]
    write_png(
        folder / f"{name}-real.png", contact_sheet(whole["images"][any_real].split(_COLUMNS), 48)
    )
    return [*made, f"{name}-images.png", f"{name}-real.png"]


def shown_steps(evaluation: Evaluation) -> int:
    """The number of steps of the images that are shown: the nearest to 25."""
    return min(evaluation.steps, key=lambda n: abs(n - 25))


def best(evaluation: Evaluation, steps: int, features: str, sampler: str) -> str | None:
    """The routed method of one expert a step with the smallest Frechet distance; None where none was measured."""

    def distance(method: str) -> float:
        found = evaluation.over_seeds(
            method, steps, lambda cell: cell.scores[features].frechet, sampler
        )
        assert found is not None
        return found.mean

    return min(
        (method for method in evaluation.versions if method in _SINGLE), key=distance, default=None
    )


def shown_method(evaluation: Evaluation) -> str:
    """The method whose images are shown: the best, by the first features and sampler."""
    features, sampler = next(iter(evaluation.features)), next(iter(evaluation.samplers))
    return best(evaluation, shown_steps(evaluation), features, sampler) or next(
        iter(evaluation.versions)
    )


def _labelled(rows: Mapping[str, Tensor]) -> Figure:
    """One row of images a method, with its name beside it."""
    sheet = contact_sheet(list(rows.values()), 48)
    high, wide = sheet.shape[1:]
    figure, axes = plt.subplots(figsize=(wide / 100, high / 100))
    axes.imshow(
        sheet.permute(1, 2, 0).squeeze(2).numpy(),
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
    )
    axes.set_yticks([(i + 0.5) * high / len(rows) for i in range(len(rows))], list(rows))
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure
