"""A folder of images, whatever made them, by the measures of `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddm.errors import one_of, require, within
from train.data.folder import load_images
from train.evaluation.classifier import check_classes, classes_of
from train.evaluation.features import feature_networks
from train.evaluation.measure import FEATURE_SEED
from train.evaluation.results import Score
from train.evaluation.scores import Scores

FEATURES = ("classifier", "pixels", "inception")


@dataclass
class Comparison:
    """How far the images of a folder are from real ones, with one feature network.

    what: the network, in words. images: how many were compared. floor: the Frechet distance of as
    many real images, drawn with replacement, which is as near as samples can be. score: the
    measures.
    """

    what: str
    images: int
    floor: float
    score: Score


def compare(
    folder: str | Path,
    real: Mapping[str, Tensor],
    device: str,
    features: Sequence[str] = ("classifier", "pixels"),
    inception_weights: str | None = None,
) -> dict[str, Comparison]:
    """The comparison by each network; `real` are the images, labels and clusters of a partition.

    The images of the folder, and of folders in it, are brought to the size of the real ones, and to
    grey where these are. Raises `DataError` naming what cannot be read, `ConfigError` for a network
    that cannot be had, or too few images.
    """
    for name in features:
        if name not in FEATURES:
            raise one_of("compare.features", name, FEATURES)
    require(
        ("inception" in features) == (inception_weights is not None),
        "compare.inception_weights",
        "be given with inception among the features, and only then",
        inception_weights,
    )
    if "classifier" in features:
        check_classes(classes_of(real), "compare.features")
    if (
        "index" in real
    ):  # in the order of the data set, so that the classifier is that of `evaluate`
        order = real["index"].argsort()
        real = {name: tensor[order] for name, tensor in real.items()}
    shape = real["images"].shape[1:]
    samples = load_images(str(folder), shape[-1], None, grey=shape[0] == 1).images
    generator = torch.Generator().manual_seed(FEATURE_SEED)
    order = torch.randperm(len(real["images"]), generator=generator)
    found = {}
    for network in feature_networks(features, inception_weights, real, FEATURE_SEED, device):
        points = network(real["images"][order], _unheard).features
        measure = Scores(points)
        with within("compare"):
            score = measure(network(samples, _unheard))
        again = torch.randint(len(points), (len(samples),), generator=generator)
        floor = measure.frechet(points[again])
        found[network.name] = Comparison(network.what, len(samples), floor, score)
    return found


def _unheard(count: int) -> None:
    """No progress."""
