"""The data sets: real images as one uint8 tensor, with the labels or attributes that come with them."""

from train.data.data_config import DataConfig
from train.data.image_set import ImageSet

__all__ = ["DataConfig", "ImageSet"]
