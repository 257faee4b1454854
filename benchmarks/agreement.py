"""Whether the same seed shows the same image at few steps and at many.

For each policy: the fraction of images that a small classifier gives the same class at both numbers
of steps, with its standard error, and the root mean square difference of their pixels in [0, 1].
Words with = are settings of `sample` for all policies.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from ddm.errors import ConfigError, one_of, require
from ddm.partition import Partition
from router.policies import POLICIES
from serve import Model, SampleConfig, load
from serve.model.config_merge import filled
from serve.model.images import to_uint8
from train.evaluation.classifier import classes_of, classifier_network, held_out
from train.evaluation.feature_network import FeatureNetwork

_USUAL = {"source": "posterior", "control_variate": "none"}
_SHOWN = [name for name in ("fixed", "switching", "stochastic", "balanced") if name in POLICIES]
_FEATURE_SEED = 0  # the classifier is the one of `evaluate`


class Agreement(NamedTuple):
    """How alike two sets of images of the same seeds are, image by image."""

    same_class: float  # the fraction of the images
    error: float  # the standard error of that fraction
    difference: float  # root mean square, of pixels in [0, 1]


def agreement(few: Tensor, many: Tensor, classifier: FeatureNetwork) -> Agreement:
    """Of images `[n, C, H, W]` and their counterparts, uint8."""
    same = classes(classifier, few) == classes(classifier, many)
    fraction = float(same.double().mean())
    error = (fraction * (1 - fraction) / len(few)) ** 0.5
    apart = (few.double() - many.double()) / 255
    return Agreement(fraction, error, float(apart.square().mean().sqrt()))


def classes(classifier: FeatureNetwork, images: Tensor) -> Tensor:
    """The class that a classifier gives each image, int64 `[n]`."""
    logits = classifier(images, lambda _: None).logits
    assert logits is not None
    return logits.argmax(dim=1)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("agreement", __doc__)
    usual = " ".join(f"{key}={value}" for key, value in _USUAL.items())
    parser.add_argument("run", help="a run's folder, such as runs/digits")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="word",
        help=f"policies, default {' '.join(_SHOWN)}; key=value settings of sample, default {usual}",
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[10, 50], help="few and many; default 10 50"
    )
    parser.add_argument("--n", type=int, default=500, help="images per policy; default 500")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default 0")
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    policies = [word for word in arguments.words if "=" not in word] or _SHOWN
    for policy in policies:
        if policy not in POLICIES:
            raise one_of("policy", policy, POLICIES)
    settings = _settings([word for word in arguments.words if "=" in word])
    require(arguments.n >= 1, "--n", "be at least 1", arguments.n)
    model = load(arguments.run)
    whole = _images(Path(arguments.run))
    classifier = classifier_network(whole, _FEATURE_SEED, model.device.type)
    rows = []
    for policy in policies:
        few, many = (
            _sampled(model, arguments, {**settings, "policy": policy, "steps": steps})
            for steps in arguments.steps
        )
        found = agreement(few, many, classifier)
        percent = f"{100 * found.same_class:.1f} ± {100 * found.error:.1f} %"
        rows.append([policy, percent, f"{found.difference:.3f}"])
    steps = " and ".join(map(str, arguments.steps))
    shown = " ".join(f"{key}={settings[key]}" for key in ("sampler", "grid", "source"))
    unseen = held_out(len(whole["images"]), _FEATURE_SEED)
    right = classes(classifier, whole["images"][unseen]) == classes_of(whole)[unseen]
    print(f"{arguments.n} images of seed {arguments.seed} at {steps} steps; {shown}.")
    print(f"The classifier is right for {100 * right.double().mean():.1f} % of unseen real images.")
    print()
    print(table(["policy", "the same class", "RMS difference of pixels"], rows))


def _settings(words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        key = word.partition("=")[0]
        if key in ("policy", "steps"):
            raise ConfigError(f"give {key} as a word of its own or as --steps, got {word!r}")
    config = filled(SampleConfig, _USUAL, *words)
    config.check()
    return asdict(config)


def _sampled(model: Model, arguments: argparse.Namespace, settings: Mapping[str, Any]) -> Tensor:
    images = model.sample(arguments.n, seed=arguments.seed, **settings)
    return to_uint8(images)


def _images(run: Path) -> dict[str, Tensor]:
    """The images of a run that are trained on."""
    folder = run / "partition"
    return Partition.read(folder).in_order(folder)


if __name__ == "__main__":
    sys.exit(main())
