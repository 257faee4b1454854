"""Whether images show what they are conditioned on, by a classifier that has never seen them.

The classifier is trained on half of the run's real images; its own accuracy on the other half is
printed too. Every class is asked for equally often; of attributes, each is asked for and against.
The first row is without a condition: what chance gives. The distance is the Frechet distance of all
images of a row from the real ones, in the classifier's features (of classes alone). Near-copies of
training images are counted as `evaluate` does, mirror images too. Words with = are settings of
`sample`; they stand before the options.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.agreement import classes
from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from benchmarks.table.measurements import machine, rounded
from ddm.artifacts import write_json
from ddm.condition import Vocabulary
from ddm.errors import ConfigError, one_of, require
from ddm.partition import Partition
from serve import Model, SampleConfig, load
from serve.model.config_merge import filled
from serve.model.images import contact_sheet, to_uint8, write_png
from train.evaluation.classifier import classifier_network, held_out
from train.evaluation.feature_network import FeatureNetwork
from train.evaluation.memorization import RealImages
from train.evaluation.scores import Scores

_COLUMNS = "guidance", "NFE per image", "accuracy", "Fréchet distance", "near-copies"
_FEATURE_SEED = 0  # the classifier is the one of `evaluate`
_SHOWN = 12  # images of a row of the sheet
_ATTRIBUTES = 3  # that are measured unless some are named: those that divide the images most evenly


class Question(NamedTuple):
    """What is asked of images, and who judges: `classes` are those of the real images, `[N]`."""

    name: str
    conditions: list[dict[str, int]]
    wanted: list[int]  # the class of each condition
    classifier: FeatureNetwork
    classes: Tensor


class Answer(NamedTuple):
    """The number of images that show what was asked for, the NFE of all, their distance, and the
    images, uint8 `[condition, n, C, H, W]`.
    """

    right: int
    nfe: int
    distance: float | None
    images: Tensor


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("conditions", __doc__)
    parser.add_argument("run", help="a run's folder, such as runs/digits-labels")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of sample")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1, 2, 4], help="default 1 2 4"
    )
    parser.add_argument("--attributes", nargs="+", default=[], help="default: three that are even")
    parser.add_argument("--n", type=int, default=500, help="images per row; default 500")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default 0")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="write a contact sheet (PNG) of the last guidance: at most 12 images per condition",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record (JSON)")
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments.words)
    require(arguments.n >= 20, "--n", "be at least 20", arguments.n)
    model = load(arguments.run)
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise ConfigError(
            f"{arguments.run} must be a run whose experts take a condition: train one with "
            "expert.condition=label"
        )
    folder = Path(arguments.run) / "partition"
    cut = Partition.read(folder)
    whole = cut.in_order(folder)
    others = cut.holdout(folder)["images"] if cut.holdout_sizes else None
    unseen = held_out(len(whole["images"]), _FEATURE_SEED)
    device = model.device.type
    training = RealImages(whole["images"], whole["cluster"], others, True, device)
    floor = training.floor(arguments.n, _FEATURE_SEED, lambda _: None).near_copies
    sheet: list[Tensor] = []
    record: dict[str, Any] = {}
    for question in questions(vocabulary, whole, arguments.attributes, device):
        right = classes(question.classifier, whole["images"][unseen]) == question.classes[unseen]
        of_real = float(right.double().mean())
        of_unseen = f"{100 * of_real:.1f} % of unseen real images"
        print(f"{question.name}: the classifier is right for {of_unseen}.")
        print()
        rows, figures = [], []
        for guidance in (None, *arguments.guidance):
            found = answer(model, question, whole["images"], guidance, arguments, settings)
            n = found.images.shape[:2].numel()
            share = found.right / n
            error = (share * (1 - share) / n) ** 0.5
            distance = "–" if found.distance is None else f"{found.distance:.2f}"
            shown = "without a condition" if guidance is None else f"{guidance:g}"
            accuracy = f"{100 * share:.1f} ± {100 * error:.1f} %"
            copies = training.copies(found.images.flatten(0, 1), lambda _: None).near_copies
            near = f"{100 * copies:.1f} %"
            rows.append([shown, f"{found.nfe / n:.1f}", accuracy, distance, near])
            figures.append(
                {
                    "guidance": guidance,
                    "nfe": found.nfe / n,
                    "accuracy": share,
                    "frechet": found.distance,
                    "near_copies": copies,
                }
            )
        sheet += found.images[:, :_SHOWN]
        record[question.name] = {"real_accuracy": of_real, "rows": figures}
        print(table([*_COLUMNS], rows))
        print()
    print(f"Real images that are near-copies of other training images: {100 * floor:.1f} %.")
    if arguments.out is not None:
        command = ["python", "-m", "benchmarks.conditions", arguments.run, *arguments.words]
        facts = {
            "command": shlex.join(command),
            "attributes": arguments.attributes,
            "version": model.version,
            "n": arguments.n,
            "seed": arguments.seed,
            "machine": machine(device),
            "real_near_copies": floor,
        }
        write_json(arguments.out, rounded({**facts, "questions": record}))
    if arguments.sheet is not None:
        write_png(arguments.sheet, contact_sheet(sheet, 64))


def questions(
    vocabulary: Vocabulary, whole: Mapping[str, Tensor], attributes: Sequence[str], device: str
) -> Iterator[Question]:
    """One of all classes, or one of each attribute. Raises `ConfigError` for an unknown attribute."""
    images = whole["images"]
    if vocabulary.kind == "label":
        judge = classifier_network(whole, _FEATURE_SEED, device)
        labels = whole["labels"]
        present = labels.unique().tolist()
        conditions = [{vocabulary.names[label]: 1} for label in present]
        yield Question(f"{len(present)} classes", conditions, present, judge, labels)
        return
    even = (whole["attributes"].float().mean(dim=0) - 0.5).abs().argsort()[:_ATTRIBUTES]
    for name in attributes or [vocabulary.names[i] for i in even.tolist()]:
        if name not in vocabulary.names:
            raise one_of("--attributes", name, tuple(vocabulary.names))
        has = whole["attributes"][:, vocabulary.names.index(name)].long()
        judge = classifier_network({"images": images, "cluster": has}, _FEATURE_SEED, device)
        yield Question(name, [{name: 0}, {name: 1}], [0, 1], judge, has)


def answer(
    model: Model,
    question: Question,
    real: Tensor,
    guidance: float | None,
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
) -> Answer:
    """Sample images for each condition of a question, and have them judged; guidance: None for images
    without a condition.
    """
    each = arguments.n // len(question.conditions)
    images, wanted, nfe = [], [], 0
    for i, (condition, label) in enumerate(zip(question.conditions, question.wanted, strict=True)):
        asked: dict[str, Any] = dict(settings)
        if guidance is not None:
            asked |= {"condition": condition, "guidance": guidance}
        sampled, trace = model.sample(
            each, seed=arguments.seed, first_index=i * each, trace=True, **asked
        )
        images.append(to_uint8(sampled))
        wanted += [label] * each
        nfe += trace.calls
    whole = torch.cat(images)
    right = int((classes(question.classifier, whole) == torch.tensor(wanted)).sum())
    distance = None
    if len(question.conditions) > 2:

        def features(images: Tensor) -> Tensor:
            return question.classifier(images, lambda _: None).features

        distance = Scores(features(real)).frechet(features(whole))
    return Answer(right, nfe, distance, torch.stack(images))


def _settings(words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        key = word.partition("=")[0]
        if key in ("condition", "guidance"):
            raise ConfigError(f"give {key} by --guidance and --attributes, got {word!r}")
    config = filled(SampleConfig, *words)
    config.check()
    settings = asdict(config)
    return {key: value for key, value in settings.items() if key not in ("condition", "guidance")}


if __name__ == "__main__":
    sys.exit(main())
