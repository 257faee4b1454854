"""The stage `expert`: K experts, each alone on its cluster's file, in this process or in several side by side."""

import logging
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddm.artifacts import digest, read_json, write_artifact
from ddm.errors import ArtifactError, ConfigError, DdmError, within
from ddm.gaussian import MOMENTS, moments
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.schedules import schedule
from ddm.training import Batches, FitConfig
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from train.config import Config, plain
from train.fit import fit
from train.launch import OnProgress, run_jobs, workers_for
from train.progress import bars

log = logging.getLogger(__name__)


def expert_stem(config: Config, k: int) -> Path:
    """Where the artifact of expert k lies, without its suffix."""
    return config.folder / "experts" / f"{k:02d}" / "expert"


def fitted_facts(cfg: FitConfig, config: Config, partition: Partition) -> dict[str, Any]:
    """What an artifact says of how its networks were fitted, and of what they belong to."""
    return {
        "config": plain(cfg),
        "shape": partition.shape,
        "schedule": config.schedule,
        "partition": partition.hash,
        "steps": cfg.steps,
        "images_seen": cfg.steps * cfg.batch,
        "weights": "ema" if cfg.ema_decay > 0 else "raw",
    }


def _key(config: Config, partition: Partition, k: int) -> str:
    """The content hash of all that makes expert k what it is."""
    return digest(
        [
            plain(_expert_config(config)),
            config.schedule,
            config.seed,
            config.data.flip,
            partition.hash,
            partition.hashes[k],
        ]
    )


def _expert_config(config: Config) -> ExpertConfig:
    return ExpertConfig(
        **{field.name: getattr(config.expert, field.name) for field in fields(ExpertConfig)}
    )


def train_experts(config: Config) -> None:
    """Train every expert that is not up to date, or `expert.index` alone.

    An expert that fails costs only itself: the others are trained first, then `DdmError` names it.
    """
    partition = Partition.read(config.folder / "partition")
    with within("expert.unet"):
        config.expert.unet.check(partition.shape)
    with within("router.net"):  # here, so that a bad router size is known before days of training
        config.router.net.check(partition.shape)
    index = config.expert.index
    if index is not None and index >= partition.k:
        raise ConfigError(
            f"expert.index must be in [0, {partition.k - 1}], the clusters of {config.folder}, got {index}"
        )
    wanted = range(partition.k) if index is None else [index]
    todo = [k for k in wanted if not _up_to_date(config, partition, k)]
    if len(todo) < len(wanted):
        log.info("expert     up to date: %d of %d", len(wanted) - len(todo), len(wanted))
    if not todo:
        return
    began = time.monotonic()
    with bars() as progress:
        tasks = {
            k: progress.add_task(
                f"expert {k:02d}: {partition.names[k]}"[:24], total=config.expert.steps, note=""
            )
            for k in todo
        }

        def on_progress(news: tuple[int, int, float]) -> None:
            k, step, loss = news
            progress.update(tasks[k], completed=step, note=f"loss {loss:.4f}")

        workers = workers_for(len(todo), config.device, config.expert.workers)
        results = run_jobs(partial(train_expert, config), todo, workers, on_progress)
    failed = [
        (k, result)
        for k, result in zip(todo, results, strict=True)
        if isinstance(result, Exception)
    ]
    if failed:
        k, error = failed[0]
        raise DdmError(
            f"expert {k:02d} of {config.folder} failed: {error}. Run the same command again to resume"
        ) from error
    log.info(
        "expert     trained %d of %d in %.0f s", len(todo), partition.k, time.monotonic() - began
    )


def _up_to_date(config: Config, partition: Partition, k: int) -> bool:
    """Whether expert k is there and made of the same; one made of something else is refused, never overwritten."""
    path = expert_stem(config, k).with_suffix(".json")
    if not path.exists():
        return False
    if read_json(path).get("key") != _key(config, partition, k):
        raise ArtifactError(
            f"{path} was made by another config or from other images: move {path.parent} away to train it anew"
        )
    return True


def train_expert(config: Config, k: int, on_progress: OnProgress) -> None:
    """Train expert k from its cluster's file, and nothing else, and write its artifact; tells `(k, step, loss)`."""
    partition = Partition.read(config.folder / "partition")
    images = partition.cluster(config.folder / "partition", k)["images"]
    cfg, stem = _expert_config(config), expert_stem(config, k)
    seed = derive_seed(config.seed, RngStream.EXPERT, k)
    torch.manual_seed(seed)
    denoiser = cfg.build(partition.shape, schedule(**config.schedule))
    learning = ExpertLearning(denoiser, Batches(images, cfg.batch, seed, config.data.flip), cfg)
    fit(
        learning,
        cfg.steps,
        cfg,
        stem.parent,
        config.accelerator,
        lambda step, loss: on_progress((k, step, loss)),
    )
    facts = {
        "kind": "expert",
        "index": k,
        "name": partition.names[k],
        "key": _key(config, partition, k),
        **fitted_facts(cfg, config, partition),
    }
    gaussian = dict(zip(MOMENTS, moments(images, config.data.flip), strict=True))
    write_artifact(stem, {**denoiser.state_dict(), **gaussian}, facts)
    (stem.parent / "resume.ckpt").unlink(missing_ok=True)
