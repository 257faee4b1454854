"""The feature spaces that `evaluate.features` names; every figure says which one it used."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from train.evaluation.classifier import classifier_network
from train.evaluation.feature_files import script_files
from train.evaluation.feature_network import FeatureNetwork, script_network
from train.evaluation.inception import inception_network
from train.evaluation.pixels import DIRECTIONS, pixels_network


def feature_networks(
    names: Sequence[str],
    inception_weights: str | None,
    images: Mapping[str, Tensor],
    seed: int,
    device: str,
    pixel_directions: int = DIRECTIONS,
) -> list[FeatureNetwork]:
    """The networks of these names; `images` are the partition's.

    A classifier is trained on half of them, and the directions of `pixels` are theirs.
    Raises `ConfigError` if one cannot be had.
    """
    networks = []
    for name in names:
        if name == "classifier":
            networks.append(classifier_network(images, seed, device))
        elif name == "inception":
            networks.append(inception_network(inception_weights, device))
        elif name == "pixels":
            networks.append(pixels_network(images["images"], device, pixel_directions))
        else:
            files = script_files(Path(name))
            networks += [script_network("evaluate.features", str(file), device) for file in files]
    return networks
