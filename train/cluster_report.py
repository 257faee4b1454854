"""How good clusters are: their sizes, silhouette, agreement with labels, and a contact sheet of each."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve.model.images import contact_sheet, write_png
from train.data import ImageSet
from train.kmeans import points

log = logging.getLogger(__name__)

_SAMPLE = 2000  # images of the silhouette, which takes all their distances
_SHEET = 100  # images of a contact sheet, at random


def quality(images: ImageSet, cluster: Tensor, network: str | None, seed: int) -> dict[str, Any]:
    """The measures of clusters, as plain data; `network`: of the features, null for pixels.

    `silhouette`, in [-1, 1]: how much nearer the points of an image's own cluster are than those of the
    next (of at most 2000 images); `purity`, in (0, 1]: the fraction of images whose label is the most
    frequent one of their cluster; `adjusted_rand_index`, at most 1, and 0 by chance: agreement with the
    labels. Those that are not defined, for one cluster or without labels, are absent.
    """
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    count, labels = len(cluster), images.labels
    found: dict[str, Any] = {}
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    some = order[-_SAMPLE:].sort().values  # the first ones are held out
    if 2 <= len(cluster[some].unique()) < len(some):
        with points(ImageSet(images.at(some)), network) as sampled:
            score = silhouette_score(sampled.at(torch.arange(len(some))), cluster[some].numpy())
            found |= {"silhouette": float(score), "silhouette_images": len(some)}
            found["silhouette_of"] = sampled.what
    if labels is not None:
        shape = int(cluster.max()) + 1, int(labels.max()) + 1
        pairs = torch.zeros(shape, dtype=torch.int64)
        pairs.index_put_((cluster, labels), torch.ones_like(labels), accumulate=True)
        found["purity"] = float(pairs.max(dim=1).values.sum() / len(labels))
        found["adjusted_rand_index"] = float(adjusted_rand_score(labels.numpy(), cluster.numpy()))
    words = {"silhouette": "silhouette", "purity": "purity", "adjusted_rand_index": "ARI"}
    measures = [f"{word} {found[key]:.3f}" for key, word in words.items() if key in found]
    if measures:
        log.info("partition  %s", ", ".join(measures))
    return found


def write_sheets(folder: Path, images: ImageSet, cluster: Tensor, seed: int) -> list[Path]:
    """Write `folder/00.png` ...: some images of each cluster; returns the files."""
    files = []
    for k in range(int(cluster.max()) + 1):
        own = (cluster == k).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed + k))
        shown = images.at(own[order[:_SHEET]].sort().values)
        path = folder / f"{k:02d}.png"
        write_png(path, contact_sheet(shown.split(max(1, round(len(shown) ** 0.5)))))
        files.append(path)
    return files
