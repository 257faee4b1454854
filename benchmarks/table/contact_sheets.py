"""The images on a table's page: the samples of every method from the same noise, the best method's,
and real images.
"""

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
from train.evaluation.rows import ROWS

_COLUMNS = 12
_NOT_PASSED_ON = ("celeba_hq",)  # its terms allow no copies of the images
_PIXELS = 48  # the least height of an image on a contact sheet


def write(
    folder: Path, name: str, config: Config, measured: Measurement, evaluation: Evaluation
) -> list[str]:
    """Write `NAME-methods-STEPS.png`, `NAME-images.png` and, where the images may be passed on,
    `NAME-real.png`; returns the files' names.
    """
    middle = shown_steps(evaluation)
    samples = {
        (spec.method.name, spec.steps): measured.samples(spec).images
        for spec in measured.shown_specs()
    }
    files = []
    for steps in sorted({evaluation.steps[0], middle}):
        methods = evaluation.methods_at(steps)
        rows = {method: samples[method, steps][:_COLUMNS] for method in methods}
        files.append(f"{name}-methods-{steps}.png")
        save(folder / files[-1], _labelled(rows), dpi=100)
    shown = samples[shown_method(evaluation), middle][: 8 * _COLUMNS]
    sheets = {f"{name}-images.png": shown}
    if config.data.name not in _NOT_PASSED_ON:
        sheets[f"{name}-real.png"] = _real(config, measured)
    for file, images in sheets.items():
        write_png(folder / file, contact_sheet(images.split(_COLUMNS), _PIXELS))
        files.append(file)
    return files


def _real(config: Config, measured: Measurement) -> Tensor:
    """Real images, chosen at random."""
    images = measured.cut.all(config.folder / "partition")["images"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[: 4 * _COLUMNS]]


def shown_steps(evaluation: Evaluation) -> int:
    """The number of steps of the images on the page: the closest to 25."""
    return min(evaluation.steps, key=lambda n: abs(n - 25))


def best_single(evaluation: Evaluation, steps: int, features: str, sampler: str) -> str | None:
    """The routed method with one expert per step and the smallest Fréchet distance; None if none
    was measured.
    """

    def distance(method: str) -> float:
        found = evaluation.over_seeds(
            method, steps, lambda cell: cell.scores[features].frechet, sampler
        )
        assert found is not None
        return found.mean

    measured = [method for method in evaluation.methods_at(steps) if ROWS[method].routed_one]
    return min(measured, key=distance, default=None)


def shown_method(evaluation: Evaluation) -> str:
    """The method whose images are on the page: the best, by the first features and sampler."""
    features = next(iter(evaluation.features))
    sampler = next(iter(evaluation.samplers))
    best = best_single(evaluation, shown_steps(evaluation), features, sampler)
    return best or evaluation.methods_at(shown_steps(evaluation))[0]


def _labelled(rows: Mapping[str, Tensor]) -> Figure:
    """One row of images per method, labelled with its name."""
    sheet = contact_sheet(list(rows.values()), _PIXELS)
    height, width = sheet.shape[1:]
    figure, axes = plt.subplots(figsize=(width / 100, height / 100))
    image = sheet.permute(1, 2, 0).squeeze(2).numpy()
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    centres = [(i + 0.5) * height / len(rows) for i in range(len(rows))]
    axes.set_yticks(centres, list(rows))
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure
