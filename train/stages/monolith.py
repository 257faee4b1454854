"""The stage `monolith`: one model on all images, the baseline of the table."""

import logging
from dataclasses import replace

from ddm.artifacts import read_facts
from ddm.errors import ArtifactError
from train.config import BundleConfig, Config, SeedModelConfig
from train.evaluation_config import EvaluateConfig
from train.precision import with_precision
from train.run_folder import check_claim, read_partition
from train.stages.bundle import make_bundle
from train.stages.denoiser import initial
from train.stages.expert import train_experts
from train.stages.partition import make_partition

log = logging.getLogger(__name__)


def monolith_configs(config: Config, evaluation: EvaluateConfig) -> dict[str, Config]:
    """The runs with `partition.k=1` of the rows that are one model, by row; none of those that are not wanted.

    `one-model`: unless `monolith_steps` says otherwise, it sees as many images as all experts together.
    `one-model-time`: as many as one expert, so that it takes as long, where each expert has a machine of its own.
    Both have an expert's network, start from what the experts start from, learn and move images at every t, and have
    the same seed model for autoguidance, if there is one.
    """
    config = with_precision(config)
    k, steps = read_partition(config).k, config.expert.steps
    alike = steps * k if evaluation.monolith_steps is None else evaluation.monolith_steps
    rows = {"one-model": ("monolith", alike), "one-model-time": ("monolith-time", steps)}
    if k == 1:
        return {}
    start = initial(config)
    guides = None if config.seed_model.above is None else 1.0
    return {
        row: replace(
            config,
            run=str(config.folder / folder),
            partition=replace(config.partition, k=1),
            seed_model=SeedModelConfig(above=guides),
            bundle=BundleConfig(half=config.bundle.half),
            expert=replace(
                config.expert,
                steps=count,
                index=None,
                init=None if start is None else str(start),
                t_max=None,
            ),
        )
        for row, (folder, count) in rows.items()
        if row in evaluation.methods and count > 0
    }


def train_monoliths(config: Config, evaluation: EvaluateConfig) -> dict[str, Config]:
    """Train and bundle the models that `evaluation` compares with; returns their configs by row."""
    wanted = monolith_configs(config, evaluation)
    for row, monolith in wanted.items():
        log.info("monolith   %s: one model on all images, in %s", row, monolith.folder)
        check_claim(monolith)
        make_partition(monolith)
        train_experts(monolith)
        make_bundle(monolith)
    return wanted


def trained_monoliths(config: Config, evaluation: EvaluateConfig) -> dict[str, Config]:
    """The configs of the trained ones by row. Raises `ArtifactError` if one is not trained yet."""
    wanted = monolith_configs(config, evaluation)
    for monolith in wanted.values():
        if not (monolith.folder / "bundle").is_dir():
            raise ArtifactError(f"{monolith.folder} is missing: train it with the stage 'monolith'")
        steps = read_facts(monolith.folder / "bundle" / "expert-00")["steps"]
        asked = monolith.expert.steps
        if steps != asked:
            raise ArtifactError(
                f"{monolith.folder} was trained for {steps} steps, not {asked}: train it with the stage 'monolith'"
            )
    return wanted
