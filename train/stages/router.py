"""The stage `router`: the posterior net, then posterior and derivative nets together."""

import logging
import time

import torch

from ddm.artifacts import digest, read_json, write_artifact
from ddm.errors import ArtifactError
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.schedules import schedule
from ddm.training import Batches
from router.networks import DerivativeNet
from router.router_module import PosteriorLearning, RouterLearning
from train.config import Config, plain
from train.fit import fit
from train.progress import bar
from train.stages.expert import fitted_facts

log = logging.getLogger(__name__)


def train_router(config: Config) -> None:
    """Train the posterior net, then posterior and derivative nets together, and write both as one artifact."""
    folder = config.folder / "partition"
    cut = Partition.read(folder)
    if cut.k == 1:
        log.info("router     one cluster needs none")
        return
    stem = config.folder / "router" / "router"
    cfg = config.router
    key = digest([plain(cfg), config.schedule, config.seed, config.data.flip, cut.hash])
    if stem.with_suffix(".json").exists():
        if read_json(stem.with_suffix(".json")).get("key") != key:
            raise ArtifactError(
                f"{stem}.json was made by another config or from other images: move {stem.parent} away to train it anew"
            )
        log.info("router     up to date")
        return
    began = time.monotonic()
    whole = cut.all(folder)
    images, cluster = whole["images"], whole["cluster"]
    if config.data.flip:  # the experts' images are mirrored at random, so the mixture is over both
        images, cluster = torch.cat([images, images.flip(3)]), cluster.repeat(2)
    seed = derive_seed(config.seed, RngStream.ROUTER, 0)
    torch.manual_seed(seed)
    posterior, _ = cfg.build(cut.shape, cut.pi, schedule(**config.schedule))
    batches = Batches(images, cfg.images_per_step, seed)
    if batches.batch != cfg.batch:
        log.info("router     router.batch=%d rounded up to %d", cfg.batch, batches.batch)
    with bar("router", cfg.steps) as advance:
        done = 0

        def report(step: int, loss: float, base: int = 0) -> None:
            nonlocal done
            advance(base + step - done)
            done = base + step

        first = PosteriorLearning(posterior, batches, cluster, cfg)
        stage1 = stem.parent / "stage-1"
        fit(first, cfg.switch_step, cfg, stage1, config.accelerator, report)
        derivative = DerivativeNet.from_trunk(posterior.scorer, cfg.bands)
        second = RouterLearning(posterior, derivative, batches, cluster, cfg)
        stage2 = stem.parent / "stage-2"
        fit(
            second,
            cfg.steps - cfg.switch_step,
            cfg,
            stage2,
            config.accelerator,
            lambda s, loss: report(s, loss, cfg.switch_step),
        )
    facts = {"kind": "router", "key": key, **fitted_facts(cfg, config, cut)}
    write_artifact(
        stem,
        torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative}).state_dict(),
        facts,
    )
    for stage in (stage1, stage2):
        (stage / "resume.ckpt").unlink(missing_ok=True)
    log.info("router     trained in %.0f s", time.monotonic() - began)
