"""`ddm import diffusers FOLDER`: an artifact from a `UNet2DModel`."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ddm.artifacts import digest, read_json, read_tensors, replaced, sha256, write_artifact
from ddm.bundle import IMAGE_RANGE
from ddm.errors import ArtifactError, ConfigError, one_of, require
from ddm.gaussian import MOMENTS, moments
from ddm.mixture import is_whole
from ddm.partition import Partition
from ddm.schedules import schedule
from experts.denoiser import ExpertConfig, LossWeight, Parameterization
from train.config import plain
from train.exchange.unet2d import from_their_config, from_their_tensors

log = logging.getLogger(__name__)

# Whose keys mean the same: a process of discrete steps, and what the network predicts.
_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
_USUAL = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
_POWERS = {"linear": 1.0, "scaled_linear": 2.0}
_COSINE = "squaredcos_cap_v2"
# With these weights, our loss of x0 is the squared error of what the network predicts.
_PREDICTIONS: dict[str, tuple[Parameterization, LossWeight]] = {
    "epsilon": ("epsilon", "snr"),
    "v_prediction": ("v", "edm"),
    "sample": ("raw", "constant"),
}


@dataclass
class ImportConfig:
    """`ddm import diffusers FOLDER`.

    out: the folder that is written; null for `imported/` and the name of FOLDER
    shard: the folder of the cluster whose expert it is; null for a cluster of its own, of unknown images
    name: of a cluster of its own; null for the name of FOLDER
    count: images of a cluster of its own, its weight in a mixture; at least 1
    size: the side of its images, where sample_size is null in its config
    num_train_timesteps, beta_start, beta_end, beta_schedule, rescale_betas_zero_snr, prediction_type: of the scheduler
        that it was trained with; null for those of its scheduler_config.json
    """

    out: str | None = None
    shard: str | None = None
    name: str | None = None
    count: int = 1
    size: int | None = None
    num_train_timesteps: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None
    rescale_betas_zero_snr: bool | None = None
    prediction_type: str | None = None


@dataclass(frozen=True)
class Trained:
    """What a scheduler says of training: our process, the number of its steps, and the prediction."""

    schedule: dict[str, Any]
    timesteps: int
    prediction: str


def import_diffusers(folder: Path, cfg: ImportConfig) -> Path:
    """Write the artifact of a `UNet2DModel` in a folder, or of a pipeline's in `unet/`; returns its folder.

    It is an expert's, which is also a seed model or a single model to start from. Only JSON and safetensors are read.

    Raises `ConfigError` or `ArtifactError` naming the file or the key, the rule and the value.
    """
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder: give that of a UNet2DModel or of a pipeline"
        )
    unet = _network_folder(folder)
    trained = _trained(folder, cfg)
    with _of(unet / "config.json"):
        config, shape = from_their_config(
            read_json(unet / "config.json"), trained.timesteps, cfg.size
        )
    weights = unet / "diffusion_pytorch_model.safetensors"
    tensors = from_their_tensors(read_tensors(weights), config, shape, weights)
    parameterization, loss_weight = _PREDICTIONS[trained.prediction]
    expert = ExpertConfig(
        unet=config, parameterization=parameterization, loss_weight=loss_weight, sigma_data=1.0
    )
    expert.check()
    source = sha256(weights)
    cluster, images = _cluster(cfg, folder, shape, source)
    out = Path(cfg.out or Path("imported") / folder.resolve().name)
    for name in ("expert.json", "expert.safetensors", "config.yaml"):
        if (out / name).exists():
            raise ArtifactError(f"{out / name} exists: give out=FOLDER, or move it away")
    facts = {
        "kind": "expert",
        **cluster,
        "config": plain(expert),
        "shape": shape,
        "range": IMAGE_RANGE,
        "schedule": trained.schedule,
        "steps": 0,
        "images_seen": 0,
        "weights": "raw",
        "imported": {"class": "UNet2DModel", "sha256": source},
    }
    named = {f"network.{name}": tensor.float() for name, tensor in tensors.items()}
    write_artifact(out / "expert", named | _moments(images, shape), facts)
    _write_config(out, trained.schedule, expert)
    log.info(
        "imported   %s: %s of %s, %.1fM parameters, %s images of %s",
        out,
        trained.prediction,
        schedule(**trained.schedule),
        sum(tensor.numel() for tensor in tensors.values()) / 1e6,
        "x".join(map(str, shape)),
        cluster["name"] if images is not None else "a cluster that is not known",
    )
    return out


def _network_folder(folder: Path) -> Path:
    """The folder of the network: that of a pipeline of a network and a scheduler alone, or `folder`."""
    pipeline = folder / "model_index.json"
    parts = read_json(pipeline) if pipeline.exists() else {}
    for name, kind in parts.items():
        own = name.startswith("_") or name in ("unet", "scheduler") or kind in (None, [None, None])
        require(own, str(pipeline), "be of a pipeline with unet and scheduler alone", name)
    if not (folder / "unet").is_dir():
        return folder
    if (folder / "unet_ema").is_dir():
        raise ArtifactError(
            f"{folder} has the networks unet and unet_ema: give one, such as {folder / 'unet_ema'}"
        )
    return folder / "unet"


def _trained(folder: Path, cfg: ImportConfig) -> Trained:
    inside, beside = Path("scheduler", "scheduler_config.json"), Path("scheduler_config.json")
    files = (folder / inside, folder / beside, folder.parent / inside)
    file = next((file for file in files if file.exists()), None)
    found: Mapping[str, Any] = {} if file is None else read_json(file)
    if file is None and cfg.prediction_type is None:
        raise ConfigError(
            f"prediction_type must be given for {folder}, which has no scheduler_config.json, and beta_schedule, "
            "beta_start, beta_end and num_train_timesteps where they are not linear, 0.0001, 0.02 and 1000",
            "prediction_type",
        )
    given = {key: getattr(cfg, key) for key in _USUAL if getattr(cfg, key) is not None}
    with _of(file):
        if file is not None and found.get("_class_name") not in _SCHEDULERS:
            raise one_of("_class_name", found.get("_class_name"), _SCHEDULERS)
        for key in ("trained_betas", "use_flow_sigmas"):
            require(not found.get(key), key, "not be set", found.get(key))
        kind = found.get("timestep_type", "discrete")
        require(kind == "discrete", "timestep_type", "be 'discrete'", kind)
        return _as_ours({**_USUAL, **found, **given})


def _as_ours(theirs: Mapping[str, Any]) -> Trained:
    """Of a scheduler's keys."""
    steps, betas = theirs["num_train_timesteps"], theirs["beta_schedule"]
    whole = is_whole(steps, 1_000_000)
    require(whole, "num_train_timesteps", "be a whole number in [1, 1000000]", steps)
    names = (*_POWERS, _COSINE)
    if betas not in names:
        raise one_of("beta_schedule", betas, names)
    prediction = theirs["prediction_type"]
    if not isinstance(prediction, str) or prediction not in _PREDICTIONS:
        raise one_of("prediction_type", prediction, tuple(_PREDICTIONS))
    flag = theirs["rescale_betas_zero_snr"]
    process: dict[str, Any] = {"name": "ddpm_cosine", "steps": steps}
    if betas != _COSINE:
        ends = {key: theirs[key] for key in ("beta_start", "beta_end")}
        process = {"name": "ddpm", "steps": steps, **ends, "power": _POWERS[betas]}
    if flag:
        rule = "be v_prediction or sample with rescale_betas_zero_snr: noise alone shows no image"
        require(prediction != "epsilon", "prediction_type", rule, prediction)
        process["zero_terminal_snr"] = 1
    schedule(**process)
    return Trained(process, steps, prediction)


