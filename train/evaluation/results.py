"""What an evaluation found, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ddm.artifacts import read_json
from ddm.measures import PowerLaw


@dataclass
class Score:
    """What was measured of a draw with one feature network; None where the features have no logits."""

    frechet: float
    kid: float
    precision: float
    recall: float
    coverage: float
    inception_score: float | None
    confidence: float | None  # the mean of the classifier's largest probability
    class_frequencies: list[float] | None  # of the classes, by the classifier


@dataclass
class Cell:
    """What was measured of one draw."""

    method: str
    sampler: str
    steps: int
    seed: int
    calls: float  # expert evaluations an image
    trajectory_error: (
        float | None
    )  # None where the method has no reference, or the paths are another seed's
    scores: dict[str, Score]  # by the name of the features


@dataclass
class Features:
    """A feature network, and the real images that the drawn ones were held against."""

    what: str  # in words
    file: str | None  # the SHA-256 of its file; None for one that was trained on the spot
    reference: str  # what the Frechet distance is to
    reference_file: str | None  # the SHA-256 of the reference's file
    real_confidence: float | None  # the classifier's, on images it never saw
    real_class_frequencies: list[float] | None  # of the classes


class Spread(NamedTuple):
    """A measure over the seeds: its mean, and its standard deviation where there are several."""

    mean: float
    deviation: float | None


@dataclass
class Evaluation:
    """All that was measured, as plain data."""

    config: dict[str, Any]
    versions: dict[str, str]  # a method, its bundle's SHA-256
    images_seen: dict[
        str, int
    ]  # a method, the images its networks saw in training, the router's not counted
    features: dict[str, Features]  # by name; the first one's figures come first
    samplers: dict[str, dict[str, Any]]  # by name, their settings
    n: int  # images a cell and seed
    seeds: int
    precision: str  # of the networks while drawing
    cells: list[Cell]
    fits: dict[str, dict[str, PowerLaw]]  # by method and sampler, E(N) = constant N^-exponent

    @property
    def steps(self) -> list[int]:
        """The numbers of steps, rising."""
        return sorted({cell.steps for cell in self.cells})

    def over_seeds(
        self,
        method: str,
        steps: int,
        value: Callable[[Cell], float | None],
        sampler: str | None = None,
    ) -> Spread | None:
        """A measure of a cell of the table, with the first sampler where none is named; None where it was not measured."""
        wanted = (method, steps, sampler or next(iter(self.samplers)))
        cells = [cell for cell in self.cells if (cell.method, cell.steps, cell.sampler) == wanted]
        values = [found for cell in cells if (found := value(cell)) is not None]
        return Spread(mean(values), stdev(values) if len(values) > 1 else None) if values else None

    @staticmethod
    def read(path: Path) -> "Evaluation":
        """From `record.json`."""
        return Evaluation.of(read_json(path))

    @staticmethod
    def of(facts: dict[str, Any]) -> "Evaluation":
        """From plain data; what it holds besides is left out."""
        cfg = {name: facts[name] for name in Evaluation.__dataclass_fields__}
        cells = [
            Cell(
                **{
                    **cell,
                    "scores": {name: Score(**score) for name, score in cell["scores"].items()},
                }
            )
            for cell in cfg["cells"]
        ]
        fits = {
            method: {name: PowerLaw(*fit) for name, fit in by_sampler.items()}
            for method, by_sampler in cfg["fits"].items()
        }
        features = {name: Features(**found) for name, found in cfg["features"].items()}
        return Evaluation(**{**cfg, "cells": cells, "fits": fits, "features": features})
