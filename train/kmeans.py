"""K-means over features of images: of all at once, or of two levels in mini-batches, for any number of images."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddm.errors import require
from train.data import ImageSet
from train.evaluation.feature_network import script_network
from train.progress import bar

log = logging.getLogger(__name__)

_RESTARTS = 10  # on the digits 3 end in a poor optimum for 4 of 10 seeds, 10 for none
FINE = 1024  # centres of the first level where the points do not fit
MEMORY_BYTES = 2**30  # of points at once
_CHUNK_BYTES = 2**26  # of points in a pass over all
_BATCH = 4096  # points in a mini-batch, or four times the fine centres
_EPOCHS = 3  # of mini-batches, but at most
_MOST_BATCHES = 100  # 400 points for each of 1024 centres
_ROUNDS = 10  # of balanced sizes: means, then sizes


@dataclass
class Points:
    """What is clustered: float32 `[count, width]`, made or read when it is asked for.

    at: the points of these images, int64 `[n]`
    what: of what they are
    """

    count: int
    width: int
    at: Callable[[Tensor], Tensor]
    what: str

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some of the rows at a time, and their points."""
        for some in rows.split(max(1, _CHUNK_BYTES // (4 * self.width))) if len(rows) else ():
            yield some, self.at(some)


@contextmanager
def points(images: ImageSet, network: str | None) -> Iterator[Points]:
    """Pixels, or the features of a TorchScript file; those lie in a temporary file if they are large."""
    pixels, count = images.images, len(images.images)

    def flat(rows: Tensor) -> Tensor:
        return images.at(rows).flatten(1).float()

    if network is None:
        yield Points(count, pixels[0].numel(), flat, "pixels")
        return
    features = script_network("partition.features", network, "cpu")
    width = features(pixels[:1], lambda _: None).features.shape[1]
    with tempfile.TemporaryDirectory(prefix="ddm-features-") as folder:
        stored = _store(4 * count * width, Path(folder) / "features", (count, width))
        with bar("features for k-means", count) as advance:
            for rows in torch.arange(count).split(2500):
                stored[rows[0] : rows[-1] + 1] = features(images.at(rows), advance).features.numpy()
                if isinstance(stored, np.memmap):
                    stored.flush()

        def read(rows: Tensor) -> Tensor:
            return torch.from_numpy(np.asarray(stored[rows.numpy()]))

        yield Points(count, width, read, f"features of {Path(network).stem}")


def _store(size: int, path: Path, shape: tuple[int, int]) -> np.ndarray:
    if size <= MEMORY_BYTES // 4:
        return np.empty(shape, np.float32)
    return np.memmap(path, np.float32, "w+", shape=shape)


def kmeans(
    points: Points, fitted: Tensor, k: int, seed: int, fine: int | None, balanced: bool
) -> Tensor:
    """The cluster of every point, int64 `[N]`, by centres that are fitted without those outside `fitted`, bool `[N]`.

    Without `fine`, k-means of all points at once if they take at most 1 GiB. With it, or for more points, mini-batch
    k-means finds `fine` centres (1024 if null), and k-means over these, weighted by their points, the k clusters:
    points at different places of a fine centre go together. `balanced` clusters have equally many fitted points, but for
    one.
    """
    own = fitted.nonzero()[:, 0]
    if fine is None and 4 * len(own) * points.width > MEMORY_BYTES:
        fine = min(FINE, len(own))
        log.info(
            "partition  two levels of k-means, by partition.fine=%d: %d points", fine, len(own)
        )
    seed %= 2**32
    if fine is None:
        cluster, centres = _at_once(points, fitted, k, seed)
    else:
        require(k <= fine <= len(own), "partition.fine", f"be in [{k}, {len(own)}]", fine)
        cluster, centres = _two_levels(points, own, k, seed, fine)
    if balanced:
        cluster = _balanced(points, fitted, centres)
    return cluster


def _at_once(points: Points, fitted: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=_RESTARTS, random_state=seed)
    cluster = torch.empty(points.count, dtype=torch.int64)
    own = fitted.nonzero()[:, 0]
    cluster[own] = torch.from_numpy(found.fit_predict(points.at(own).numpy())).long()
    for rows, some in points.chunks((~fitted).nonzero()[:, 0]):
        cluster[rows] = torch.from_numpy(found.predict(some.numpy())).long()
    return cluster, torch.from_numpy(found.cluster_centers_).float()


def _two_levels(points: Points, own: Tensor, k: int, seed: int, fine: int) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    batch = min(len(own), max(_BATCH, 4 * fine))
    mini = MiniBatchKMeans(fine, batch_size=batch, random_state=seed, n_init=1)
    generator = torch.Generator().manual_seed(seed)
    batches = min(_MOST_BATCHES, max(1, _EPOCHS * len(own) // batch))
    with bar("k-means: mini-batches", batches) as advance:
        for _ in range(batches):
            some = torch.randint(len(own), (batch,), generator=generator).sort().values
            mini.partial_fit(points.at(own[some]).numpy())
            advance()
    centres = torch.from_numpy(mini.cluster_centers_).float()
    place = _nearest(points, centres)
    sizes = torch.bincount(place[own], minlength=fine)
    coarse = KMeans(k, n_init=2 * _RESTARTS, random_state=seed)
    of_centre = coarse.fit_predict(centres.numpy(), sample_weight=sizes.numpy())
    return torch.from_numpy(of_centre).long()[place], torch.from_numpy(
        coarse.cluster_centers_
    ).float()


def _nearest(points: Points, centres: Tensor) -> Tensor:
    """The nearest centre of every point, int64 `[N]`."""
    found = torch.empty(points.count, dtype=torch.int64)
    with bar("k-means: nearest centres", points.count) as advance:
        for rows, some in points.chunks(torch.arange(points.count)):
            found[rows] = _squares(some, centres).argmin(dim=1)
            advance(len(rows))
    return found


def _squares(some: Tensor, centres: Tensor) -> Tensor:
    """`|x - c|^2 - |x|^2`, `[n, k]`."""
    return torch.addmm(centres.square().sum(dim=1), some, centres.T, alpha=-2)


def _balanced(points: Points, fitted: Tensor, centres: Tensor) -> Tensor:
    """Clusters of equal sizes: means and sizes in turn, until nothing changes; other points to the nearest mean."""
    own = fitted.nonzero()[:, 0]
    cluster = torch.full((points.count,), -1)
    for _ in range(_ROUNDS):
        squares = torch.cat([_squares(some, centres) for _, some in points.chunks(own)])
        new = of_equal_sizes(squares)
        if torch.equal(new, cluster[own]):
            break
        cluster[own] = new
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        for rows, some in points.chunks(own):
            sums.index_add_(0, cluster[rows], some.double())
        centres = (sums / torch.bincount(new)[:, None]).float()
    for rows, some in points.chunks((~fitted).nonzero()[:, 0]):
        cluster[rows] = _squares(some, centres).argmin(dim=1)
    return cluster


def of_equal_sizes(costs: Tensor) -> Tensor:
    """A cluster for every point, int64 `[N]`, such that sizes differ by at most one, for low costs `[N, k]`.

    All points ask for their cheapest cluster; one with too many takes those that would lose most elsewhere, and is full.
    """
    n, k = costs.shape
    free = torch.full((k,), n // k)
    free[: n % k] += 1
    found = torch.full((n,), -1)
    costs = costs.clone()
    rest = torch.arange(n)
    while len(rest) > 0:
        costs[:, free == 0] = torch.inf
        here = costs[rest]
        least, wanted = here.min(dim=1)
        second = here.scatter(1, wanted[:, None], torch.inf).min(dim=1).values
        for c in range(k):
            asking = (wanted == c).nonzero()[:, 0]
            if len(asking) > free[c]:
                loss = second[asking] - least[asking]
                asking = asking[loss.argsort(descending=True, stable=True)[: int(free[c])]]
            found[rest[asking]] = c
            free[c] -= len(asking)
        rest = rest[found[rest] < 0]
    return found
