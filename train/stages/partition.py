"""The stage `partition`: cut the data set into clusters."""

import logging
import time

from ddm.artifacts import digest, read_json, write_json
from ddm.errors import ArtifactError
from ddm.partition import Partition
from serve.model.images import contact_sheet, write_png
from train.clustering import assign
from train.config import Config, plain

log = logging.getLogger(__name__)


def make_partition(config: Config) -> None:
    """Cut the data set into clusters, and draw a sheet of each cluster's images."""
    began = time.monotonic()
    folder = config.folder / "partition"
    images = config.data.build()
    key = digest([plain(config.partition), config.seed, images.hash])
    if (folder / "partition.json").exists():
        if read_json(folder / "stage.json").get("key") != key:
            raise ArtifactError(
                f"{folder} was cut from other images than data.root={config.data.root} holds now: give run=FOLDER for a new run"
            )
        log.info("partition  up to date")
        return
    cluster, names = assign(images, config.partition, config.seed)
    write_json(folder / "stage.json", {"key": key})
    cut = Partition.write(folder, images.images, cluster, names, images.labels)
    rows = [cut.cluster(folder, k)["images"][:16] for k in range(cut.k)]
    write_png(folder / "clusters.png", contact_sheet(rows))
    sizes = ", ".join(f"{name} {size}" for name, size in zip(cut.names, cut.sizes, strict=True))
    log.info(
        "partition  %d images in %d clusters (%s) in %.1f s",
        sum(cut.sizes),
        cut.k,
        sizes,
        time.monotonic() - began,
    )
