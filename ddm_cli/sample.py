"""ddm sample RUN [key=value ...]

Samples images from a run, a bundle or `demo`, the digits that come with the program.

  n=16            images
  format=sheet    one PNG file with all of them, at most 1024; or folder: one PNG file for each, in
                  constant memory. After an interruption the same command goes on where it stopped,
                  and a larger n adds to what is there
  out=PATH        the file, which must be new, or the folder; without it samples.png or samples
  seed=0          of the noise: image i of a seed is the same at any n
  first_index=0   of the images of the seed
  batch=256       images that go through the networks together
  device=auto     cuda if there is one, else cpu

All settings of sampling are keys as well: steps=10 policy=full condition=3 clusters=[cats]
(docs/sampling.md).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddm.artifacts import replaced
from ddm.errors import require
from ddm_cli.terminal import parted, run
from serve.model.config_merge import filled
from serve.model.images import contact_sheet, encoded, to_uint8
from serve.model.loading import load
from serve.model.params import SampleConfig
from train.progress import bar

log = logging.getLogger(__name__)

_SHEET_IMAGES = 1024  # at most


@dataclass
class SampleCommand(SampleConfig):
    """The keys of `ddm sample`: those of sampling, and those of its help."""

    n: int = 16
    format: Literal["sheet", "folder"] = "sheet"
    out: str | None = None
    seed: int = 0
    first_index: int = 0
    batch: int = 256
    device: str = "auto"

    @property
    def path(self) -> Path:
        """Where the images go."""
        return Path(self.out or {"sheet": "samples.png", "folder": "samples"}[self.format])


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    return run(words, _sample)


def _sample(words: list[str]) -> None:
    (folder,), settings = parted(words, "a run, a bundle or demo")
    command = filled(SampleCommand, *settings)
    named = {word.partition("=")[0].partition(".")[0] for word in settings}
    given = {key: getattr(command, key) for key in named & SampleConfig().__dict__.keys()}
    if command.format == "sheet":
        _write_sheet(folder, command, given)
    else:
        _write_folder(folder, command, given)
    log.info("%d images: %s", command.n, command.path)


def _write_sheet(run: str, command: SampleCommand, given: dict[str, Any]) -> None:
    path, most = command.path, f"be at most {_SHEET_IMAGES} with format=sheet"
    require(command.n <= _SHEET_IMAGES, "n", most, command.n)
    require(path.suffix == ".png", "out", "end in .png with format=sheet", str(path))
    require(not path.exists(), "out", "be a new file", str(path))
    model = load(run, command.device)
    steps = model.settings(**given).steps
    with bar("sample", command.n * steps) as advance:
        images = model.sample(
            command.n,
            seed=command.seed,
            first_index=command.first_index,
            batch=command.batch,
            progress=advance,
            **given,
        )
    side = max(1, round(command.n**0.5))
    with replaced(path) as scratch:
        scratch.write_bytes(encoded(contact_sheet(to_uint8(images).split(side))))


def _write_folder(run: str, command: SampleCommand, given: dict[str, Any]) -> None:
    model = load(run, command.device)
    with bar("sample", command.n) as advance:
        model.save_images(
            command.path,
            command.n,
            seed=command.seed,
            first_index=command.first_index,
            batch=command.batch,
            progress=advance,
            **given,
        )
