"""Training one denoiser and writing its artifact: what the stages `seed_model` and `expert` share."""

import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import check_sha256, file_of, read_facts, write_artifact
from ddm.bundle import IMAGE_RANGE, Artifact, read_artifact, signature_of
from ddm.condition import ImageConditions
from ddm.errors import ArtifactError, ConfigError, shown, within
from ddm.gaussian import MOMENTS, moments
from ddm.partition import Partition
from ddm.privacy import PrivacyConfig, gaussian_epsilon, private_moments
from ddm.schedules import schedule
from ddm.training import Batches, FitConfig
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from experts.unet import UNetConfig
from train.config import Config, changed, plain
from train.fit import NotFiniteError, Report, fit
from train.launch import cores
from train.ranks import current
from train.resume import drop_resume
from train.watching import Watch

log = logging.getLogger(__name__)

# Held-out images, and what an expert is told of them.
HeldOut = tuple[Tensor | None, ImageConditions | None]

_SAME = ("unet", "parameterization", "sigma_data")  # what weights belong to


def expert_config(config: Config) -> ExpertConfig:
    """What of `config.expert` decides what an expert learns, but for what it starts from."""
    return ExpertConfig(
        **{field.name: getattr(config.expert, field.name) for field in fields(ExpertConfig)}
    )


def learned(cfg: FitConfig) -> dict[str, Any]:
    """The keys of a config of training that decide what is learned and are not at their defaults, for hashes."""
    return changed(replace(cfg, checkpoint_every=FitConfig.checkpoint_every))


