"""The stage `evaluate`: the paper's table, side by side, on pictures drawn by the very code that serves."""

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddm.artifacts import digest, read_json, sha256, write_json
from ddm.bundle import MANIFEST
from ddm.measures import PowerLaw, power_law_fit, trajectory_error
from ddm.partition import Partition
from train.config import Config, plain
from train.draws import Draw, Draws, Method
from train.features import Judged, feature_network, held_out
from train.pool import workers_for
from train.progress import bar
from train.record import Cell, Evaluation
from train.report import print_tables, write_report

log = logging.getLogger(__name__)


def evaluate(config: Config, monolith: Config | None) -> Evaluation:
    """Draw what is not there yet, measure, write `evaluate/record.json` and `report.html`, and print the table."""
    began = time.monotonic()
    own, folder, report = config.evaluate, config.folder / "evaluate", config.folder / "report.html"
    cut = Partition.read(config.folder / "partition")
    rows = methods(config, monolith, cut.k)
    key = digest([[asdict(row) for row in rows], plain(own), plain(config.sample), config.seed])
    if report.exists() and (folder / "record.json").exists() and read_json(folder / "record.json").get("key") == key:
        evaluation = Evaluation.read(folder / "record.json")
        log.info("evaluate   up to date: %s", report)
        print_tables(evaluation)
        return evaluation

    cells = [Draw(row, steps, own.n, own.trajectories) for row in rows for steps in own.steps]
    mixture = Method("reference", config.run, rows[-1].version, "posterior", "full")
    reference = Draw(mixture, own.reference_steps, own.trajectories, own.trajectories)
    draws = Draws(folder / "draws", config.sample, config.device, own.batch)
    calls = [cut.k if d.method.policy == "full" and d.method.run == config.run else 1 for d in [reference, *cells]]
    draws.make([reference, *cells], calls, workers_for(len(calls), config.device, config.expert.workers))

    whole = cut.all(config.folder / "partition")
    network = feature_network(own.features, own.inception_weights, whole, config.seed, config.device)
    ends = draws.read(reference).ends
    measured = []
    with bar("evaluate: scoring", len(whole["images"]) + len(cells) * own.n) as advance:
        real = network(whole["images"], advance)
        scores = _Scores(real)
        for draw in cells:
            drawn = draws.read(draw)
            error = trajectory_error(drawn.ends, ends) if draw.method.run == config.run else None
            measured.append(scores.cell(draw, drawn.calls, network(drawn.images, advance), error))
    evaluation = Evaluation(
        config=plain(config),
        versions={row.name: row.version for row in rows},
        pictures_seen={row.name: _pictures_seen(row) for row in rows},
        features=network.name,
        n=own.n,
        cells=measured,
        fits=_fits(measured),
        **_real(real, whole, config),
    )
    write_json(folder / "record.json", {"key": key, **asdict(evaluation)})
    write_report(report, evaluation, {(d.method.name, d.steps): draws.read(d) for d in cells})
    print_tables(evaluation)
    log.info("evaluate   %d draws in %.0f s: %s", len(cells), time.monotonic() - began, report)
    return evaluation


def methods(config: Config, monolith: Config | None, k: int) -> list[Method]:
    """The rows: the paper's four, then one-expert, best-expert and all-experts rules with the config's own source of alpha."""

    def row(name: str, of: Config, source: str, policy: str, control: str = "none") -> Method:
        return Method(name, of.run, sha256(of.folder / "bundle" / MANIFEST), source, policy, control)

    source = config.sample.source
    if k == 1:
        return [row("DDIM", config, "prior", "full")]
    return [
        *([row("DDIM", monolith, "prior", "full")] if monolith else []),
        row("Naive", config, "prior", "fixed"),
        row("MoG-a", config, "posterior", "stochastic"),
        row("MoG-da", config, "combined", "stochastic"),
        row("balanced", config, source, "balanced"),
        row("controlled", config, source, "balanced", "gaussian"),
        row("top-1", config, source, "top_k"),
        row("full", config, source, "full"),
    ]


class _Given(nn.Module):
    """The identity, as a feature network: torchmetrics measures features that were made before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Scores:
    """torchmetrics' distances to the real pictures, which are given once."""

    def __init__(self, real: Judged) -> None:
        given = _Given(real.features.shape[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `.*` will save all extracted features")
            self.frechet = FrechetInceptionDistance(given, reset_real_features=False)
            self.inception = InceptionScore(given, splits=2)
            self.kid = KernelInceptionDistance(
                given, subsets=50, subset_size=min(1000, len(real.features) // 2), reset_real_features=False
            )
        self.frechet.update(real.features.double(), real=True)
        self.kid.update(real.features, real=True)

    def cell(self, draw: Draw, calls: float, judged: Judged, error: float | None) -> Cell:
        for metric in (self.frechet, self.kid, self.inception):
            metric.reset()
        self.frechet.update(judged.features.double(), real=False)
        self.kid.update(judged.features, real=False)
        self.kid.subset_size = min(self.kid.subset_size, len(judged.features) // 2)
        score = confidence = shares = None
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(0)  # both draw subsets
            kid = float(self.kid.compute()[0])
            if judged.logits is not None:
                self.inception.update(judged.logits)
                score = float(self.inception.compute()[0])
                probability = judged.logits.softmax(dim=1)
                confidence = float(probability.amax(dim=1).mean())
                shares = _shares(probability.argmax(dim=1), probability.shape[1])
        return Cell(
            draw.method.name, draw.steps, calls, float(self.frechet.compute()), kid, score, confidence, shares, error
        )


def _shares(labels: Tensor, classes: int) -> list[float]:
    return (torch.bincount(labels, minlength=classes) / len(labels)).tolist()


def _real(real: Judged, whole: dict[str, Tensor], config: Config) -> dict[str, Any]:
    """What the classifier says of pictures it never saw, to hold the drawn ones against."""
    if real.logits is None or config.evaluate.features != "classifier":
        return {"real_confidence": None, "real_shares": None}
    unseen = real.logits[held_out(len(real.logits), config.seed)]
    shares = _shares(whole.get("labels", whole["cluster"]), unseen.shape[1])
    return {"real_confidence": float(unseen.softmax(dim=1).amax(dim=1).mean()), "real_shares": shares}


def _fits(cells: Sequence[Cell]) -> dict[str, PowerLaw]:
    """The power law of each method's trajectory error."""
    errors: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell.trajectory_error is not None:
            errors.setdefault(cell.method, {})[cell.steps] = cell.trajectory_error
    return {name: power_law_fit(list(points), list(points.values())) for name, points in errors.items()}


def _pictures_seen(row: Method) -> int:
    bundle = Path(row.run) / "bundle"
    names = [name for name in read_json(bundle / MANIFEST)["artifacts"] if name.startswith("expert-")]
    return sum(read_json(bundle / f"{name}.json")["pictures_seen"] for name in names)
