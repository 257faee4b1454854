"""The stage `router`: the posterior net, then posterior and derivative nets together."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ddm.artifacts import digest, write_artifact
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.schedules import schedule
from ddm.training import Batches
from router.networks import DerivativeNet
from router.router_module import PosteriorLearning, RouterLearning
from train.config import Config, changed
from train.fit import NotFiniteError, fit
from train.progress import bar
from train.resume import drop_resume
from train.run_folder import claim
from train.stages.expert import artifact_is_made, diverged, fitted_facts

log = logging.getLogger(__name__)


def train_router(config: Config) -> None:
    """Train the posterior net, then posterior and derivative nets together, and write both as one artifact."""
    folder = config.folder / "partition"
    cut = Partition.read(folder)
    if cut.k == 1:
        log.info("router     one cluster needs none")
        return
    stem = config.folder / "router" / "router"
    stages = [stem.parent / name for name in ("stage-1", "stage-2")]
    cfg = config.router
    key = digest([changed(cfg), config.schedule, config.seed, config.data.flip, cut.hash])
    if artifact_is_made(stem, key, "router"):
        for stage in stages:
            drop_resume(stage)
        log.info("router     up to date")
        return
    claim(config)
    began = time.monotonic()
    with bar("router", cfg.steps) as advance:
        nets = _train(config, cut, stages, advance)
    write_artifact(
        stem, nets.state_dict(), {"kind": "router", "key": key, **fitted_facts(cfg, config, cut)}
    )
    for stage in stages:
        drop_resume(stage)
    log.info("router     trained in %.0f s", time.monotonic() - began)


def _train(
    config: Config, cut: Partition, stages: Sequence[Path], advance: Callable[[int], None]
) -> torch.nn.ModuleDict:
    """The trained nets, `posterior` and `derivative`; `stages` are the folders of their checkpoints."""
    cfg = config.router
    whole = cut.all(config.folder / "partition")
    images, cluster = whole["images"], whole["cluster"]
    if config.data.flip:  # the experts see mirror images, so the mixture is over both
        images, cluster = torch.cat([images, images.flip(3)]), cluster.repeat(2)
    seed = derive_seed(config.seed, RngStream.ROUTER, 0)
    torch.manual_seed(seed)
    posterior, _ = cfg.build(cut.shape, cut.pi, schedule(**config.schedule))
    batches = Batches(images, cfg.images_per_step, seed)
    if batches.batch != cfg.batch:
        log.info("router     router.batch=%d rounded up to %d", cfg.batch, batches.batch)
    done = 0

    def report(step: int, _loss: float) -> None:
        nonlocal done
        advance(step - done)
        done = step

    def report_second(step: int, loss: float) -> None:
        report(cfg.switch_step + step, loss)

    try:
        first = PosteriorLearning(posterior, batches, cluster, cfg)
        fit(first, cfg.switch_step, cfg, stages[0], config.accelerator, report)
        derivative = DerivativeNet.from_trunk(posterior.scorer, cfg.bands)
        second = RouterLearning(posterior, derivative, batches, cluster, cfg)
        rest = cfg.steps - cfg.switch_step
        fit(second, rest, cfg, stages[1], config.accelerator, report_second)
    except NotFiniteError as error:
        raise diverged(error, "router") from error
    return torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative})
