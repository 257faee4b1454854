"""The 8 x 8 digits that come with scikit-learn."""

import numpy as np
import torch

from train.data.image_set import ImageSet, stratified


def load_digits(limit: int | None) -> ImageSet:
    """1,797 grey images in ten classes, or `limit` of them."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    chosen = stratified(labels, limit)
    return ImageSet(images[chosen], labels[chosen], [str(digit) for digit in range(10)])
