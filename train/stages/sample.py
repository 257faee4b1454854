"""The stage `sample`: images from the bundle, with a record of how they were made."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ddm.artifacts import digest, read_json, read_tensors, replaced, sha256, write_json
from ddm.errors import ArtifactError
from serve import SampleConfig, load
from serve.model.images import contact_sheet, encoded, to_uint8
from train.config import Config, SampleStageConfig, plain
from train.progress import bar
from train.run_folder import claim

log = logging.getLogger(__name__)

_IN_NAME = (
    "source",
    "policy",
    "sampler",
    "steps",
)  # always; other settings if they are not the default
_SUFFIXES = (".png", ".safetensors")
_SHEET_IMAGES = 1024  # at most
_NAME_BYTES = 200  # at most, so that every file system takes it


def sample_images(config: Config) -> None:
    """Sample `sample.n` images into `samples/`: a contact sheet, the tensor of the images, and a record of the settings.

    With `sample.format=folder` there is also a folder of PNG files named by the index of the image. The same settings are
    not sampled again, and no file of other settings or of the user is overwritten.
    """
    cfg = config.sample
    model = load(config.folder, device=config.device)
    settings = {field.name: getattr(cfg, field.name) for field in fields(SampleConfig)}
    record = {
        "version": model.version,
        "n": cfg.n,
        "seed": cfg.seed,
        "first_index": cfg.first_index,
        **plain(SampleConfig(**settings)),
    }
    stem = next(stem for stem in _stems(config.folder / "samples", cfg) if _is_free(stem, record))
    if _is_made(stem):
        images = read_tensors(_beside(stem, ".safetensors"))["images"]
        log.info("sample     up to date: %s.png", stem)
    else:
        with bar("sample", cfg.n * cfg.steps) as advance:
            sampled = model.sample(
                cfg.n, seed=cfg.seed, first_index=cfg.first_index, progress=advance, **settings
            )
        images = to_uint8(sampled)
        claim(config)
        _write(stem, record, images)
        log.info("sample     %d images: %s.png", cfg.n, stem)
    if cfg.format == "folder":
        _write_folder(stem, images, cfg.first_index)


def _stems(folder: Path, cfg: SampleStageConfig) -> Iterator[Path]:
    """Paths without suffix for samples with these settings: the one that names them all, then the same with -2, -3 ..."""
    usual = SampleStageConfig()
    words = [str(getattr(cfg, key)) for key in _IN_NAME]
    for field in fields(SampleConfig):
        value = getattr(cfg, field.name)
        if field.name not in _IN_NAME and value != getattr(usual, field.name):
            plain_value = str(value) if not isinstance(value, dict) else digest(value)[:8]
            words.append(f"{field.name}={plain_value}")
    words += [f"n{cfg.n}", f"seed{cfg.seed}"]
    words += [f"from{cfg.first_index}"] if cfg.first_index else []
    name = "-".join(words)
    if len(name) > _NAME_BYTES:
        name = f"{name[: _NAME_BYTES - 9]}-{digest(name)[:8]}"
    yield folder / name
    for i in count(2):
        yield folder / f"{name}-{i}"


def _beside(stem: Path, suffix: str) -> Path:
    """`STEM` with a suffix added; `with_suffix` would cut a name with a dot in it."""
    return stem.with_name(stem.name + suffix)


def _is_free(stem: Path, record: Mapping[str, Any]) -> bool:
    """Whether samples with this record may be written to `stem`: nothing is there, or the whole rest of the same ones."""
    path = _beside(stem, ".json")
    if not path.exists():
        return not any(_beside(stem, suffix).exists() for suffix in _SUFFIXES)
    with suppress(ArtifactError):
        found = read_json(path)
        hashes = found.pop("sha256", None)
        known = {**plain(SampleConfig()), **found}  # a key that is younger has its default there
        if known == record and isinstance(hashes, dict):
            files = [_beside(stem, suffix) for suffix in _SUFFIXES]
            return all(hashes.get(f.suffix) == sha256(f) for f in files if f.exists())
    return False


def _is_made(stem: Path) -> bool:
    """Whether all files of a free stem are there."""
    return all(_beside(stem, suffix).exists() for suffix in (".json", *_SUFFIXES))


def _write(stem: Path, record: Mapping[str, Any], images: Tensor) -> None:
    """Write the record, which claims the name, then the images and a contact sheet of them."""
    shown = images[:_SHEET_IMAGES]
    side = max(1, round(len(shown) ** 0.5))
    contents = {
        ".png": encoded(contact_sheet(shown.split(side))),
        ".safetensors": save({"images": images.contiguous()}),
    }
    hashes = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()}
    write_json(_beside(stem, ".json"), {**record, "sha256": hashes})
    for suffix, content in contents.items():
        with replaced(_beside(stem, suffix)) as scratch:
            scratch.write_bytes(content)


def _write_folder(stem: Path, images: Tensor, first_index: int) -> None:
    """Write every image that is not there yet to `STEM/INDEX.png`."""
    written = 0
    for index, image in enumerate(images, first_index):
        path = stem / f"{index:06d}.png"
        if not path.exists():
            with replaced(path) as scratch:
                scratch.write_bytes(encoded(image))
            written += 1
    if written:
        log.info("sample     %d files: %s", written, stem)
