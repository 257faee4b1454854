"""ddm evaluate RUN [key=value ...]
ddm evaluate FOLDER_OF_IMAGES against=RUN [key=value ...]

Measures how far images are from the training images of a run, by Fréchet distance and others.

A run: samples by every method of evaluate.methods, and writes report.html and the bundle's model
card, with the run's own config: the stage `evaluate`. All keys of `ddm train` can be given a value.

A folder of images, whatever made them, in it or in folders inside it: prints a table.
  against=RUN                     the run with the training images
  features=[classifier, pixels]   the features they are compared by; or inception
  inception_weights=FILE          for inception, a file of yours
  format=table                    or json
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ddm.errors import ConfigError
from ddm_cli.terminal import parted, run
from serve.model.config_merge import filled
from serve.model.loading import load
from train.__main__ import main as train

_MEASURES = ("kid", "precision", "recall", "coverage")


@dataclass
class CompareCommand:
    """The keys of `ddm evaluate FOLDER_OF_IMAGES`."""

    against: str = ""
    features: list[str] = field(default_factory=lambda: ["classifier", "pixels"])
    inception_weights: str | None = None
    format: Literal["table", "json"] = "table"


def main(words: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    if any(word.startswith("against=") for word in words):
        return run(words, _compare)
    return run(words, _check_run) or _evaluate(words)


def _check_run(words: list[str]) -> None:
    (folder,), _ = parted(words, "a run, or a folder of images and against=RUN,")
    if not (Path(folder) / "config.yaml").is_file():
        raise ConfigError(
            "evaluate must be given a run's folder, which has a config.yaml, or a folder of images "
            f"and against=RUN, got {folder!r}"
        )


def _evaluate(words: Sequence[str]) -> int:
    (folder,), settings = parted(words, "a run")
    return train([str(Path(folder) / "config.yaml"), "evaluate", f"run={folder}", *settings])


def _compare(words: list[str]) -> None:
    (folder,), settings = parted(words, "a folder of images")
    command = filled(CompareCommand, *settings)
    model = load(command.against, experts=False)
    found = model.compare(
        folder, features=command.features, inception_weights=command.inception_weights
    )
    if command.format == "json":
        print(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1))
    else:
        Console(width=None).print(_table(folder, command.against, found))


def _table(folder: str, run: str, found: dict[str, Any]) -> Table:
    """A row for each kind of features."""
    title = f"{folder} against {run}"
    table = Table("features", title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("images", "frechet", "real", *_MEASURES):
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in found.items():
        numbers = [each.score.frechet, each.floor, *(getattr(each.score, m) for m in _MEASURES)]
        table.add_row(name, str(each.images), *(f"{number:.3f}" for number in numbers))
    return table
