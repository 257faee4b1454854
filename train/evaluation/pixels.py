"""Whitened pixels, a feature space without a network: it knows no classes and rewards none."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.evaluation.feature_network import FeatureNetwork

DIRECTIONS = 32
_SIDE = 32  # larger images are averaged down to it: the leading directions are smooth
_BATCH = 1000
_LEAST_VARIANCE = 1e-6  # of a direction, relative to the largest: below it is rounding


def pixels_network(images: Tensor, device: str, directions: int = DIRECTIONS) -> FeatureNetwork:
    """The leading principal directions of real `images`, each divided by its standard deviation.

    `images` are uint8 `[N, C, H, W]`, the run's own. The real images have mean 0 and covariance 1
    in these features. There are fewer than `directions` of them if the images have fewer.
    """
    module = _WhitenedPixels(*_principal(images.to(device), directions))
    found = module.axes.shape[1]
    what = f"whitened pixels ({found} leading principal directions of the real images)"
    return FeatureNetwork("pixels", what, module, rgb=False, device=device)


class _WhitenedPixels(nn.Module):
    """uint8 images `[B, C, H, W]` -> `[B, D]`."""

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
        self.mean: Tensor
        self.axes: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return (flat_pixels(images) - self.mean) @ self.axes


def flat_pixels(images: Tensor) -> Tensor:
    """Pixel values in [0, 1], float64 `[N, d]`; of larger images averaged down to 32 x 32."""
    x = images.double() / 255
    if x.shape[-1] > _SIDE:
        x = F.adaptive_avg_pool2d(x, _SIDE)
    return x.flatten(1)


def _principal(images: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """The mean `[d]`, and the leading eigenvectors over their deviations `[d, D]`, in float64."""
    parts = images.split(_BATCH)
    mean = torch.stack([flat_pixels(part).sum(dim=0) for part in parts]).sum(dim=0) / len(images)
    covariance = torch.zeros(len(mean), len(mean), dtype=mean.dtype, device=mean.device)
    for part in parts:
        centred = flat_pixels(part) - mean
        covariance += centred.T @ centred / (len(images) - 1)
    variances, axes = torch.linalg.eigh(covariance)  # in ascending order
    count = min(directions, int((variances > _LEAST_VARIANCE * variances[-1]).sum()))
    return mean, axes[:, -count:] / variances[-count:].sqrt()
