"""CIFAR-10, as torchvision reads it."""

from pathlib import Path

import torch

from ddm.errors import DataError
from train.data.image_files import require_regular_files
from train.data.image_set import ImageSet, stratified


def load_cifar10(root: str, limit: int | None, download: bool) -> ImageSet:
    """50,000 training images of 32 x 32 in ten classes, or `limit` of them.

    Raises `DataError` if the files are missing or damaged.
    """
    from torchvision.datasets import CIFAR10

    require_regular_files(Path(root) / CIFAR10.base_folder)
    try:
        train = CIFAR10(root, train=True, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"CIFAR-10 is not in {root}, or is damaged ({error}): put {CIFAR10.base_folder} there, "
            "or let torchvision download it with data.download=true"
        ) from error
    labels = torch.tensor(train.targets)
    chosen = stratified(labels, limit)
    images = torch.from_numpy(train.data[chosen.numpy()]).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels[chosen], train.classes)
