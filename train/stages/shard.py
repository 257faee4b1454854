"""`export` and `shard`: folders with one cluster each, all that the owner of an expert needs to train it.

A shard is a partition with one cluster: `partition.json`, `cluster-00.safetensors` and, if images are held out,
`holdout-00.safetensors`. An expert is bound to the hash of its cluster's file, which is the same in a shard.
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from ddm.artifacts import flush, scratch_beside, sha256
from ddm.errors import ArtifactError
from ddm.partition import Partition
from train.clustering import check_left, held_out
from train.config import Config
from train.data import ImageSet
from train.data.folder import load_images
from train.run_folder import read_partition
from train.stages.partition import conditions_of

log = logging.getLogger(__name__)


def export_shards(config: Config) -> None:
    """Write each cluster of the run's partition as a shard to `shards/00` and so on."""
    source, cut = config.folder / "partition", read_partition(config)
    folder = config.folder / "shards"
    made = 0
    for k in range(cut.k):
        shard, target = cut.only(k), folder / f"{k:02d}"
        if _is_made(target, shard):
            continue
        scratch = scratch_beside(target)
        scratch.mkdir()
        names = {Partition.file(source, k): Partition.file(scratch, 0)}
        if shard.holdout_sizes:
            names[Partition.holdout_file(source, k)] = Partition.holdout_file(scratch, 0)
        for file, copy in names.items():
            _link(file, copy)
        shard.describe(scratch)
        _move(scratch, target)
        made += 1
    log.info("export     %s", f"{made} of {cut.k} shards: {folder}" if made else "up to date")


def make_shard(config: Config) -> None:
    """Write images of one's own as a shard. Raises `ArtifactError` if the folder holds another one."""
    cfg = config.shard
    images = _images(config)
    out = Path(cfg.out) if cfg.out else config.folder / "shard"
    name = cfg.name or (Path(cfg.images).resolve().name if cfg.images else config.data.name)
    held = held_out(len(images.images), config.partition, config.seed)
    cluster = torch.zeros(len(held), dtype=torch.int64)
    check_left(cluster, [name], held, config.partition)
    scratch = scratch_beside(out)
    try:
        shard = Partition.write(
            scratch,
            images.images,
            cluster,
            [name],
            images.labels,
            held,
            images.release,
            conditions_of(images, config.expert.condition),
        )
        if _is_made(out, shard):
            log.info("shard      up to date")
            return
        _move(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sizes = f"{shard.sizes[0]} images of {shard.shape}"
    log.info("shard      %s, %s, hash %s: %s", name, sizes, shard.hashes[0][:12], out)


def _images(config: Config) -> ImageSet:
    if config.shard.images is None:
        return config.data.build()
    data = config.data
    return load_images(config.shard.images, data.size, data.limit, config.shard.grey)


def _is_made(folder: Path, shard: Partition) -> bool:
    """Whether a folder holds this shard, whole. Raises `ArtifactError` if it holds another one."""
    if not (folder / "partition.json").exists():
        return False
    if Partition.read(folder) != shard:
        raise ArtifactError(f"{folder} holds another shard: move it away, or give shard.out=FOLDER")
    return all(
        path.exists() and sha256(path) == expected for path, expected in shard.files(folder).items()
    )


def _link(file: Path, copy: Path) -> None:
    """The same file under another name, or a copy where the file system has no hard links."""
    with suppress(OSError):
        copy.hardlink_to(file)
        return
    shutil.copyfile(file, copy)
    flush(copy)


def _move(scratch: Path, target: Path) -> None:
    """Move a shard's files to their folder, its description last: with it, it is complete."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(scratch.iterdir(), key=lambda path: path.name == "partition.json"):
        file.replace(target / file.name)
    flush(target)
    scratch.rmdir()
