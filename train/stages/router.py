"""The stage `router`: the posterior net, then posterior and derivative nets together.

What it is trained on is `router_data`'s.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import digest, file_of, read_facts, write_artifact
from ddm.bundle import Artifact, read_artifact
from ddm.errors import ArtifactError
from ddm.mixture import Mixture
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.training import Batches
from router.networks import DerivativeNet, RouterConfig
from router.router_module import PosteriorLearning, RouterLearning
from router.targets import weights_of_images
from train.config import Config, plain
from train.fit import NotFiniteError, Report, fit
from train.jobs import Job, train_side_by_side
from train.launch import OnProgress
from train.launch_config import LaunchConfig
from train.progress import bar
from train.resume import drop_resume
from train.run_folder import claim, read_partition
from train.stages.denoiser import artifact_is_made, diverged, fitted_facts, learned
from train.stages.expert import expert_stem
from train.stages.router_data import Data, data_of
from train.stages.warm_start import start_from
from train.watching import Watch

log = logging.getLogger(__name__)


def train_router(config: Config, report: Report | None = None) -> None:
    """Train the router of the run's partition; with launch.backend=ray on a node, which then gets what it is trained on.

    Owners who answer for their images (router.data=shards) are asked from here all the same.
    """
    cut = read_partition(config)
    if cut.k == 1:
        log.info("router     one cluster needs none")
        return
    stems = _expert_stems(config, cut)
    hashes = [read_facts(stem)["sha256"] for stem in stems]

    def experts() -> list[Artifact]:
        return [
            read_artifact(stem, None, {"cluster": cluster})
            for stem, cluster in zip(stems, cut.hashes, strict=True)
        ]

    def images() -> Iterator[Tensor]:
        folder = config.folder / "partition"
        return (cut.cluster(folder, k)["images"] for k in range(cut.k))

    away = None
    if config.launch.backend == "ray" and config.router.data != "shards":
        away = _reads(config, cut, stems)
    stem = config.folder / "router" / "router"
    with ExitStack() as stack:
        data = partial(data_of, config, cut.mixture, experts, images, stack)
        make_router(config, cut.mixture, stem, hashes, data, report=report, away=away)


def _reads(config: Config, cut: Partition, stems: Sequence[Path]) -> list[Path]:
    """The files that a node needs to train the router: those of the experts, or of all clusters."""
    folder = config.folder / "partition"
    files = [file_of(stem, suffix) for stem in stems for suffix in (".json", ".safetensors")]
    files = files or [Partition.file(folder, k) for k in range(cut.k)]
    return [folder / "partition.json", *files]


def _train_alone(config: Config, on_progress: OnProgress) -> None:
    """On a node: all that is read is in the run's folder there."""
    here = replace(config, launch=LaunchConfig())
    train_router(here, lambda step, loss: on_progress((step, loss)))


def make_router(
    config: Config,
    mixture: Mixture,
    stem: Path,
    made_of: Sequence[str],
    data: Callable[[], Data],
    start: tuple[Artifact, list[str]] | None = None,
    report: Report | None = None,
    away: Sequence[Path] | None = None,
) -> None:
    """Train the posterior net, then posterior and derivative nets together, and write both as one artifact.

    made_of: hashes of what else than the config and the mixture decides it. start: a router to start from, and the names
    of the clusters of its outputs. report: what else hears of the steps. away: the files to train it from on a node of Ray
    """
    stages = [stem.parent / name for name in ("stage-1", "stage-2")]
    cfg = config.router
    key = digest(
        [learned(cfg), config.schedule, config.seed, config.data.flip, mixture.hash, *made_of]
    )
    earlier = start is None and _is_of_earlier_experts(stem, key, cfg, mixture)
    if earlier and artifact_is_made(stem, read_facts(stem)["key"], "router"):
        log.warning(
            "router     stays as it is, trained on images of these experts before they were trained further: "
            "move %s away to train it anew",
            stem.parent,
        )
        return
    if artifact_is_made(stem, key, "router"):
        for stage in stages:
            drop_resume(stage)
        log.info("router     up to date")
        return
    claim(config)
    began = time.monotonic()
    if away is not None:
        folder = stem.parent.relative_to(config.folder).as_posix()
        steps, batch = cfg.steps, cfg.images_per_step
        job = Job("router", "router", _train_alone, folder, away, key, steps, batch)
        (error,) = train_side_by_side(config, [job], 0, 1)
        if error is not None:
            raise error
        log.info("router     trained in %.0f s", time.monotonic() - began)
        return
    with bar("router", cfg.steps) as advance:
        nets = _train(config, mixture, data(), stages, key, advance, start, report)
    facts: dict[str, Any] = {"kind": "router", "mixture": mixture.hash, "key": key}
    facts |= fitted_facts(cfg, config, mixture.shape, cfg.images_per_step)
    if start is not None:
        facts["init"] = {"sha256": start[0].facts["sha256"]}
    write_artifact(stem, nets.state_dict(), facts)
    for stage in stages:
        drop_resume(stage)
    log.info("router     trained in %.0f s", time.monotonic() - began)


