"""How good a set of drawn images is, as a feature network sees it: distances to the real ones, and what they cover."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddm.errors import ConfigError
from ddm.measures import FrechetDistance, neighbours
from train.evaluation.features import NetworkFeatures
from train.evaluation.results import Score


class Scores:
    """Measures drawn images against the features of real ones `[N, d]`.

    The Frechet distance is to `reference`, the Gaussian of a file (`read_reference`), where there is one, else to that of the
    real features. Precision, recall and coverage compare as many real images as drawn ones.
    """

    def __init__(self, real: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> None:
        self.real = real
        self.frechet = (
            FrechetDistance(*(part.to(real.device) for part in reference))
            if reference
            else FrechetDistance.to(real)
        )
        given = _Given(real.shape[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `.*` will save all extracted features")
            self.inception = InceptionScore(given, splits=2)
            self.kid = KernelInceptionDistance(given, subsets=10, reset_real_features=False)
        self.kid.update(real, real=True)

    def __call__(self, judged: NetworkFeatures) -> Score:
        """The measures of drawn images."""
        drawn, n = judged.features, len(judged.features)
        self.kid.reset()
        self.kid.update(drawn, real=False)
        self.kid.subset_size = min(1000, min(n, len(self.real)) // 2)
        score = confidence = class_frequencies = None
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(0)  # both draw subsets
            kid = float(self.kid.compute()[0])
            if judged.logits is not None:
                self.inception.reset()
                self.inception.update(judged.logits)
                score = float(self.inception.compute()[0])
                probability = judged.logits.softmax(dim=1)
                confidence = float(probability.amax(dim=1).mean())
                class_frequencies = class_frequencies_of(
                    probability.argmax(dim=1), probability.shape[1]
                )
        return Score(
            self.frechet(drawn),
            kid,
            *neighbours(self.real[:n], drawn),
            score,
            confidence,
            class_frequencies,
        )


class _Given(nn.Module):
    """The identity, as a feature network: torchmetrics measures features that were made before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def class_frequencies_of(labels: Tensor, classes: int) -> list[float]:
    """How often each class comes, as shares."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).tolist()


def read_reference(path: Path) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and covariance `[d, d]` from an `.npz` with `mu` and `sigma`.

    Raises `ConfigError` naming the file where it does not hold them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} must be an .npz with mu and sigma: {error}") from error
