"""The stage `expert`: K experts, each trained alone on its cluster's file."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from ddm.artifacts import digest, file_of, read_facts
from ddm.errors import ArtifactError, ConfigError, DdmError, require
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from experts.denoiser import ExpertConfig
from train.config import Config
from train.jobs import Job, train_side_by_side
from train.launch import OnProgress, gpus, workers_for
from train.precision import with_precision
from train.resume import NEWEST, PREVIOUS, drop_resume
from train.run_folder import claim, read_clusters
from train.stages.denoiser import (
    artifact_is_made,
    check_networks,
    expert_config,
    hash_of,
    initial,
    learned,
    threads_per_expert,
    told,
    train_denoiser,
    validates,
    validation_images,
)

log = logging.getLogger(__name__)


def expert_stem(config: Config, k: int) -> Path:
    """The path of expert k's artifact, without a suffix."""
    return config.folder / "experts" / f"{k:02d}" / "expert"


def _training(config: Config, partition: Partition, k: int) -> str:
    """The content hash of everything that determines expert k but its steps: of its own cluster, and of no other."""
    return digest(
        [
            learned(replace(expert_config(config), steps=ExpertConfig.steps)),
            config.schedule,
            config.seed,
            k,
            config.data.flip,
            partition.hashes[_place(config, k)],
            *hash_of(initial(config)),
            *([asdict(config.privacy)] if config.privacy.sigma > 0 else []),
        ]
    )


def _key(config: Config, partition: Partition, k: int) -> str:
    return digest([_training(config, partition, k), config.expert.steps])


def _place(config: Config, k: int) -> int:
    """Where the cluster of expert k is in `read_clusters`: a shard has no other."""
    return k if config.expert.shard is None else 0


def train_experts(config: Config) -> None:
    """Train every expert that is not up to date, or `expert.index` alone; with `expert.shard`, the shard's.

    An expert that fails costs only itself: the others are trained first, then `DdmError` names it.
    """
    folder, partition = read_clusters(config)
    check_networks(config, partition.shape)
    asked, config = config, with_precision(config)
    index, k = config.expert.index, partition.k
    if config.expert.shard is not None:
        index = index or 0
    elif index is not None and index >= k:
        raise ConfigError(
            f"expert.index must be in [0, {k - 1}], the clusters of {folder}, got {index}"
        )
    wanted = range(k) if index is None else [index]
    todo = [i for i in wanted if not _is_made(config, partition, i)]
    if len(todo) < len(wanted):
        log.info("expert     up to date: %d of %d", len(wanted) - len(todo), len(wanted))
    if not todo:
        return
    claim(asked)
    began = time.monotonic()
    results = _train(config, partition, todo)
    _raise_first(config, todo, results)
    log.info("expert     trained %d of %d in %.0f s", len(todo), k, time.monotonic() - began)


def _train(config: Config, partition: Partition, todo: Sequence[int]) -> list[Exception | None]:
    """Train experts side by side; returns what became of them."""
    cfg = config.expert
    if config.device != "cpu" and config.launch.backend == "local":
        rule = f"be at most this machine's GPUs, {len(gpus())}"
        require(cfg.devices <= len(gpus()), "expert.devices", rule, cfg.devices)
    # One expert alone needs no second process.
    asked = cfg.workers if cfg.index is None and cfg.shard is None else 0
    workers = workers_for(len(todo), config.device, asked, cfg.devices)
    jobs = [_job(config, k) for k in todo]
    return train_side_by_side(config, jobs, workers, threads_per_expert(config, partition.k))


def _job(config: Config, k: int) -> Job:
    """The training of expert k: it reads its own cluster's file and what it starts from."""
    folder, partition = read_clusters(config)
    place = _place(config, k)
    reads = [folder / "partition.json", Partition.file(folder, place)]
    if validates(config, partition):
        reads.append(Partition.holdout_file(folder, place))
    if (start := initial(config)) is not None:
        reads += [file_of(start, suffix) for suffix in (".json", ".safetensors")]
    stem = expert_stem(config, k)
    return Job(
        f"expert {k:02d}",
        f"expert {k:02d}: {partition.names[place]}",
        partial(_train_numbered, k),
        stem.parent.relative_to(config.folder).as_posix(),
        reads,
        _training(config, partition, k),
        config.expert.steps,
        config.expert.batch,
        config.expert.devices,
    )


def _raise_first(config: Config, todo: Sequence[int], results: Sequence[Exception | None]) -> None:
    """Raise what made experts fail: a `DdmError` naming them, unless one of them failed by an error of ours."""
    failed = {k: error for k, error in zip(todo, results, strict=True) if error is not None}
    for error in failed.values():
        if not isinstance(error, DdmError | OSError):
            raise error
    if failed:
        reasons = "; ".join(f"expert {k:02d} failed: {error}" for k, error in failed.items())
        raise DdmError(
            f"{config.folder}: {reasons}. What is trained is kept; the same command resumes"
        ) from next(iter(failed.values()))


def _is_made(config: Config, partition: Partition, k: int) -> bool:
    stem = expert_stem(config, k)
    if _goes_on(config, partition, k):
        return False
    made = artifact_is_made(stem, _key(config, partition, k), f"expert {k:02d}")
    if made:
        drop_resume(stem.parent, keep_newest=True)  # left by a kill right after it was written
    return made


def _goes_on(config: Config, partition: Partition, k: int) -> bool:
    """Whether expert k is trained, by the same config but for fewer steps, and goes on from its last checkpoint.

    Raises `ArtifactError` if that is gone.
    """
    stem = expert_stem(config, k)
    if not file_of(stem, ".json").exists():
        return False
    facts = read_facts(stem)
    steps, more = facts.get("steps"), config.expert.steps
    if not (isinstance(steps, int) and 1 <= steps < more):
        return False
    shorter = replace(config, expert=replace(config.expert, steps=steps))
    if facts.get("key") != _key(shorter, partition, k):
        return False
    newest = stem.parent / NEWEST
    if not newest.exists() and not newest.with_name(PREVIOUS).exists():  # a kill may leave that one
        raise ArtifactError(
            f"{newest} is missing, so expert {k:02d} cannot go on from step {steps} to {more}: give "
            f"expert.steps={steps}, or start another from it with run=FOLDER expert.init={stem.parent}"
        )
    return True


def _train_numbered(k: int, config: Config, on_progress: OnProgress) -> None:
    train_expert(config, k, lambda news: on_progress(news[1:]))


def train_expert(config: Config, k: int, on_progress: OnProgress) -> None:
    """Train expert k from its cluster's file, and nothing else but what it starts from, and write its artifact.

    Reports `(k, step, loss)`.
    """
    folder, partition = read_clusters(config)
    place = _place(config, k)
    cluster = partition.cluster(folder, place)
    facts = {
        "kind": "expert",
        "name": partition.names[place],
        "cluster": partition.hashes[place],
        "count": partition.sizes[place],
        "key": _key(config, partition, k),
    }
    seed = derive_seed(config.seed, RngStream.EXPERT, k)

    def report(step: int, loss: float) -> None:
        on_progress((k, step, loss))

    train_denoiser(
        config,
        expert_config(config),
        cluster["images"],
        seed,
        expert_stem(config, k),
        facts,
        _training(config, partition, k),
        report,
        initial(config),
        with_moments=True,
        held_out=validation_images(config, folder, partition, place),
        conditions=told(config, partition, cluster, folder),
    )