def _is_of_earlier_experts(stem: Path, key: str, cfg: RouterConfig, mixture: Mixture) -> bool:
    """Whether a router is there that only its experts' later steps do not fit."""
    if cfg.data != "experts" or not file_of(stem, ".json").exists():
        return False
    facts = read_facts(stem)
    there = {**facts.get("config", {}), "checkpoint_every": cfg.checkpoint_every}
    alike = facts.get("mixture") == mixture.hash and there == plain(cfg)
    return facts.get("key") != key and alike


def _train(
    config: Config,
    mixture: Mixture,
    data: Data,
    stages: Sequence[Path],
    key: str,
    advance: Callable[[int], None],
    start: tuple[Artifact, list[str]] | None,
    tell: Report | None,
) -> torch.nn.ModuleDict:
    """The trained nets, `posterior` and `derivative`; `stages` are the folders of their checkpoints."""
    cfg = config.router
    images, cluster, gaussians = data
    seed = derive_seed(config.seed, RngStream.ROUTER, 0)
    torch.manual_seed(seed)
    posterior, derivative = cfg.build(mixture.shape, mixture.pi, gaussians.schedule, gaussians)
    warm = start is not None and start_from(posterior, derivative, *start, mixture.names)
    weights = weights_of_images(mixture.pi, cluster)
    chances = None if weights is None else weights[cluster]
    batches = Batches(images, cfg.images_per_step, seed, parts=cfg.accumulate, chances=chances)
    if batches.batch != cfg.batch:
        log.info("router     router.batch=%d rounded up to %d", cfg.batch, batches.batch)
    done = 0

    def report(step: int, loss: float) -> None:
        nonlocal done
        advance(step - done)
        done = step
        if tell is not None:
            tell(step, loss)

    def report_second(step: int, loss: float) -> None:
        report(cfg.switch_step + step, loss)

    watch = Watch(config.watch)
    try:
        first = PosteriorLearning(posterior, batches, cluster, cfg, weights)
        fit(first, cfg.switch_step, cfg, stages[0], config.accelerator, report, key, watch)
        if not warm:
            derivative = DerivativeNet.from_trunk(posterior, cfg.bands)
        second = RouterLearning(posterior, derivative, batches, cluster, cfg, weights)
        rest = cfg.steps - cfg.switch_step
        fit(second, rest, cfg, stages[1], config.accelerator, report_second, key, watch)
    except NotFiniteError as error:
        raise diverged(error, "router") from error
    return torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative})


def _expert_stems(config: Config, cut: Partition) -> list[Path]:
    """The artifacts that the router is trained from: none if it is trained on the clusters' images.

    Raises `ArtifactError` naming an expert that is not trained yet.
    """
    if config.router.data != "experts":
        return []
    stems = [expert_stem(config, k) for k in range(cut.k)]
    for stem in stems:
        if not file_of(stem, ".json").exists():
            raise ArtifactError(
                f"router.data=experts needs {file_of(stem, '.json')}: run the stage expert first"
            )
    return stems
