"""Measuring a run: every method's images, drawn by the very code that serves, against the real ones."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ddm.artifacts import digest, read_json, sha256, write_json
from ddm.bundle import MANIFEST
from ddm.errors import require
from ddm.measures import PowerLaw, power_law_fit, trajectory_error
from ddm.partition import Partition
from train.config import Config, EvaluateConfig, plain
from train.evaluation.features import FeatureNetwork, feature_networks, held_out, script_files
from train.evaluation.methods import Method, methods
from train.evaluation.report import print_tables, write_report
from train.evaluation.results import Cell, Evaluation, Features, Score
from train.evaluation.samples import SampleSet, SampleSpec, SampleStore
from train.evaluation.scores import Scores, class_frequencies_of, read_reference
from train.launch import workers_for
from train.progress import bar

log = logging.getLogger(__name__)

_JUDGE = 0  # the seed of the classifier and of the real images it judges, whatever the run's


def evaluate(config: Config, monolith: Config | None) -> Evaluation:
    """Measure what `config.evaluate` says, write `evaluate/record.json` and `report.html`, and print the table."""
    began = time.monotonic()
    measured = Measurement(config, monolith, config.evaluate, "evaluate")
    report = config.folder / "report.html"
    fresh = not (report.exists() and measured.is_made())
    evaluation = measured.make()
    if fresh:
        shown = {(d.method.name, d.steps): measured.drawn(d) for d in measured.first_draws()}
        write_report(report, evaluation, shown)
    print_tables(evaluation)
    log.info(
        "evaluate   %s in %.0f s: %s",
        "done" if fresh else "up to date",
        time.monotonic() - began,
        report,
    )
    return evaluation


class Measurement:
    """Everything that a section of the config says is to be measured of a run, in the folder `SECTION/` of the run.

    Raises `ConfigError` where a sampler or a file of features cannot be had.
    """

    def __init__(
        self, config: Config, monolith: Config | None, cfg: EvaluateConfig, section: str
    ) -> None:
        self.config, self.cfg, self.folder = config, cfg, config.folder / section
        cfg.check_files(section)
        self.cut = Partition.read(config.folder / "partition")
        self.methods = methods(config, monolith, cfg.methods, self.cut.k)
        require(
            len(self.methods) > 0,
            f"{section}.methods",
            "name a row besides DDIM without a monolith",
            cfg.methods,
        )
        self.samplers = {
            name: plain(sampler) for name, sampler in config.samplers(cfg, section).items()
        }
        self.draws = SampleStore(self.folder / "draws", config.device, cfg.precision, cfg.batch)
        self.cells = [
            SampleSpec(
                method, sampler, steps, seed, cfg.n, cfg.trajectories if seed == 0 else 0, settings
            )
            for method in self.methods
            for sampler, settings in self.samplers.items()
            for steps in cfg.steps
            for seed in range(cfg.seeds)
        ]
        mixture = Method(
            "reference",
            config.run,
            sha256(config.folder / "bundle" / MANIFEST),
            {"source": "posterior", "policy": "full", "control_variate": "none"},
        )
        first, settings = next(iter(self.samplers.items()))
        paths = cfg.trajectories
        self.reference = SampleSpec(mixture, first, cfg.reference_steps, 0, paths, paths, settings)

    def make(self) -> Evaluation:
        """Draw and score what is not there yet, and write `record.json`."""
        if self.is_made():
            return Evaluation.read(self.folder / "record.json")
        cfg, config, cut = self.cfg, self.config, self.cut
        every = [self.reference, *self.cells]
        calls = [_calls_per_step(draw.method, config, cut.k) for draw in every]
        self.draws.make(every, calls, workers_for(len(every), config.device, config.expert.workers))
        whole = cut.all(config.folder / "partition")
        order = whole[
            "index"
        ].argsort()  # so that the judge is the same however the images were cut
        whole = {name: tensor[order] for name, tensor in whole.items()}
        networks = feature_networks(
            cfg.features, cfg.inception_weights, whole, _JUDGE, config.device
        )
        ends, scores, features = self.drawn(self.reference).ends, {}, {}
        for network in networks:
            scores[network.name], features[network.name] = self._scored(network, whole)
        cells = []
        for draw in self.cells:
            drawn = self.drawn(draw)
            compared = draw.paths > 0 and draw.method.run == config.run
            error = trajectory_error(drawn.ends, ends) if compared else None
            of = {name: found[draw.name] for name, found in scores.items()}
            cells.append(
                Cell(draw.method.name, draw.sampler, draw.steps, draw.seed, drawn.calls, error, of)
            )
        evaluation = Evaluation(
            config=plain(config),
            versions={row.name: row.version for row in self.methods},
            images_seen={row.name: _images_seen(row) for row in self.methods},
            features=features,
            samplers=self.samplers,
            n=cfg.n,
            seeds=cfg.seeds,
            precision=cfg.precision,
            cells=cells,
            fits=_fits(cells),
        )
        write_json(self.folder / "record.json", {"key": self._key(), **asdict(evaluation)})
        return evaluation

    def is_made(self) -> bool:
        """Whether `record.json` is there, and is of this."""
        path = self.folder / "record.json"
        return path.exists() and read_json(path).get("key") == self._key()

    def drawn(self, draw: SampleSpec) -> SampleSet:
        """What a draw gave."""
        return self.draws.read(draw)

    def first_draws(self) -> list[SampleSpec]:
        """The cells of the first sampler and of seed 0, which are shown."""
        first = next(iter(self.samplers))
        return [draw for draw in self.cells if draw.sampler == first and draw.seed == 0]

    def _key(self) -> str:
        files = [
            sha256(Path(file)) for name in self.cfg.features for file in _files(name, self.cfg)
        ]
        draws = [
            self.draws.facts(draw) | {"name": draw.name} for draw in [self.reference, *self.cells]
        ]
        return digest([draws, plain(self.cfg), self.cut.hash, files])

    def _scored(
        self, network: FeatureNetwork, whole: dict[str, Tensor]
    ) -> tuple[dict[str, Score], Features]:
        """The score of every cell with one network, by the draw's name, and what the images were held against.

        Scores are kept in files, one a draw, so that whoever is cut off here has not lost them.
        """
        count = len(whole["images"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_JUDGE))
        file = reference_file(network.file, self.cfg.reference)
        if file is not None:  # the real images are then only for what compares image by image
            order = order[: self.cfg.n]
        facts = Features(
            what=network.what,
            file=sha256(network.file) if network.file else None,
            reference=file.name if file else f"the {count:,} images of the run",
            reference_file=sha256(file) if file else None,
            real_confidence=None,
            real_class_frequencies=None,
        )
        with bar(
            f"scoring: {network.name}"[:24], len(order) + self.cfg.n * len(self.cells)
        ) as advance:
            judged = network(whole["images"][order], advance)
            if judged.logits is not None and network.name == "classifier":
                unseen = judged.logits[held_out(count, _JUDGE)[order]]
                facts.real_confidence = float(unseen.softmax(dim=1).amax(dim=1).mean())
                facts.real_class_frequencies = class_frequencies_of(
                    whole.get("labels", whole["cluster"]), unseen.shape[1]
                )
            measure, found = Scores(judged.features, read_reference(file) if file else None), {}
            for draw in self.cells:
                kept = self.folder / "scores" / f"{draw.name}-{network.name}.json"
                key = digest([asdict(facts), self.draws.facts(draw), self.cut.hash])
                if not kept.exists() or read_json(kept)["key"] != key:
                    score = measure(network(self.drawn(draw).images, lambda _: None))
                    write_json(kept, {"key": key, "score": asdict(score)})
                found[draw.name] = Score(**read_json(kept)["score"])
                advance(self.cfg.n)
        return found, facts


def reference_file(network: Path | None, reference: str | None) -> Path | None:
    """The statistics that belong to a network's file, where `evaluate.reference` names any and they lie beside it."""
    if network is None or reference is None:
        return None
    file = network.with_name(f"{reference}.{network.stem}.npz")
    return file if file.is_file() else None


