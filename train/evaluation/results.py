"""The results of an evaluation, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ddm.artifacts import read_json
from ddm.errors import ArtifactError
from ddm.measures import PowerLaw


@dataclass
class Score:
    """What was measured of a set of samples with one feature network; None if it has no logits."""

    frechet: float
    kid: float
    precision: float
    recall: float
    coverage: float
    inception_score: float | None
    confidence: float | None  # the mean of the classifier's largest probability
    class_frequencies: list[float] | None  # of the classes that the classifier assigns


@dataclass
class Cell:
    """What was measured of one set of samples."""

    method: str
    sampler: str
    steps: int
    seed: int
    nfe: float  # expert evaluations per image
    # None if the method has no reference, or the reference trajectories have another seed:
    trajectory_error: float | None
    scores: dict[str, Score]  # by the name of the feature network


@dataclass
class Features:
    """A feature network, and the real images that the samples were compared with."""

    what: str  # in words
    file: str | None  # the SHA-256 of its file; None if it was trained in the evaluation
    reference: str  # what the Frechet distance is to
    reference_file: str | None  # the SHA-256 of the reference's file
    real_confidence: float | None  # the classifier's, on images it was not trained on
    real_class_frequencies: list[float] | None  # of the classes
    # For each seed, the Frechet distance of as many real images as a cell has:
    floor: list[float] = field(default_factory=list)


class Spread(NamedTuple):
    """A measure over the seeds: its mean, and its standard deviation if there are several."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of one value or more."""
        return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def clear_best(column: Mapping[str, Spread | None], sign: float = 1.0) -> str | None:
    """The name whose mean is smallest by more than the spread; with `sign` -1 the largest.

    That is, its interval mean ± deviation meets no other one. None if one does, or if there is only
    one seed, whose spread is not known.
    """
    measured = {name: value for name, value in column.items() if value is not None}
    if not measured or any(value.deviation is None for value in measured.values()):
        return None
    best = min(measured, key=lambda name: sign * measured[name].mean)
    for name, value in measured.items():
        gap = sign * (value.mean - measured[best].mean)
        if name != best and gap <= (value.deviation or 0) + (measured[best].deviation or 0):
            return None
    return best


@dataclass
class Copies:
    """How near a set of images is to the training images, and to those that no training has seen.

    Distances are Euclidean, of pixels in at most 32 x 32.
    """

    near_copies: float  # the fraction that is near-copies of a training image, by `NEAR_COPY`
    alone: float  # the fraction nearer to one than a third of the distance to the next
    ratio: float  # the median of the nearest training distance over the mean of the 50 nearest
    nearest: list[int]  # by cluster, how many images have their nearest training image in it
    copied: list[int]  # by cluster, how many of these are near-copies
    # None if nothing is held out:
    nearest_is_training: float | None  # the fraction nearer to a training image than to any other
    over_held_out: float | None  # the median nearest training distance over the nearest held-out
    # The most suspicious: [image, its nearest training image, its nearest held-out one or -1].
    closest: list[list[int]]


NEAR_COPY = (
    "the nearest training image is at most half as far as the 50 nearest are on average "
    "(arXiv 2301.13188)"
)


@dataclass
class Memorization:
    """Whether samples are copies of training images, at one number of steps.

    expected: `nearest_is_training` of images that favour neither: the training images' share
    floor: of real images: held-out ones, or training images against the others if none is held out
    methods: of the samples, by method, for each seed; those of further samplers by `METHOD, SAMPLER`
    """

    steps: int
    held_out: int  # images that no training has seen
    expected: float | None
    floor: Copies
    methods: dict[str, list[Copies]]

    @property
    def floor_name(self) -> str:
        """What the floor's images are."""
        return "held-out images" if self.held_out else "training images, each against the others"

    @staticmethod
    def of(facts: dict[str, Any]) -> "Memorization":
        """From plain data."""
        methods = {
            name: [Copies(**copies) for copies in of_seeds]
            for name, of_seeds in facts["methods"].items()
        }
        return Memorization(**{**facts, "floor": Copies(**facts["floor"]), "methods": methods})


@dataclass
class Evaluation:
    """All that was measured, as plain data."""

    config: dict[str, Any]
    versions: dict[str, str]  # by method, its bundle's SHA-256
    images_seen: dict[str, int]  # by method, in the training of its experts, the router not counted
    features: dict[str, Features]  # by name; the first one's figures come first
    samplers: dict[str, dict[str, Any]]  # by name, their settings
    n: int  # images per cell and seed
    seeds: int
    precision: str  # of the networks while sampling
    cells: list[Cell]
    fits: dict[str, dict[str, PowerLaw]]  # by method and sampler, E(N) = constant N^-exponent
    # None and empty in older records:
    memorization: Memorization | None = None
    hardware: str = ""  # where the samples were made

    @property
    def steps(self) -> list[int]:
        """The numbers of steps, in ascending order."""
        return sorted({cell.steps for cell in self.cells})

    def over_seeds(
        self,
        method: str,
        steps: int,
        value: Callable[[Cell], float | None],
        sampler: str | None = None,
    ) -> Spread | None:
        """A measure of a cell, by default with the first sampler; None if it was not measured."""
        wanted = (method, steps, sampler or next(iter(self.samplers)))
        cells = [cell for cell in self.cells if (cell.method, cell.steps, cell.sampler) == wanted]
        measured = [value(cell) for cell in cells]
        values = [found for found in measured if found is not None]
        if not values:
            return None
        return Spread.of(values)

    def methods_at(self, steps: int) -> list[str]:
        """The methods that were measured at this number of steps."""
        measured = {cell.method for cell in self.cells if cell.steps == steps}
        return [method for method in self.versions if method in measured]

    def nfe_per_step(self, method: str, sampler: str | None = None) -> float:
        """Expert evaluations per image and step, by default with the first sampler."""
        wanted = (method, sampler or next(iter(self.samplers)))
        cells = [cell for cell in self.cells if (cell.method, cell.sampler) == wanted]
        return mean(cell.nfe / cell.steps for cell in cells)

    def floor(self, features: str) -> Spread | None:
        """The Frechet distance of as many real images, over the seeds; None in older records."""
        found = self.features[features].floor
        return Spread.of(found) if found else None

    @staticmethod
    def read(path: Path) -> "Evaluation":
        """From `record.json`. Raises `ArtifactError` naming the file if it holds anything else."""
        facts = read_json(path)
        try:
            return Evaluation.of(facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path} does not hold an evaluation ({error!r}): move it away to measure again"
            ) from error

    @staticmethod
    def of(facts: dict[str, Any]) -> "Evaluation":
        """From plain data; keys that are not fields of the class are ignored."""
        later = {"memorization": None, "hardware": ""}
        known = {name: {**later, **facts}[name] for name in Evaluation.__dataclass_fields__}
        known["cells"] = [_cell(cell) for cell in facts["cells"]]
        known["fits"] = {
            method: {sampler: PowerLaw(*fit) for sampler, fit in by_sampler.items()}
            for method, by_sampler in facts["fits"].items()
        }
        if known["memorization"] is not None:
            known["memorization"] = Memorization.of(known["memorization"])
        known["features"] = {name: Features(**found) for name, found in facts["features"].items()}
        return Evaluation(**known)


def _cell(facts: dict[str, Any]) -> Cell:
    scores = {name: Score(**score) for name, score in facts["scores"].items()}
    return Cell(**{**facts, "scores": scores})
