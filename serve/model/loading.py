"""Loading a run's or a bundle's folder, whole or one expert of it."""

from pathlib import Path

import torch
from torch import Tensor

from ddm.bundle import read_bundle
from ddm.errors import ArtifactError, ConfigError
from ddm.gaussian import MOMENTS
from ddm.partition import Partition
from ddm.schedules import schedule
from experts.denoiser import Denoiser
from serve.model.build import build_expert, take_tensor
from serve.model.model import Model


def load(folder: str | Path, device: str | torch.device = "cpu", experts: bool = True) -> Model:
    """Load a run's folder or a bundle's, checking every hash; without `experts`, all but their networks.

    Raises `ArtifactError` naming the file that is missing, damaged or foreign, and why.
    """
    inner, clusters = bundle_folder(folder), Path(folder) / "partition"

    def images() -> dict[str, Tensor]:
        return Partition.read(clusters).all(clusters)

    return Model(read_bundle(inner), device, None if inner == Path(folder) else images, experts)


def bundle_folder(folder: str | Path) -> Path:
    """The bundle of a run, or the folder itself. Raises `ArtifactError` where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder: give a run or a bundle, such as runs/digits")
    return folder / "bundle" if (folder / "bundle").is_dir() else folder


def picked_device(name: str) -> str:
    """`auto` is cuda where there is one. Raises `ConfigError` where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"serve.device must be auto or a device of this machine, got {name!r}", "serve.device"
        ) from error
    return name


def load_expert(
    folder: str | Path, k: int, device: str | torch.device = "cpu"
) -> tuple[Denoiser, str]:
    """Expert k of a run or a bundle, alone, and the bundle's version; no other artifact is read.

    Raises `ArtifactError` naming the file that is missing, damaged or foreign, and why.
    """
    inner = bundle_folder(folder)
    bundle = read_bundle(inner, only=[f"expert-{k:02d}"])
    if not bundle.experts:
        raise ArtifactError(f"{inner} has no expert {k}, it has {bundle.partition.k}")
    _ = [take_tensor(bundle.experts[0], name) for name in MOMENTS]
    return build_expert(
        bundle.experts[0], schedule(**bundle.schedule), torch.device(device)
    ), bundle.version
