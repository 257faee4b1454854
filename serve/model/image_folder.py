"""Samples as a folder of PNG files that can be interrupted and extended."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddm.artifacts import read_json, write_json
from ddm.errors import ArtifactError, ConfigError, require, shown
from serve.model.images import to_uint8, write_png
from serve.model.parts import Half
from serve.model.planning import Planner, SamplingPlan
from serve.model.running import sample_batch

_RECORD = "samples.json"


def save_images(
    model: Planner,
    plan: SamplingPlan,
    folder: Path,
    seed: int,
    index: range,
    batch: int,
    progress: Callable[[int], object] | None,
) -> None:
    """Write the images `index` of a seed that are not there yet: see `Model.save_images`."""
    channels = model.shape[0]
    require(channels in (1, 3), "save_images: images", "have 1 or 3 channels", channels)
    record = {"version": model.version, "seed": seed, "settings": asdict(plan.config)}
    record["precision"] = (
        "bf16" if any(isinstance(each, Half) for each in model.experts) else "float32"
    )
    _claim(folder, record, index)
    missing = (i for i in index if not _file(folder, i).exists())
    if progress is not None:
        progress(sum(_file(folder, i).exists() for i in index))
    for places in _batches(missing, batch):
        images, _ = sample_batch(model, plan, seed, torch.tensor(places, device=model.device))
        for i, image in zip(places, to_uint8(images), strict=True):
            write_png(_file(folder, i), image)
        if progress is not None:
            progress(len(places))


def _file(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def _batches(places: Iterator[int], batch: int) -> Iterator[list[int]]:
    while found := list(islice(places, batch)):
        yield found


def _claim(folder: Path, record: dict[str, Any], index: range) -> None:
    """Write the record, or check that the folder's own is the same.

    Raises `ConfigError` naming the folder, and what differs.
    """
    path = folder / _RECORD
    if path.exists():
        try:
            found = read_json(path)
        except ArtifactError:
            found = {}
        found.setdefault("precision", "float32")  # older records have none
        for key, value in record.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"{folder} must be another folder: it holds samples of another {key}, "
                    f"{_difference(found.get(key), value)}"
                )
        return
    taken = next((i for i in index if _file(folder, i).exists()), None)
    if taken is not None:
        raise ConfigError(
            f"{folder} must be another folder: {_file(folder, taken).name} is there, "
            f"and no {_RECORD} that says what of"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be made a folder: {error.strerror}") from error
    write_json(path, record)


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        there, here = ({key: each.get(key) for key in keys} for each in (found, wanted))
        return f"{shown(there)} there, {shown(here)} here"
    return f"{shown(found)} there, {shown(wanted)} here"
