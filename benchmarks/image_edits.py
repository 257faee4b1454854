"""Editing real images: contact sheets to look at, and tables that say how well it works.

Inpainting: half of each image is hidden and sampled anew. Completions of real images have the law
of real images if they have the right one given what is kept, so that their Frechet distance to the
real images measures them; the first rows repeat no step. The same holds at every strength of img2img.
Inversion: the root mean square error of `sample(x=invert(images))` by the number of steps, its
median over the images and the largest.

RUN is a run's folder, or demo: the digits that come with the program, and those of scikit-learn, on
which they were trained. The sheets go to the folder of --out.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.agreement import classes
from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from ddm.errors import require
from ddm.partition import Partition
from ddm.training import to_float
from serve import Model, load
from serve.model.images import contact_sheet, to_uint8, write_png
from serve.model.loading import DEMO
from train.data.digits import load_digits
from train.evaluation.features import feature_networks
from train.evaluation.scores import Scores
from train.progress import bar

_FEATURE_SEED = 0  # the classifier is the one of `evaluate`
_RESAMPLED = ((25, 1), (25, 2), (25, 4), (10, 10), (25, 10))  # steps, resamplings
_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
_INVERTED = ("ddim", "heun", "dpmpp_2m", "ipndm")
_STEPS = (10, 25, 50, 100, 200)
_SHOWN = 12  # images in a row of a sheet
_SIDE = 48  # pixels of an image in a sheet, at least


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("image_edits", __doc__)
    parser.add_argument("run", nargs="?", default=DEMO, help="default demo")
    parser.add_argument("--n", type=int, default=500, help="images per figure; default 500")
    parser.add_argument("--inverted", type=int, default=32, help="images inverted; default 32")
    parser.add_argument("--out", type=Path, default=Path("runs/edits"), help="default runs/edits")
    return run(parser, _edit, words)


def _edit(arguments: argparse.Namespace) -> None:
    for name in ("n", "inverted"):
        count = getattr(arguments, name)
        require(count >= _SHOWN, f"--{name}", f"be at least {_SHOWN}", count)
    model = load(arguments.run)
    whole = _real(arguments.run)
    order = torch.randperm(
        len(whole["images"]), generator=torch.Generator().manual_seed(_FEATURE_SEED)
    )
    images = to_float(whole["images"][order[: arguments.n]])
    arguments.out.mkdir(parents=True, exist_ok=True)
    measure = _measure(whole, images, model)
    _inpainting(model, images, measure, arguments.out)
    _variations(model, images, measure, arguments.out)
    _inversion(model, images[: arguments.inverted], arguments.out)
    _interpolation(model, images, arguments.out)
    print(f"Contact sheets: {arguments.out}")


def _real(run: str) -> dict[str, Tensor]:
    if run == DEMO and not Path(run).exists():
        digits = load_digits(None)
        assert digits.labels is not None
        return {"images": digits.images, "labels": digits.labels, "cluster": digits.labels}
    folder = Path(run) / "partition"
    return Partition.read(folder).in_order(folder)


# Images in [-1, 1] -> the cells of a row: the distances, and the fraction named as the originals are.
Measure = Callable[[Tensor], list[str]]


def _measure(whole: dict[str, Tensor], originals: Tensor, model: Model) -> Measure:
    classifier, pixels = feature_networks(
        ["classifier", "pixels"], None, whole, _FEATURE_SEED, str(model.device)
    )
    scores = [
        (network, Scores(network(whole["images"], _unheard).features))
        for network in (classifier, pixels)
    ]
    named = classes(classifier, to_uint8(originals))

    def measure(images: Tensor) -> list[str]:
        shown = to_uint8(images)
        distances = [score.frechet(network(shown, _unheard).features) for network, score in scores]
        same = (classes(classifier, shown) == named).double().mean()
        return [*(f"{distance:.2f}" for distance in distances), f"{100 * same:.0f} %"]

    return measure


_MEASURES = ["Fréchet, classifier", "Fréchet, pixels", "named as the original"]


def _inpainting(model: Model, images: Tensor, measure: Measure, out: Path) -> None:
    """The lower half, or the right one, is hidden."""
    print("Inpainting of half an image\n")
    rows = [["the real images", "–", *measure(images)]]
    side = model.shape[-1]
    mask = torch.zeros(len(images), 1, side, side)
    mask[0::2, :, side // 2 :] = 1
    mask[1::2, :, :, side // 2 :] = 1
    sheet = [images, torch.where(mask > 0, torch.zeros_like(images), images)]
    with bar("inpainting", sum(s * r for s, r in _RESAMPLED) * len(images)) as advance:
        for steps, resamplings in _RESAMPLED:
            found = model.sample(
                image=images, mask=mask, steps=steps, resamplings=resamplings, progress=advance
            )
            sheet.append(found)
            name = f"{steps} steps, resamplings={resamplings}"
            rows.append([name, str(steps * resamplings), *measure(found)])
    print(table(["", "NFE per image", *_MEASURES], rows))
    print()
    _write(out / "inpainting.png", sheet)


def _variations(model: Model, images: Tensor, measure: Measure, out: Path) -> None:
    print("img2img, 25 steps\n")
    rows = []
    sheet = [images]
    with bar("img2img", 25 * len(_STRENGTHS) * len(images)) as advance:
        for strength in _STRENGTHS:
            found = model.sample(image=images, strength=strength, progress=advance)
            change = (found - images).square().mean().sqrt()
            sheet.append(found)
            rows.append([f"strength={strength:g}", f"{change:.2f}", *measure(found)])
    print(table(["", "rms change", *_MEASURES], rows))
    print()
    _write(out / "strength.png", sheet)


def _inversion(model: Model, images: Tensor, out: Path) -> None:
    print("Inverted and sampled again: rms error of a pixel in [-1, 1]\n")
    rows = []
    sheet = [images]
    with bar("inversion", 2 * sum(_STEPS) * len(_INVERTED) * len(images)) as advance:
        for sampler in _INVERTED:
            errors = []
            for steps in _STEPS:
                noise = model.invert(images, sampler=sampler, steps=steps, progress=advance)
                back = model.sample(
                    x=noise,
                    sampler=sampler,
                    steps=steps,
                    policy="full",
                    control_variate="none",
                    t_min=1e-3,
                    progress=advance,
                )
                error = (back - images).square().mean(dim=(1, 2, 3)).sqrt()
                errors.append(f"{error.median():.4f} ({error.max():.2f})")
                if sampler == "heun" and steps < _STEPS[-1]:
                    sheet.append(back)
            rows.append([sampler, *errors])
    print(table(["", *(f"{steps} steps" for steps in _STEPS)], rows))
    print()
    _write(out / "inversion.png", sheet)


def _interpolation(model: Model, images: Tensor, out: Path) -> None:
    pairs = zip(images[0:8:2], images[1:8:2], strict=True)
    settings = {"sampler": "heun", "steps": 50}
    ways = [model.interpolate(a, b, _SHOWN, **settings) for a, b in pairs]  # type: ignore[arg-type]
    _write(out / "interpolation.png", ways)


def _write(path: Path, rows: Sequence[Tensor]) -> None:
    write_png(path, contact_sheet([to_uint8(row[:_SHOWN]) for row in rows], _SIDE))


def _unheard(count: int) -> None:
    """No progress."""


if __name__ == "__main__":
    sys.exit(main())
