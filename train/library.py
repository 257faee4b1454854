"""Training from Python: images in tensors in, a model that samples out; no YAML, no command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import read_tensors, write_tensors
from ddm.errors import ConfigError, require, shown
from serve.model.config_merge import filled
from serve.model.images import to_uint8
from serve.model.loading import load
from serve.model.model import Model
from train.config import Config
from train.data.tensors import DRAWABLE, is_drawable
from train.stages.run import run
from train.stopping import Stopped, on_signals

_STAGES = ("partition", "seed_model", "expert", "router", "bundle")
_FILE = "images.safetensors"


def train_model(
    images: Tensor, folder: str | Path, *, labels: Tensor | None = None, **config: Any
) -> Model:
    """Cut images into clusters, train an expert on each and a router, and load what they make.

    The same call goes on where an interruption stopped it, and returns at once when all is there.
    Experts train one after another in this process; `expert={"workers": None}` trains them in
    processes of their own, for which a script needs `if __name__ == "__main__":`.

    images: `[N, C, H, W]`, uint8, or floats in [-1, 1]; square, with 1 to 4 channels
    folder: of the run; the images are kept there too, as `images.safetensors`
    labels: int64 `[N]`, at least 0, by which the images are then cut; without them, by k-means
    config: the sections and keys of a config (`train.config.Config`), such as `seed=1`,
        `partition={"k": 4}`, `expert={"steps": 2000}`, `schedule={"name": "rectified_flow"}`

    Raises `ConfigError` naming a key, `images` or `labels`, the rule and the value; `ArtifactError`
    if the folder was made by another config; `KeyboardInterrupt` after a signal, with a checkpoint saved.
    """
    folder = Path(folder)
    tensors = _checked(images, labels)
    given = {"run": str(folder), **config}
    given["data"] = {"name": "tensors", "root": str(folder / _FILE), **config.get("data", {})}
    by = "kmeans" if labels is None else "label"
    given["partition"] = {"by": by, **config.get("partition", {})}
    given["expert"] = {"workers": 0, **config.get("expert", {})}
    whole = filled(Config, given)
    whole.check()
    _keep(tensors, folder / _FILE)
    try:
        with on_signals(leave=False):
            run(whole, _STAGES)
    except Stopped as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    return load(folder, whole.device)


def _checked(images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        found: Any = list(images.shape) if isinstance(images, Tensor) else shown(images)
        raise ConfigError(
            f"images must be a tensor [N, C, H, W], N at least 1, got {found}", "images"
        )
    if not is_drawable(images):
        raise ConfigError(f"images must be such as {DRAWABLE}, got {list(images.shape)}", "images")
    if images.dtype != torch.uint8:
        inside = images.is_floating_point() and bool(((images >= -1) & (images <= 1)).all())
        found = f"{images.dtype} from {float(images.min()):.4g} to {float(images.max()):.4g}"
        if not inside:
            raise ConfigError(f"images must be uint8, or floats in [-1, 1], got {found}", "images")
        images = to_uint8(images)
    tensors = {"images": images.cpu().contiguous()}
    if labels is not None:
        whole = isinstance(labels, Tensor) and not labels.is_floating_point()
        fits = whole and labels.shape == images.shape[:1] and int(labels.min()) >= 0
        require(fits, "labels", f"be {len(images)} whole numbers of at least 0", labels)
        tensors["labels"] = labels.long().cpu().contiguous()
    return tensors


def _keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the images, or check that the run has the same."""
    if path.exists():
        there = read_tensors(path)
        same = there.keys() == tensors.keys() and all(
            torch.equal(there[key], tensor) for key, tensor in tensors.items()
        )
        require(same, "folder", "be another one: it was made of other images", str(path.parent))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors)
