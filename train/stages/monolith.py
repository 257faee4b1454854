"""The stage `monolith`: one model on all images, the baseline of the table."""

import logging
from dataclasses import replace

from ddm.errors import ArtifactError
from train.config import Config, EvaluateConfig
from train.run_folder import check_claim, read_partition
from train.stages.bundle import make_bundle
from train.stages.expert import train_experts
from train.stages.partition import make_partition

log = logging.getLogger(__name__)


def monolith_config(config: Config, evaluation: EvaluateConfig) -> Config | None:
    """The run with `partition.k=1` of the row DDIM; None if no such row is wanted.

    The same network and, unless `monolith_steps` says otherwise, as many images seen as all experts together.
    """
    cut = read_partition(config)
    steps = evaluation.monolith_steps
    if steps is None:
        steps = config.expert.steps * cut.k
    if steps == 0 or cut.k == 1 or "DDIM" not in evaluation.methods:
        return None
    return replace(
        config,
        run=str(config.folder / "monolith"),
        partition=replace(config.partition, k=1),
        expert=replace(config.expert, steps=steps, index=None),
    )


def train_monolith(config: Config, evaluation: EvaluateConfig) -> Config | None:
    """Train the one model that `evaluation` compares with, and bundle it; returns its config, None where none is wanted."""
    monolith = monolith_config(config, evaluation)
    if monolith is None:
        return None
    log.info("monolith   one model on all images, in %s", monolith.folder)
    check_claim(monolith)
    make_partition(monolith)
    train_experts(monolith)
    make_bundle(monolith)
    return monolith


def trained_monolith(config: Config, evaluation: EvaluateConfig) -> Config | None:
    """The config of the trained monolith; None if none is wanted. Raises `ArtifactError` if it is not trained yet."""
    monolith = monolith_config(config, evaluation)
    if monolith is not None and not (monolith.folder / "bundle").is_dir():
        raise ArtifactError(f"{monolith.folder} is missing: train it with the stage 'monolith'")
    return monolith
