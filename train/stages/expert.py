"""The stage `expert`: K experts, each trained alone on its cluster's file."""

import logging
import time
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddm.artifacts import check_sha256, digest, read_facts, write_artifact
from ddm.errors import ArtifactError, ConfigError, DdmError, within
from ddm.gaussian import MOMENTS, moments
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.schedules import schedule
from ddm.training import Batches, FitConfig
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from train.config import Config, changed, plain
from train.fit import NotFiniteError, fit
from train.launch import OnProgress, cores, run_jobs, workers_for
from train.progress import bars
from train.resume import drop_resume
from train.run_folder import claim, read_partition

log = logging.getLogger(__name__)


def expert_stem(config: Config, k: int) -> Path:
    """The path of expert k's artifact, without a suffix."""
    return config.folder / "experts" / f"{k:02d}" / "expert"


def fitted_facts(
    cfg: FitConfig, config: Config, partition: Partition, images_per_step: int
) -> dict[str, Any]:
    """What an artifact records about the training of its networks, and about what they belong to."""
    return {
        "config": plain(cfg),
        "shape": partition.shape,
        "schedule": config.schedule,
        "partition": partition.hash,
        "steps": cfg.steps,
        "images_seen": cfg.steps * images_per_step,
        "weights": "ema" if cfg.ema_decay > 0 else "raw",
    }


def artifact_is_made(stem: Path, key: str, stage: str) -> bool:
    """Whether a trained artifact exists, is whole, and was trained from what `key` is the hash of.

    Raises `ArtifactError` if it is damaged or was trained from something else: hours of training are never overwritten.
    """
    json, weights = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    if not json.exists():
        return False
    facts = read_facts(stem)
    if facts.get("key") != key:
        raise ArtifactError(
            f"{json} was made by another config or from other images: move {stem.parent} away to train it anew"
        )
    if not weights.exists():
        log.warning("%-10s %s is missing, so it is trained again", stage, weights)
        return False
    try:
        check_sha256(weights, facts["sha256"])
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete it to train it again") from error
    return True


def threads_per_expert(config: Config, k: int) -> int:
    """The CPU threads that train one of k experts: a function of the machine and the config, never of what is left to do.

    On a CPU, the last bits of an expert's weights depend on this number, on the kind of machine and on torch's version.
    """
    return config.expert.threads or max(1, cores() // min(k, cores()))


def _key(config: Config, partition: Partition, k: int) -> str:
    """The content hash of everything that determines expert k."""
    return digest(
        [
            changed(_expert_config(config)),
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
    partition = read_partition(config)
    with within("expert.unet"):
        config.expert.unet.check(partition.shape)
    with within("router.net"):  # now, not after days of training experts
        config.router.net.check(partition.shape)
    index, k = config.expert.index, partition.k
    if index is not None and index >= k:
        raise ConfigError(
            f"expert.index must be in [0, {k - 1}], the clusters of {config.folder}, got {index}"
        )
    wanted = range(k) if index is None else [index]
    todo = [i for i in wanted if not _is_made(config, partition, i)]
    if len(todo) < len(wanted):
        log.info("expert     up to date: %d of %d", len(wanted) - len(todo), len(wanted))
    if not todo:
        return
    claim(config)
    began = time.monotonic()
    results = _train(config, partition, todo)
    _raise_first(config, todo, results)
    log.info("expert     trained %d of %d in %.0f s", len(todo), k, time.monotonic() - began)


def _train(config: Config, partition: Partition, todo: Sequence[int]) -> list[Exception | None]:
    """Train experts, with a progress bar each; returns what became of them."""
    cfg = config.expert
    with bars() as progress:
        tasks = {}
        for k in todo:
            name = f"expert {k:02d}: {partition.names[k]}"[:24]
            tasks[k] = progress.add_task(name, total=cfg.steps, note="")

        def on_progress(news: tuple[int, int, float]) -> None:
            k, step, loss = news
            progress.update(tasks[k], completed=step, note=f"loss {loss:.4f}")

        # One expert alone needs no second process.
        asked = cfg.workers if cfg.index is None else 0
        workers = workers_for(len(todo), config.device, asked)
        threads = threads_per_expert(config, partition.k)
        return run_jobs(partial(train_expert, config), todo, workers, on_progress, threads)


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
    made = artifact_is_made(stem, _key(config, partition, k), f"expert {k:02d}")
    if made:
        drop_resume(stem.parent)  # left by a kill right after the artifact was written
    return made


def train_expert(config: Config, k: int, on_progress: OnProgress) -> None:
    """Train expert k from its cluster's file, and nothing else, and write its artifact; reports `(k, step, loss)`."""
    partition = read_partition(config)
    images = partition.cluster(config.folder / "partition", k)["images"]
    cfg, stem = _expert_config(config), expert_stem(config, k)
    seed = derive_seed(config.seed, RngStream.EXPERT, k)
    torch.manual_seed(seed)
    denoiser = cfg.build(partition.shape, schedule(**config.schedule))
    learning = ExpertLearning(denoiser, Batches(images, cfg.batch, seed, config.data.flip), cfg)

    def report(step: int, loss: float) -> None:
        on_progress((k, step, loss))

    try:
        fit(learning, cfg.steps, cfg, stem.parent, config.accelerator, report)
    except NotFiniteError as error:
        raise diverged(error, "expert") from error
    facts = {
        "kind": "expert",
        "index": k,
        "name": partition.names[k],
        "key": _key(config, partition, k),
        **fitted_facts(cfg, config, partition, cfg.batch),
    }
    gaussian = dict(zip(MOMENTS, moments(images, config.data.flip), strict=True))
    write_artifact(stem, {**denoiser.state_dict(), **gaussian}, facts)
    drop_resume(stem.parent)


def diverged(error: NotFiniteError, section: str) -> NotFiniteError:
    """The error with what to do about it, for the config's section that was trained."""
    return NotFiniteError(
        f"{error}; give run=FOLDER and a lower {section}.learning_rate, {section}.gradient_clip above 0, more "
        f"{section}.warmup_steps, or {section}.precision=32-true"
    )
