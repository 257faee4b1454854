"""Networks from the artifacts of a bundle, each checked against the JSON that describes it."""

from typing import TypeVar

import torch
from torch import Tensor

from ddm.bundle import Artifact
from ddm.errors import ArtifactError, ConfigError
from ddm.gaussian import MOMENTS, Gaussians
from ddm.schedules import Schedule
from experts.denoiser import Denoiser, ExpertConfig
from router.networks import DerivativeNet, PosteriorNet, RouterConfig
from serve.model.config_merge import filled

C = TypeVar("C")


def build_expert(artifact: Artifact, schedule: Schedule, device: torch.device) -> Denoiser:
    """The denoiser of an artifact. Raises `ArtifactError` naming its file."""
    denoiser = _config(ExpertConfig, artifact).build(artifact.facts["shape"], schedule)
    _fill(denoiser, artifact)
    return denoiser.eval().requires_grad_(False).to(device)


def build_router(
    artifact: Artifact, shape: list[int], pi: Tensor, schedule: Schedule, device: torch.device
) -> tuple[PosteriorNet, DerivativeNet]:
    """The posterior net and the derivative nets of an artifact. Raises `ArtifactError` naming its file."""
    posterior, derivative = _config(RouterConfig, artifact).build(shape, pi.cpu(), schedule)
    _fill(torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative}), artifact)
    return (
        posterior.eval().requires_grad_(False).to(device),
        derivative.eval().requires_grad_(False).to(device),
    )


def build_gaussians(
    artifacts: list[Artifact], schedule: Schedule, device: torch.device
) -> Gaussians:
    """The clusters' Gaussians; their moments are taken out of the artifacts' tensors. Raises `ArtifactError` naming a file."""
    means, variances = (
        torch.stack([take_tensor(artifact, name) for artifact in artifacts]).to(device)
        for name in MOMENTS
    )
    return Gaussians(means, variances, schedule)


def _config(schema: type[C], artifact: Artifact) -> C:
    try:
        return filled(schema, artifact.facts["config"])
    except (ConfigError, KeyError) as error:
        raise ArtifactError(
            f"{artifact.stem}.json is not of this version: its config does not fit ({error})"
        ) from error


def take_tensor(artifact: Artifact, name: str) -> Tensor:
    """A tensor of an artifact that is not the network's, taken out."""
    try:
        return artifact.tensors.pop(name)
    except KeyError as error:
        raise ArtifactError(
            f"{artifact.stem}.safetensors is not of this version: it has no tensor {name}, so train it anew"
        ) from error


def _fill(module: torch.nn.Module, artifact: Artifact) -> None:
    try:
        module.load_state_dict(artifact.tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{artifact.stem}.safetensors does not fit the network that its JSON describes: {error}"
        ) from error
