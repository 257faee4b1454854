"""Are they copies? How near images are to the training images, and to those held out."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddm.measures import Nearest, nearest
from train.evaluation.pixels import flat_pixels
from train.evaluation.results import Copies

VERSION = 2  # raise it when a measure changes: kept figures are then computed again

_OF = 50  # nearest training images, whose mean distance says how crowded the place is
_NEAR = 0.5  # of that mean: nearer is a near-copy (both numbers: arXiv 2301.13188)
_ALONE = 1 / 3  # of the second nearest distance (arXiv 2310.02664)
_SHOWN = 8
_BATCH = 2000  # images that are compared at once
_ELEMENTS = 2**24  # of a chunk of real images, or of its distances: 128 MiB


class RealImages:
    """The training images and those held out, `images` uint8 `[N, C, H, W]` of each.

    `cluster` is that of each training image, int64. With `flip` the mirror images count as well.
    """

    def __init__(
        self,
        training: Tensor,
        cluster: Tensor,
        held_out: Tensor | None,
        flip: bool,
        device: str,
    ) -> None:
        self.training = training
        self.cluster = cluster
        self.held_out = held_out
        self.flip = flip
        self.device = device

    @property
    def expected(self) -> float | None:
        """The training images' fraction of all: how often the nearest is one, by chance alone."""
        if self.held_out is None:
            return None
        return len(self.training) / (len(self.training) + len(self.held_out))

    def copies(self, images: Tensor, advance: Callable[[int], object]) -> Copies:
        """How near images are, uint8 `[n, C, H, W]`; `advance` is told the images of each batch."""
        return self._copies(images, None, None, advance)

    def floor(self, count: int, seed: int, advance: Callable[[int], object]) -> Copies:
        """The same of real images, at most `count`: of held-out ones, none compared with itself.

        If none is held out, of training images against the others.
        """
        real = self.training if self.held_out is None else self.held_out
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        own = order[:count]
        if self.held_out is None:
            return self._copies(real[own], own, None, advance)
        return self._copies(real[own], None, own, advance)

    def _copies(
        self,
        images: Tensor,
        but_training: Tensor | None,
        but_held_out: Tensor | None,
        advance: Callable[[int], object],
    ) -> Copies:
        """The training image and the held-out one of each image that do not count are in `but_...`."""
        seen = self._nearest(images, self.training, _OF, but_training, advance)
        first = seen.distance[:, 0]
        counted = (
            seen.distance.isfinite()
        )  # of few images, one that does not count is among the nearest
        crowd = torch.where(counted, seen.distance, 0).sum(dim=1) / counted.sum(dim=1)
        ratio = first / crowd.clamp_min(1e-12)
        near = first <= _NEAR * crowd
        second = seen.distance[:, :2][:, -1]
        cluster = self.cluster[seen.place[:, 0]]
        clusters = int(self.cluster.max()) + 1
        unseen = None
        if self.held_out is not None and len(self.held_out) > (but_held_out is not None):
            unseen = self._nearest(images, self.held_out, 1, but_held_out, lambda _: None)
        suspects = ratio.argsort()[:_SHOWN]
        others = torch.full_like(suspects, -1) if unseen is None else unseen.place[suspects, 0]
        return Copies(
            near_copies=float(near.double().mean()),
            alone=float(((first < _ALONE * second) & second.isfinite()).double().mean()),
            ratio=float(ratio.median()),
            nearest=torch.bincount(cluster, minlength=clusters).tolist(),
            copied=torch.bincount(cluster[near], minlength=clusters).tolist(),
            nearest_is_training=_fraction_below(first, unseen),
            over_held_out=_median_over(first, unseen),
            closest=torch.stack([suspects, seen.place[suspects, 0], others], dim=1).tolist(),
        )

    def _nearest(
        self,
        images: Tensor,
        real: Tensor,
        k: int,
        but: Tensor | None,
        advance: Callable[[int], object],
    ) -> Nearest:
        found = []
        for start in range(0, len(images), _BATCH):
            points = flat_pixels(images[start : start + _BATCH].to(self.device))
            own = None if but is None else but[start : start + _BATCH]
            chunks = self._chunks(real, max(points.shape))
            found.append(nearest(points, chunks, k, own))
            advance(len(points))
        return Nearest(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))

    def _chunks(self, real: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, _ELEMENTS // width)
        for index in torch.arange(len(real)).split(size):
            images = real[index].to(self.device)
            yield index, flat_pixels(images)
            if self.flip:
                yield index, flat_pixels(images.flip(3))


def _fraction_below(distance: Tensor, others: Nearest | None) -> float | None:
    if others is None:
        return None
    return float((distance < others.distance[:, 0]).double().mean())


def _median_over(distance: Tensor, others: Nearest | None) -> float | None:
    if others is None:
        return None
    return float((distance / others.distance[:, 0].clamp_min(1e-12)).median())
