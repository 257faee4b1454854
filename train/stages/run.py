"""Running the stages of a run in their order."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from train.config import STAGES, Config
from train.evaluation.classifier import check_classes, classes_of
from train.lock import locked
from train.run_folder import check_claim, read_partition
from train.stages.bundle import make_bundle
from train.stages.evaluate import evaluate_stage
from train.stages.expert import expert_stem, train_experts
from train.stages.living import grow, remove, reroute, retrain
from train.stages.monolith import train_monoliths
from train.stages.partition import make_partition
from train.stages.router import train_router
from train.stages.sample import sample_images
from train.stages.seed_model import train_seed_model
from train.stages.shard import export_shards, make_shard


def run(config: Config, stages: Sequence[str] = STAGES) -> None:
    """Run the stages and commands in their order. Raises a `DdmError` that says what to change."""
    check_before(config, stages)
    does: dict[str, Callable[[Config], object]] = {
        "shard": make_shard,
        "partition": make_partition,
        "export": export_shards,
        "answer": _answer,
        "seed_model": train_seed_model,
        "expert": train_experts,
        "router": train_router,
        "bundle": make_bundle,
        "remove": remove,
        "retrain": retrain,
        "grow": grow,
        "reroute": reroute,
        "monolith": lambda config: train_monoliths(config, config.evaluate),
        "sample": sample_images,
        "evaluate": evaluate_stage,
    }
    # Several machines may each train one expert in a folder that they share; samples have names of their own.
    index = config.expert.index if list(stages) == ["expert"] else None
    part = None if index is None else expert_stem(config, index).parent
    shares = list(stages) in (["sample"], ["answer"])
    with nullcontext() if shares else locked(config.folder, part):
        for name, stage in does.items():
            if name in stages:
                stage(config)
            if name == "partition" and "evaluate" in stages:
                _check_classes(config)


def _answer(config: Config) -> None:
    from train.ray_owners import answer  # Ray takes seconds to import

    answer(config)


def check_before(config: Config, stages: Sequence[str]) -> None:
    """Raise `DdmError` for what can be refused before any stage."""
    if "evaluate" in stages:
        config.evaluate.check_files("evaluate")
        config.samplers(config.evaluate, "evaluate")
    if not set(stages) <= {"shard", "answer"}:  # which train nothing in the run's folder
        check_claim(config)


def _check_classes(config: Config) -> None:
    """Raise `ConfigError` before any training if evaluation wants a classifier of images of one class."""
    if "classifier" in config.evaluate.features:
        whole = read_partition(config).all(config.folder / "partition")
        check_classes(classes_of(whole))
