"""The stage `partition`: cut the data set into clusters."""

import json
import logging
import shutil
import time
from pathlib import Path

from torch import Tensor

from ddm.artifacts import digest, flush, read_json, scratch_beside, sha256, write_json
from ddm.condition import ImageConditions, Kind, Vocabulary
from ddm.errors import ArtifactError, ConfigError, require
from ddm.partition import Partition
from serve.model.images import contact_sheet, write_png
from train.cluster_report import quality, write_sheets
from train.clustering import assign, check_left, held_out
from train.config import Config, changed
from train.data import ImageSet
from train.run_folder import claim

log = logging.getLogger(__name__)

_MAX_NAMES, _MAX_BYTES = 1000, 12_000  # every expert's JSON holds the vocabulary, and is bounded
_SHEET, _QUALITY, _DESCRIPTION = "clusters.png", "quality.json", "partition.json"


def make_partition(config: Config) -> None:
    """Cut the data set into clusters, and write how good they are and contact sheets of their images."""
    began = time.monotonic()
    folder = config.folder / "partition"
    images = config.data.build()
    condition = config.expert.condition
    told = [] if condition == "none" else [condition]
    names = [*images.label_names, *images.attribute_names]
    key = digest([changed(config.partition), config.seed, images.hash, names, *told])
    if _is_made(folder, key):
        log.info("partition  up to date")
        return
    cut, cluster = _cut(config, folder, images)
    network = config.partition.features if config.partition.by == "kmeans" else None
    measures = quality(images, cluster, network, config.seed)
    write_json(folder / _QUALITY, {"sizes": cut.sizes, **measures})
    firsts = [cut.cluster(folder, k)["images"][:16] for k in range(cut.k)]
    write_png(folder / _SHEET, contact_sheet(firsts))
    sheets = write_sheets(folder / "clusters", images, cluster, config.seed)
    shown = [folder / _QUALITY, folder / _SHEET, *sheets]
    hashes = {str(path.relative_to(folder)): sha256(path) for path in shown}
    write_json(folder / "stage.json", {"key": key, "shown": hashes})
    sizes = ", ".join(f"{name} {size}" for name, size in zip(cut.names, cut.sizes, strict=True))
    apart = f", {sum(cut.holdout_sizes)} held out" if cut.holdout_sizes else ""
    log.info(
        "partition  %d images in %d clusters (%s)%s in %.1f s",
        sum(cut.sizes),
        cut.k,
        sizes,
        apart,
        time.monotonic() - began,
    )


def _is_made(folder: Path, key: str) -> bool:
    """Whether every file of the stage is there, whole, and made from what `key` is the hash of."""
    if not (folder / "stage.json").exists() or not (folder / _DESCRIPTION).exists():
        return False
    made = read_json(folder / "stage.json")
    shown = made.get("shown")
    if made.get("key") != key or not isinstance(shown, dict):
        return False
    hashes = Partition.read(folder).files(folder)
    hashes |= {folder / name: found for name, found in shown.items()}
    return all(path.exists() and sha256(path) == expected for path, expected in hashes.items())


def _cut(config: Config, folder: Path, images: ImageSet) -> tuple[Partition, Tensor]:
    """Write the clusters' files and their description; returns also the cluster of every image, int64 `[N]`.

    Raises `ArtifactError` if the folder holds another partition, on which experts may have been trained.
    """
    conditions = conditions_of(images, config.expert.condition)
    held = held_out(len(images.images), config.partition, config.seed)
    cluster, names = assign(images, config.partition, config.seed, held)
    check_left(cluster, names, held, config.partition)
    scratch = scratch_beside(folder)
    try:
        cut = Partition.write(
            scratch,
            images.images,
            cluster,
            names,
            images.labels,
            held,
            images.release,
            conditions,
        )
        if (folder / _DESCRIPTION).exists() and Partition.read(folder) != cut:
            raise ArtifactError(
                f"{folder} was cut from other images than data.root={config.data.root} holds now: "
                "give run=FOLDER for a new run"
            )
        claim(config)
        folder.mkdir(exist_ok=True)
        # With its description, a partition is complete.
        for file in [*cut.files(scratch), scratch / _DESCRIPTION]:
            file.replace(folder / file.name)
        flush(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return cut, cluster


def conditions_of(images: ImageSet, condition: str) -> ImageConditions | None:
    """What experts are told of the images, for `expert.condition`. Raises `ConfigError` if the images lack it."""
    if condition == "none":
        return None
    label = condition == "label"
    values = images.labels if label else images.attributes
    names = images.label_names if label else images.attribute_names
    if values is None:
        lacking = "labels" if label else "attributes"
        raise ConfigError(
            f"expert.condition must be none for images without {lacking}, got {condition!r}"
        )
    bytes_of_all = len(json.dumps(names))  # as the artifacts have them
    rule = f"be none for more than {_MAX_NAMES} names, or names of more than {_MAX_BYTES} bytes"
    fits = len(names) <= _MAX_NAMES and bytes_of_all <= _MAX_BYTES
    require(fits, "expert.condition", rule, condition)
    kind: Kind = "label" if label else "attributes"
    return ImageConditions(Vocabulary(kind, list(names)), values if label else values.byte())
