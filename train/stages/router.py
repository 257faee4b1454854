"""The stage `router`: the posterior net, then posterior and derivative nets together."""

import logging
import time

import torch

from ddm.artifacts import digest, read_json, write_artifact
from ddm.errors import ArtifactError
from ddm.partition import Partition
from ddm.rng import Use, seed_of
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
    own = config.router
    key = digest([plain(own), config.schedule, config.seed, config.data.flip, cut.hash])
    if stem.with_suffix(".json").exists():
        if read_json(stem.with_suffix(".json")).get("key") != key:
            raise ArtifactError(
                f"{stem}.json was made by another config or from other pictures: move {stem.parent} away to train it anew"
            )
        log.info("router     up to date")
        return
    began = time.monotonic()
    whole = cut.all(folder)
    images, cluster = whole["images"], whole["cluster"]
    if config.data.flip:  # the experts' pictures are mirrored at random, so the mixture is over both
        images, cluster = torch.cat([images, images.flip(3)]), cluster.repeat(2)
    seed = seed_of(config.seed, Use.ROUTER, 0)
    torch.manual_seed(seed)
    posterior, _ = own.build(cut.shape, cut.pi, schedule(**config.schedule))
    batches = Batches(images, own.batch, seed)
    with bar("router", own.steps) as advance:
        done = 0

        def report(step: int, loss: float, base: int = 0) -> None:
            nonlocal done
            advance(base + step - done)
            done = base + step

        first = PosteriorLearning(posterior, batches, cluster, own)
        stage1 = stem.parent / "stage-1"
        fit(first, own.switch_step, own, stage1, config.accelerator, report)
        derivative = DerivativeNet.from_trunk(posterior.scorer, own.bands)
        second = RouterLearning(posterior, derivative, batches, cluster, own)
        stage2 = stem.parent / "stage-2"
        fit(
            second,
            own.steps - own.switch_step,
            own,
            stage2,
            config.accelerator,
            lambda s, loss: report(s, loss, own.switch_step),
        )
    facts = {"kind": "router", "key": key, **fitted_facts(own, config, cut)}
    write_artifact(stem, torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative}).state_dict(), facts)
    for stage in (stage1, stage2):
        (stage / "resume.ckpt").unlink(missing_ok=True)
    log.info("router     trained in %.0f s", time.monotonic() - began)