def threads_per_expert(config: Config, k: int) -> int:
    """The CPU threads that train one of k experts: a function of the machine and the config, never of what is left to do.

    On a CPU, the last bits of an expert's weights depend on this number, on the kind of machine and on torch's version.
    """
    return config.expert.threads or max(1, cores() // min(k, cores()))


def seed_stem(config: Config) -> Path:
    """The path of the seed model's artifact, without a suffix."""
    return config.folder / "seed_model" / "seed_model"


def initial(config: Config) -> Path | None:
    """The artifact, without a suffix, whose weights experts start from; None for fresh ones."""
    if config.expert.init is not None:
        return artifact_stem(config.expert.init)
    return seed_stem(config) if config.seed_model.steps > 0 else None


def artifact_stem(path: str) -> Path:
    """The artifact that a user's path means, without a suffix: its folder, one of its files, or a run of one expert.

    Raises `ArtifactError` for a run of several experts.
    """
    given = Path(path)
    if given.suffix in (".json", ".safetensors"):
        return given.with_suffix("")
    experts = sorted(file.parent for file in given.glob("experts/*/expert.json"))
    if len(experts) > 1:
        raise ArtifactError(
            f"{path} has {len(experts)} experts: give one of them, such as {experts[0]}"
        )
    for inner in ("expert", "seed_model", "experts/00/expert"):
        if file_of(given / inner, ".json").exists():
            return given / inner
    return given


def hash_of(stem: Path | None) -> list[str]:
    """The hash of what is started from, if anything is, for the keys of what starts there.

    Raises `ArtifactError` naming the file if it is missing.
    """
    if stem is None:
        return []
    if not file_of(stem, ".json").exists():
        raise ArtifactError(
            f"{file_of(stem, '.json')} is missing: run the stage 'seed_model' first, or let "
            "expert.init name an artifact: an expert's or a seed model's folder or file"
        )
    return [read_facts(stem)["sha256"]]


def check_networks(config: Config, shape: list[int]) -> None:
    """Raise `ConfigError` naming a size that cannot be: before the first network is trained, not after days."""
    with within("expert.unet"):
        config.expert.unet.check(shape)
    with within("router.net"):
        config.router.net.check(shape)


def train_denoiser(
    config: Config,
    cfg: ExpertConfig,
    images: Tensor,
    seed: int,
    stem: Path,
    facts: dict[str, Any],
    of: str,
    report: Report,
    start: Path | None = None,
    with_moments: bool = False,
    held_out: HeldOut = (None, None),
    conditions: ImageConditions | None = None,
) -> None:
    """Train a denoiser on the images, uint8 `[N, C, H, W]`, and write it to `stem` with the `facts` and those of its training.

    of: the hash of what it is trained from, which its checkpoints must have.
    start: the artifact, without a suffix, whose weights it starts from. with_moments: also write the images' mean and
    variance, which an expert gives away and a seed model does not. held_out: images for validation, likewise.
    conditions: of the images, for an expert with one; how many images show what is then in the artifact.
    The last checkpoint stays, for more steps.
    """
    shape = list(images.shape[1:])
    torch.manual_seed(seed)
    names = conditions.vocabulary.names if conditions else []
    denoiser = cfg.build(shape, schedule(**config.schedule), condition=len(names))
    facts = {**facts, **fitted_facts(cfg, config, shape, cfg.batch)}
    if config.data.flip:
        facts["flip"] = True
    if conditions is not None:
        facts["condition"] = conditions.facts
    if start is not None:
        first = _matching(start, facts)
        weights = {name: tensor for name, tensor in first.tensors.items() if name not in MOMENTS}
        # A condition that the first one does not have is embedded as zero: the same function.
        new = {k: v for k, v in denoiser.state_dict().items() if k.startswith("network.condition.")}
        denoiser.load_state_dict({**new, **weights})
        seen = first.facts["images_seen"] + first.facts.get("init", {}).get("images_seen", 0)
        facts["init"] = {"sha256": first.facts["sha256"], "images_seen": seen}
    ranks = current()
    batches = Batches(
        images, cfg.batch, seed, config.data.flip, cfg.accumulate, ranks.rank, ranks.size
    )
    learning = ExpertLearning(denoiser, batches, cfg, conditions)
    held_images, held_conditions = held_out
    watch = Watch(config.watch, held_images, cfg.ema_also, held_conditions)
    try:
        decay = fit(learning, cfg.steps, cfg, stem.parent, config.accelerator, report, of, watch)
    except NotFiniteError as error:
        raise diverged(error, "expert") from error
    if ranks.rank > 0:
        return
    if cfg.ema_also:
        facts["ema_decay"] = decay
    tensors = denoiser.state_dict()
    if with_moments and config.privacy.sigma > 0:
        tensors |= dict(
            zip(MOMENTS, private_moments(images, config.data.flip, config.privacy), strict=True)
        )
        facts["privacy"] = _privacy_facts(config.privacy)
    elif with_moments:
        tensors |= dict(zip(MOMENTS, moments(images, config.data.flip), strict=True))
    signature_of(file_of(stem, ".json")).unlink(missing_ok=True)  # of fewer steps
    write_artifact(stem, tensors, facts)
    drop_resume(stem.parent, keep_newest=True)


def _privacy_facts(cfg: PrivacyConfig) -> dict[str, float]:
    """What may be said of the moments, of one release of them."""
    epsilon = gaussian_epsilon(cfg.sigma, cfg.delta)
    log.info("expert     moments are (%.3g, %g)-differentially private", epsilon, cfg.delta)
    return {**asdict(cfg), "epsilon": epsilon}


def validates(config: Config, partition: Partition) -> bool:
    """Whether there are held-out images and something asks for them."""
    asked = config.watch.validate_every > 0 or bool(config.expert.ema_also)
    return asked and bool(partition.holdout_sizes)


def told(
    config: Config, partition: Partition, images: dict[str, Tensor], folder: Path
) -> ImageConditions | None:
    """What the config's experts are told of images of a partition; None for nothing.

    Raises `ArtifactError` if the partition in the folder does not hold it.
    """
    condition = config.expert.condition
    return None if condition == "none" else partition.conditions(images, condition, folder)


def validation_images(config: Config, folder: Path, partition: Partition, k: int | None) -> HeldOut:
    """The held-out images of cluster k of the partition in a folder, or of all for None.

    (None, None) if there are none or nothing asks for them.
    """
    if not validates(config, partition):
        return None, None
    held = partition.holdout(folder) if k is None else partition.cluster_holdout(folder, k)
    return held["images"], told(config, partition, held, folder)


def _matching(stem: Path, facts: dict[str, Any]) -> Artifact:
    """The artifact at a stem. Raises `ConfigError` if its weights are not those of the network that the facts describe."""
    found = read_artifact(stem, None, {})
    there = {**found.facts, **found.facts.get("config", {})}
    here = {**facts, **facts["config"]}
    if isinstance(there.get("unet"), dict):  # an option that is newer has its default there
        there["unet"] = {**plain(UNetConfig()), **there["unet"]}
    for key in ("shape", "schedule", *_SAME):
        if there.get(key) != here[key]:
            raise ConfigError(
                f"expert.init must be an artifact with the same {key}: {file_of(stem, '.json')} has "
                f"{there.get(key)}, this config {here[key]}"
            )
    known, wanted = found.facts.get("condition") or {}, facts.get("condition", {})
    if known and any(known.get(key) != wanted.get(key) for key in ("kind", "names")):
        raise ConfigError(
            f"expert.init must be an artifact of the same condition, or of none: {file_of(stem, '.json')} has "
            f"{shown(known.get('names'))}, this config {shown(wanted.get('names'))}"
        )
    return found


def fitted_facts(
    cfg: FitConfig, config: Config, shape: list[int], images_per_step: int
) -> dict[str, Any]:
    """What an artifact records about the training of its networks, and about the images that they take."""
    return {
        "config": plain(cfg),
        "shape": shape,
        "range": IMAGE_RANGE,
        "schedule": config.schedule,
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


def diverged(error: NotFiniteError, section: str) -> NotFiniteError:
    """The error with what to do about it, for the config's section that was trained."""
    return NotFiniteError(
        f"{error}; give run=FOLDER and a lower {section}.learning_rate, {section}.gradient_clip above 0, more "
        f"{section}.warmup_steps, or {section}.precision=32-true"
    )
