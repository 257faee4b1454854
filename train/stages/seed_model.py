"""The stage `seed_model`: one network, trained on what may be shared, that all experts start from."""

import logging
import time
from dataclasses import replace
from functools import partial

from torch import Tensor

from ddm.artifacts import digest
from ddm.condition import ImageConditions
from ddm.errors import ConfigError
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from experts.denoiser import ExpertConfig
from train.config import Config
from train.data import ImageSet
from train.jobs import Job, train_side_by_side
from train.launch import OnProgress, run_jobs
from train.launch_config import LaunchConfig
from train.precision import with_precision
from train.progress import bars
from train.resume import drop_resume
from train.run_folder import claim, read_partition
from train.stages.denoiser import (
    artifact_is_made,
    check_networks,
    expert_config,
    learned,
    seed_stem,
    told,
    train_denoiser,
    validates,
    validation_images,
)

log = logging.getLogger(__name__)


def train_seed_model(config: Config, tell: OnProgress | None = None) -> None:
    """Train the seed model, if the config has one and it is not up to date; with launch.backend=ray on a node.

    With images of its own (`seed_model.data`) it is trained here all the same.
    """
    if config.seed_model.steps == 0:
        return
    if config.expert.init is not None:
        raise ConfigError(
            "seed_model.steps must be 0 where expert.init names a seed model of its own"
        )
    asked, config = config, with_precision(config)
    partition, stem = read_partition(config), seed_stem(config)
    check_networks(config, partition.shape)
    others = _others(config, partition)
    key = _key(config, partition.hash if others is None else others.hash)
    if artifact_is_made(stem, key, "seed_model"):
        drop_resume(stem.parent)  # left by a kill right after the artifact was written
        log.info("seed_model up to date")
        return
    claim(asked)
    began = time.monotonic()
    if config.launch.backend == "ray" and others is None:
        _train_away(config, partition, key)
        log.info("seed_model trained in %.0f s", time.monotonic() - began)
        return
    images: Tensor
    conditions = None
    if others is None:
        folder = config.folder / "partition"
        whole = partition.all(folder)
        images, conditions = whole["images"], told(config, partition, whole, folder)
    else:  # its labels may mean something else
        images = others.images
    with bars() as progress:
        task = progress.add_task("seed model", total=config.seed_model.steps, note="")

        def on_progress(news: tuple[int, float]) -> None:
            progress.update(task, completed=news[0], note=f"loss {news[1]:.4f}")
            if tell is not None:
                tell(news)

        (result,) = run_jobs(partial(_train, config, images, conditions), [key], 0, on_progress)
    if result is not None:
        raise result
    log.info("seed_model trained in %.0f s", time.monotonic() - began)


def _train_away(config: Config, partition: Partition, key: str) -> None:
    """Train it on a node of Ray, which gets the images of all clusters."""
    folder, stem = config.folder / "partition", seed_stem(config)
    reads = [folder / "partition.json"]
    reads += [Partition.file(folder, k) for k in range(partition.k)]
    if validates(config, partition):
        reads += [Partition.holdout_file(folder, k) for k in range(partition.k)]
    inside = stem.parent.relative_to(config.folder).as_posix()
    steps, batch = config.seed_model.steps, config.expert.batch
    job = Job("seed model", "seed model", _train_alone, inside, reads, key, steps, batch)
    (error,) = train_side_by_side(config, [job], 0, 1)
    if error is not None:
        raise error


def _train_alone(config: Config, on_progress: OnProgress) -> None:
    """On a node: all that is read is in the run's folder there."""
    train_seed_model(replace(config, launch=LaunchConfig()), on_progress)


def _train(
    config: Config,
    images: Tensor,
    conditions: ImageConditions | None,
    key: str,
    on_progress: OnProgress,
) -> None:
    facts = {"kind": "seed_model", "key": key}
    seed = derive_seed(config.seed, RngStream.SEED_MODEL, 0)

    def report(step: int, loss: float) -> None:
        on_progress((step, loss))

    cfg, stem = _config(config), seed_stem(config)
    held_out = validation_images(config, config.folder / "partition", read_partition(config), None)
    train_denoiser(
        config,
        cfg,
        images,
        seed,
        stem,
        facts,
        facts["key"],
        report,
        held_out=held_out,
        conditions=conditions,
    )
    drop_resume(stem.parent)


def _config(config: Config) -> ExpertConfig:
    """An expert's config with the seed model's steps and times."""
    cfg, asked = expert_config(config), config.seed_model
    t_min = cfg.t_min if asked.t_min is None else asked.t_min
    cfg = replace(cfg, steps=asked.steps, cooldown=0.0, cooldown_shape="linear")
    return replace(cfg, t_min=t_min, t_max=None)


def _others(config: Config, partition: Partition) -> ImageSet | None:
    """The images of its own that it is trained on, if any. Raises `ConfigError` if they have another shape."""
    if config.seed_model.data is None:
        return None
    others = config.seed_model.data.build()
    shape = list(others.images.shape[1:])
    if shape != partition.shape:
        raise ConfigError(f"seed_model.data must be images of {partition.shape}, got {shape}")
    return others


def _key(config: Config, images: str) -> str:
    """The content hash of everything that determines the seed model."""
    return digest(
        [learned(_config(config)), config.schedule, config.seed, config.data.flip, images]
    )