def _files(name: str, cfg: EvaluateConfig) -> list[Path]:
    """The files that a word of `evaluate.features` stands for, statistics included."""
    if name == "classifier":
        return []
    if name == "inception":
        return [Path(cfg.inception_weights or "")]
    networks = script_files(Path(name))
    return networks + [
        file for network in networks if (file := reference_file(network, cfg.reference))
    ]


def _calls_per_step(method: Method, config: Config, k: int) -> float:
    """About how many experts a step asks, for the order of the work."""
    of = {
        "full": float(k),
        "top_k": float(method.settings.get("top_k", 1)),
        "nucleus": 2.0,
        "adaptive": 1.5,
    }
    return 1.0 if method.run != config.run else of.get(method.settings["policy"], 1.0)


def _fits(cells: Sequence[Cell]) -> dict[str, dict[str, PowerLaw]]:
    """The power law of the trajectory error of each method with each sampler."""
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for cell in cells:
        if cell.trajectory_error is not None:
            errors.setdefault(cell.method, {}).setdefault(cell.sampler, {})[cell.steps] = (
                cell.trajectory_error
            )
    return {
        method: {
            name: power_law_fit(list(points), list(points.values()))
            for name, points in by_sampler.items()
        }
        for method, by_sampler in errors.items()
    }


def _images_seen(row: Method) -> int:
    bundle = Path(row.run) / "bundle"
    names = [
        name for name in read_json(bundle / MANIFEST)["artifacts"] if name.startswith("expert-")
    ]
    return sum(read_json(bundle / f"{name}.json")["images_seen"] for name in names)
