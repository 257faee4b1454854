"""Which images a run learns from."""

import logging
from dataclasses import dataclass
from typing import Literal

from ddm.errors import require
from train.data.celeba_hq import load_celeba_hq
from train.data.cifar10 import load_cifar10
from train.data.digits import load_digits
from train.data.folder import load_folder
from train.data.image_set import ImageSet
from train.data.tensors import load_tensors

log = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """Which images a run learns from.

    - `name`: the data set.
    - `root`: the folder it is in (not used by digits); for tensors a safetensors file with `images`
      (uint8 `[N, C, H, W]`) and perhaps `labels` (int64 `[N]`), which may be larger than the memory.
    - `size`: the side in pixels of the images of celeba_hq and folder, at least 4; digits are 8,
      cifar10 is 32, tensors have their own.
    - `limit`: use this many images, at least 1; null is all. Classes keep their proportions, and
      each has at least one image if the limit allows it. Within a class the first are used.
    - `flip`: mirror images at random in training.
    - `download`: cifar10 only: download it if it is missing.
    """

    name: Literal["digits", "cifar10", "celeba_hq", "folder", "tensors"] = "digits"
    root: str = "data"
    size: int = 64
    limit: int | None = None
    flip: bool = False
    download: bool = False

    def check(self) -> None:
        """Raise `ConfigError` naming the key `data.…` of a value out of its range."""
        require(self.size >= 4, "data.size", "be at least 4 pixels", self.size)
        require(
            self.limit is None or self.limit >= 1,
            "data.limit",
            "be at least 1, or null for all",
            self.limit,
        )

    def build(self) -> ImageSet:
        """Load the images. Raises `DataError` naming files that are missing or cannot be read."""
        match self.name:
            case "digits":
                return load_digits(self.limit)
            case "cifar10":
                return load_cifar10(self.root, self.limit, self.download)
            case "celeba_hq":
                return load_celeba_hq(self.root, self.size, self.limit)
            case "folder":
                return load_folder(self.root, self.size, self.limit)
            case "tensors":
                return load_tensors(self.root, self.limit)
