"""What an evaluation found, as plain data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddm.artifacts import read_json
from ddm.measures import PowerLaw


@dataclass
class Cell:
    """What was measured of a draw; None where the features have no logits, or the method no reference."""

    method: str
    steps: int
    calls: float  # expert evaluations a picture
    frechet: float
    kid: float
    inception_score: float | None
    confidence: float | None  # the mean of the classifier's largest probability
    shares: list[float] | None  # of the classes, by the classifier
    trajectory_error: float | None


@dataclass
class Evaluation:
    """All that was measured, as plain data; kept as `evaluate/record.json`."""

    config: dict[str, Any]
    versions: dict[str, str]  # a method, its bundle's SHA-256
    pictures_seen: dict[str, int]  # a method, the pictures its networks saw in training, the router's not counted
    features: str  # with which features the distances were measured
    n: int
    cells: list[Cell]
    fits: dict[str, PowerLaw]  # a method, E(N) = constant N^-exponent
    real_confidence: float | None  # the classifier's, on pictures it never saw
    real_shares: list[float] | None

    @staticmethod
    def read(path: Path) -> "Evaluation":
        """From `record.json`."""
        facts = {key: value for key, value in read_json(path).items() if key != "key"}
        facts["cells"] = [Cell(**cell) for cell in facts["cells"]]
        facts["fits"] = {name: PowerLaw(*fit) for name, fit in facts["fits"].items()}
        return Evaluation(**facts)
