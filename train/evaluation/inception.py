"""Inception v3 (2015), whose features the literature's FID uses."""

import pickle
from pathlib import Path

from torch import Tensor, nn

from ddm.errors import ConfigError
from train.evaluation.feature_network import FeatureNetwork


def inception_network(weights: str | None, device: str) -> FeatureNetwork:
    """The network with the user's copy of its weights. Raises `ConfigError` if it cannot load."""
    what = "Inception v3 (2015)"
    file = Path(weights or "")
    return FeatureNetwork("inception", what, _Inception(weights), True, device, file)


class _Inception(nn.Module):
    """uint8 images `[B, 3, H, W]` -> (features `[B, 2048]`, logits).

    torchmetrics builds it with torch-fidelity.
    """

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3  # here: it takes seconds to import

        try:
            # The statistics of the literature are of images resized without antialiasing.
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], weights, antialias=False
            )
        except ModuleNotFoundError as error:
            raise ConfigError(
                "features=inception needs torch-fidelity: pip install torch-fidelity"
            ) from error
        except (RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                "inception_weights must be those of Inception v3 (2015), "
                f"got {weights!r} ({reason})"
            ) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # The network's own forward returns the features alone.
        features, logits = self.network._torch_fidelity_forward(images)
        return features, logits