def _cluster(
    cfg: ImportConfig, folder: Path, shape: list[int], source: str
) -> tuple[dict[str, Any], Tensor | None]:
    """The name, the hash and the count of the cluster whose expert it is, and its images, if they are here."""
    if cfg.shard is None:
        require(is_whole(cfg.count, 2**40), "count", "be in [1, 2^40]", cfg.count)
        name = cfg.name or folder.resolve().name
        return {"name": name, "cluster": digest(["imported", source]), "count": cfg.count}, None
    for key, value, usual in (("name", cfg.name, None), ("count", cfg.count, 1)):
        require(value == usual, key, "be left out with shard, which has its own", value)
    shard = Partition.read(Path(cfg.shard))
    require(shard.k == 1, "shard", "be the folder of one cluster", f"{cfg.shard}, with {shard.k}")
    require(shard.shape == shape, "shard", f"hold images of {shape}", shard.shape)
    facts = {"name": shard.names[0], "cluster": shard.hashes[0], "count": shard.sizes[0]}
    return facts, shard.cluster(Path(cfg.shard), 0)["images"]


def _moments(images: Tensor | None, shape: list[int]) -> dict[str, Tensor]:
    """Those of the images; of images that nobody has shown, mean 0 and variance 1, which say nothing."""
    found = (torch.zeros(shape), torch.ones(shape)) if images is None else moments(images)
    return dict(zip(MOMENTS, found, strict=True))


def _write_config(out: Path, process: dict[str, Any], expert: ExpertConfig) -> None:
    """A config to train on with: its network and its process, and that it starts from the artifact."""
    tree = plain(expert)
    keys = ("unet", "parameterization", "sigma_data", "loss_weight")
    config = {
        "run": f"runs/{out.name}",
        "schedule": process,
        "expert": {**{key: tree[key] for key in keys}, "init": str(out.resolve())},
    }
    with replaced(out / "config.yaml") as scratch:
        scratch.write_text(OmegaConf.to_yaml(config))


@contextmanager
def _of(file: Path | None) -> Iterator[None]:
    """Name the file in the errors of its keys."""
    try:
        yield
    except ConfigError as error:
        if file is None:
            raise
        raise ConfigError(f"{file}: {error}", error.key) from error
