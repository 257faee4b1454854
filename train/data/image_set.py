"""Images with their labels or attributes, and how a part of them is chosen."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddm.artifacts import digest
from ddm.row_file import CHUNK, Release


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    `images` uint8 `[N, C, H, W]`; `labels` int64 `[N]` and the names of the classes;
    `attributes` bool `[N, A]` and their names. `images` may be a mapped file: `release`, called after
    reading some of them, gives their memory back.
    """

    images: Tensor
    labels: Tensor | None = None
    label_names: Sequence[str] = ()
    attributes: Tensor | None = None
    attribute_names: Sequence[str] = ()
    release: Release = lambda: None

    def at(self, rows: Tensor) -> Tensor:
        """The images of these rows, int64 `[n]`, read a few at a time."""
        found = torch.empty(len(rows), *self.images.shape[1:], dtype=torch.uint8)
        for part, some in zip(found.split(CHUNK), rows.split(CHUNK), strict=True):
            torch.index_select(self.images, 0, some, out=part)
            self.release()
        return found

    @property
    def hash(self) -> str:
        """The content hash of images, labels and attributes."""
        parts = [self.images, self.labels, self.attributes]
        return digest([None if p is None else [list(p.shape), self._digest(p)] for p in parts])

    def _digest(self, tensor: Tensor) -> str:
        found = hashlib.sha256()
        for part in tensor.split(CHUNK):
            found.update(part.contiguous().numpy().tobytes())
            self.release()
        return found.hexdigest()


def stratified(labels: Tensor, limit: int | None) -> Tensor:
    """The places of at most `limit` items in which the classes keep their proportions.

    `labels` is int64 `[N]`, the places are int64 in ascending order.
    Each class has at least one place if `limit` allows it; the rest is apportioned by largest
    remainder. Within a class the first items are taken. None is all.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    sizes = torch.bincount(labels)
    present = (sizes > 0).long()
    quota = present if limit >= present.sum() else torch.zeros_like(sizes)
    quota = quota + _largest_remainder(sizes - quota, limit - int(quota.sum()))
    places = [(labels == label).nonzero()[:n, 0] for label, n in enumerate(quota.tolist())]
    return torch.cat(places).sort().values


def _largest_remainder(sizes: Tensor, seats: int) -> Tensor:
    """Apportion `seats` by `sizes`, int64 `[K]`; equal remainders favour the first."""
    total = max(1, int(sizes.sum()))
    whole = sizes * seats // total
    remainder = sizes * seats % total
    first = remainder.argsort(descending=True, stable=True)[: seats - int(whole.sum())]
    whole[first] += 1
    return whole
