"""Loading the folder of a run or of a bundle, or the demo: everything, or some experts."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddm.bundle import SEED_MODEL, read_bundle, restore_bundle
from ddm.device import pick_device
from ddm.errors import ArtifactError
from ddm.partition import Partition
from experts.denoiser import Denoiser, SeededDenoiser
from serve.model.build import build_experts, build_schedule
from serve.model.model import Model
from serve.model.signatures import check_signed

DEMO = "demo"  # what the digits that come with the program are called
_SHIPPED = Path(__file__).parents[1] / "demo"


def load(
    folder: str | Path,
    device: str | torch.device = "auto",
    experts: bool = True,
    signers: str | Path | None = None,
) -> Model:
    """Load the folder of a run or of a bundle, checking every hash; `experts=False` leaves their
    networks out. `demo` is the bundle of digits that comes with the program.

    device: a torch device, or `auto`: cuda if there is one, else cpu.
    signers: a public key or a folder of them, one of which must have signed the bundle.

    Raises `ArtifactError` naming the file that is missing, damaged, foreign or not signed, and why;
    `ConfigError` naming a device that this machine does not have.
    """
    inner = bundle_folder(folder)
    if signers is not None:
        check_signed(inner, Path(signers))
    bundle = read_bundle(inner)
    clusters = Path(folder) / "partition"

    def images() -> dict[str, Tensor]:
        return Partition.read(clusters).those(clusters, bundle.mixture.clusters)

    of_run = inner == Path(folder) / "bundle"
    device = pick_device(str(device))
    return Model(bundle, device, images if of_run else None, experts)


def bundle_folder(folder: str | Path) -> Path:
    """The bundle of a run, or the folder itself; that of `demo` unless there is a folder so named.

    Raises `ArtifactError` if there is no such folder.
    """
    folder = Path(folder)
    if str(folder) == DEMO and not folder.exists():
        return _SHIPPED
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder: give a run or a bundle, such as runs/digits, or {DEMO}"
        )
    inner = folder / "bundle"
    restore_bundle(inner)
    return inner if inner.is_dir() else folder


def load_experts(
    folder: str | Path, wanted: Sequence[int], device: str | torch.device = "auto"
) -> tuple[list[Denoiser | SeededDenoiser], list[int], str]:
    """Experts of a run or a bundle, by rising numbers, the shape `[C, H, W]` of their images, and the bundle's
    version; but for the seed model, no other artifact is read.

    Raises `ArtifactError` naming the file that is missing, damaged or foreign, and why.
    """
    inner = bundle_folder(folder)
    files = read_bundle(inner, only=()).files
    for k in wanted:
        if not 0 <= k < len(files):
            raise ArtifactError(f"{inner} has no expert {k}, it has {len(files)}")
    bundle = read_bundle(inner, only=[*(files[k] for k in wanted), SEED_MODEL])
    where = torch.device(pick_device(str(device)))
    found = build_experts(bundle, build_schedule(bundle), where)
    return found, bundle.mixture.shape, bundle.version
