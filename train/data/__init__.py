"""The data sets: real images as one uint8 tensor, with their labels or attributes."""

from train.data.data_config import DataConfig
from train.data.image_set import ImageSet

__all__ = ["DataConfig", "ImageSet"]
