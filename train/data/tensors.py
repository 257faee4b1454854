"""One safetensors file that holds all images."""

from pathlib import Path

import torch
from torch import Tensor

from ddm.errors import DataError
from train.data.image_set import ImageSet, stratified
from train.data.mapped import mapped

DRAWABLE = "are square and have 1 to 4 channels"


def is_drawable(images: Tensor) -> bool:
    """Whether images `[N, C, H, W]` are such as the networks and contact sheets take: `DRAWABLE`."""
    _, channels, height, width = images.shape
    return 1 <= channels <= 4 and height == width


def load_tensors(root: str, limit: int | None) -> ImageSet:
    """The images of the file `root`: `images` uint8 `[N, C, H, W]` and, if it has them, `labels` int64 `[N]`, at least 0.

    They are mapped; with a limit, `limit` of them are read. Raises `DataError` naming a file that is not such a one.
    """
    path = Path(root)
    if not path.is_file():
        raise DataError(f"{root} is missing: data.name=tensors takes a safetensors file of images")
    tensors, release = mapped(path)
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or images.dim() != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise DataError(f"{path} must hold the tensor images, uint8 [N, C, H, W], N at least 1")
    if not is_drawable(images):
        raise DataError(f"{path} must hold images that {DRAWABLE}, got {list(images.shape)}")
    if labels is not None and (
        labels.is_floating_point() or labels.shape != images.shape[:1] or labels.min() < 0
    ):
        raise DataError(f"{path} must hold labels of at least 0, one for each of the images")
    names = [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)]
    labels = None if labels is None else labels.long()
    if limit is None or limit >= len(images):
        return ImageSet(images, labels, names, release=release)
    groups = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    chosen = stratified(groups, limit)
    return ImageSet(images[chosen], None if labels is None else labels[chosen], names)
