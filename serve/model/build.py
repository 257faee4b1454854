"""Networks from the artifacts of a bundle.

A bundle may come from anywhere, so nothing is allocated for what its JSON asks until the weights
are known to match: networks are built on the meta device and compared with the header of the
weights' file first.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddm.bundle import Artifact, Bundle, as_schedule
from ddm.condition import ClusterCounts
from ddm.conversion import Conversion
from ddm.errors import ArtifactError, ConfigError, shown
from ddm.gaussian import MOMENTS, Gaussians
from ddm.schedules import Schedule
from experts.denoiser import Denoiser, ExpertConfig, SeededDenoiser
from router.networks import DerivativeNet, PosteriorNet, RouterConfig
from serve.model.config_merge import filled

C = TypeVar("C", ExpertConfig, RouterConfig)

_FLOATS = ("F32", "F16", "BF16")  # what float32 holds without loss


def build_schedule(bundle: Bundle) -> Schedule:
    """The forward process of a bundle. Raises `ArtifactError` naming its manifest."""
    return as_schedule(bundle.schedule, bundle.manifest)


def build_expert(artifact: Artifact, schedule: Schedule, device: torch.device) -> Denoiser:
    """The denoiser of an artifact, on a process that may be another than its own.

    Raises `ArtifactError` naming its file.
    """
    own = as_schedule(artifact.facts.get("schedule"), artifact.json)
    conversion = None if own == schedule else Conversion(schedule, own)
    counts = build_counts(artifact)
    condition = 0 if counts is None else len(counts.counts)
    with _described_by(artifact), torch.device("meta"):
        config = network_config(ExpertConfig, artifact)
        denoiser = config.build(artifact.facts["shape"], own, conversion, condition)
    _load_weights(denoiser, artifact, device, others=MOMENTS)
    return denoiser


def build_experts(
    bundle: Bundle, schedule: Schedule, device: torch.device
) -> list[Denoiser | SeededDenoiser]:
    """The denoisers of a bundle's experts, those that were read; they share its seed model, if it
    has one.

    Raises `ArtifactError` naming a file.
    """
    experts = [build_expert(artifact, schedule, device) for artifact in bundle.experts]
    if bundle.seed_model is None:
        return [*experts]
    seed_model = build_expert(bundle.seed_model, schedule, device)
    return [SeededDenoiser(expert, seed_model, bundle.above) for expert in experts]


def build_counts(artifact: Artifact) -> ClusterCounts | None:
    """What an expert's images show, by the names of its condition; None for one without.

    Raises `ArtifactError` naming its file.
    """
    return ClusterCounts.from_facts(artifact.facts.get("condition"), artifact.json)


def build_router(
    artifact: Artifact, shape: list[int], pi: Tensor, gaussians: Gaussians, device: torch.device
) -> tuple[PosteriorNet, DerivativeNet]:
    """The posterior net and the derivative nets of an artifact.

    Raises `ArtifactError` naming its file.
    """
    with _described_by(artifact), torch.device("meta"):
        config = network_config(RouterConfig, artifact)
        posterior, derivative = config.build(shape, pi.cpu(), gaussians.schedule, gaussians)
    both = nn.ModuleDict({"posterior": posterior, "derivative": derivative})
    _load_weights(both, artifact, device)
    return posterior, derivative


def build_gaussians(
    artifacts: list[Artifact], schedule: Schedule, device: torch.device
) -> Gaussians:
    """The clusters' Gaussians. Raises `ArtifactError` naming the file of one without them."""
    for artifact in artifacts:
        for name in MOMENTS:
            _check_layout(artifact, name, artifact.facts["shape"])
        if artifact.tensors["gaussian.variance"].min() < 0:
            raise ArtifactError(f"{artifact.weights} is damaged: gaussian.variance is negative")
    means, variances = (
        torch.stack([artifact.tensors[name].float() for artifact in artifacts]).to(device)
        for name in MOMENTS
    )
    return Gaussians(means, variances, schedule)


@contextmanager
def _described_by(artifact: Artifact) -> Iterator[None]:
    """Name the JSON file of an artifact in the errors of its config."""
    try:
        yield
    except ConfigError as error:
        raise ArtifactError(
            f"{artifact.json} does not describe a network of this version: {error}"
        ) from error


def network_config(schema: type[C], artifact: Artifact) -> C:
    """The config of an artifact's networks. Raises `ConfigError` naming a bad key."""
    facts = artifact.facts.get("config")
    if not isinstance(facts, dict):
        raise ConfigError(f"config must be an object, got {shown(facts)}", "config")
    if "${" in json.dumps(facts):  # OmegaConf would read the environment for it
        raise ConfigError("config must not refer to other values", "config")
    config = filled(schema, facts)
    config.check()
    return config


def _load_weights(
    network: nn.Module, artifact: Artifact, device: torch.device, others: Collection[str] = ()
) -> None:
    """Give a network on the meta device its weights, ready to run; `others` are tensors that are
    not the network's.
    """
    expected = network.state_dict()
    for name, tensor in expected.items():
        _check_layout(artifact, name, tensor.shape)
    for name in artifact.layout:
        if name not in expected and name not in others:
            raise ArtifactError(
                f"{artifact.weights} does not fit {artifact.json}: it has the tensor {shown(name)}"
            )
    weights = {name: _copy(artifact.tensors[name], like, device) for name, like in expected.items()}
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)


def _copy(tensor: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the dtype and the strides of `like`, which is on the meta device."""
    # `Module.to_empty` would import SymPy, which takes longer than all else that `load` does.
    copy = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return copy.copy_(tensor)


def _check_layout(artifact: Artifact, name: str, shape: Collection[int]) -> None:
    """Refuse a tensor that is missing, or has another shape or a dtype that is not a float."""
    found = artifact.layout.get(name)
    if found is None:
        raise ArtifactError(
            f"{artifact.weights} does not fit {artifact.json}: it has no tensor {name}"
        )
    if found.shape != tuple(shape) or found.dtype not in _FLOATS:
        raise ArtifactError(
            f"{artifact.weights} does not fit {artifact.json}: {name} must be one of "
            f"{' '.join(_FLOATS)} of shape {list(shape)}, "
            f"got {found.dtype} of {shown(list(found.shape))}"
        )
