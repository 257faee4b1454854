"""Measuring a run: every method's samples, made by the code that serves, and real images."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import digest, read_json, sha256, write_json
from ddm.bundle import MANIFEST, listed_artifacts
from ddm.device import device_name
from ddm.errors import ArtifactError, require
from ddm.measures import PowerLaw, power_law_fit, trajectory_error
from ddm.partition import Partition
from router.policies import policy
from train.config import Config, plain
from train.evaluation.classifier import check_classes, classes_of, held_out
from train.evaluation.feature_files import feature_files, reference_file
from train.evaluation.feature_network import FeatureNetwork
from train.evaluation.features import feature_networks
from train.evaluation.memorization import VERSION, RealImages
from train.evaluation.methods import Method, bundle_version, methods
from train.evaluation.report import write_report
from train.evaluation.results import Cell, Copies, Evaluation, Features, Memorization, Score
from train.evaluation.rows import ONE_MODEL
from train.evaluation.samples import SampleSet, SampleSpec, SampleStore
from train.evaluation.scores import Scores, class_frequencies_of, read_reference
from train.evaluation.tables import middle, print_tables
from train.evaluation_config import EvaluateConfig
from train.launch import workers_for
from train.progress import bar

log = logging.getLogger(__name__)

# Of the classifier, and of the real images that samples are compared with, whatever the run's seed.
FEATURE_SEED = 0


def evaluate(config: Config, monoliths: Mapping[str, Config]) -> Evaluation:
    """Measure what `config.evaluate` says and print the tables.

    Writes `evaluate/record.json` and `report.html`.
    """
    began = time.monotonic()
    measurement = Measurement(config, monoliths, config.evaluate, "evaluate")
    report = config.folder / "report.html"
    up_to_date = report.exists() and measurement.is_made()
    evaluation = measurement.make()
    if not up_to_date:
        measurement.sample()
        shown = measurement.shown_specs()
        samples = {(spec.method.name, spec.steps): measurement.samples(spec) for spec in shown}
        write_report(report, evaluation, samples)
    print_tables(evaluation)
    log.info(
        "evaluate   %s in %.0f s: %s",
        "up to date" if up_to_date else "done",
        time.monotonic() - began,
        report,
    )
    return evaluation


class Measurement:
    """What a section of the config asks to measure of a run, in this folder of the run's.

    Raises `ConfigError` if a sampler, a file of features or a method cannot be had.
    """

    def __init__(
        self, config: Config, monoliths: Mapping[str, Config], cfg: EvaluateConfig, folder: str
    ) -> None:
        self.config = config
        self.cfg = cfg
        self.folder = config.folder / folder
        # The ablations and the recipe have folders of their own, and the table's settings.
        section = self.section = "evaluate" if folder == "evaluate" else "table"
        cfg.check_files(section)
        self.cut = Partition.read(config.folder / "partition")
        _check_clusters(config.folder / "bundle", self.cut)
        self.methods = methods(config, monoliths, cfg.methods, self.cut.k)
        require(
            len(self.methods) > 0,
            f"{section}.methods",
            f"name a row besides {' and '.join(ONE_MODEL)} without a monolith",
            cfg.methods,
        )
        channels, usual = self.cut.shape[0], {"classifier", "pixels"}
        require(
            channels in (1, 3) or usual.issuperset(cfg.features),
            f"{section}.features",
            f"be classifier or pixels for images of {channels} channels",
            cfg.features,
        )
        samplers = config.samplers(cfg, section)
        self.samplers = {name: plain(sampler) for name, sampler in samplers.items()}
        self.store = SampleStore(self.folder / "samples", config.device, cfg.precision, cfg.batch)
        self.specs = self._specs()
        self.reference = self._reference()

    def _specs(self) -> list[SampleSpec]:
        """The samples of every cell and seed; the trajectory error is measured for seed 0."""
        cfg = self.cfg
        specs = [
            SampleSpec(
                method,
                sampler,
                steps,
                seed,
                cfg.n,
                cfg.trajectories if seed == 0 else 0,
                settings,
            )
            for method in self.methods
            for sampler, settings in self.samplers.items()
            for steps in cfg.steps_for(method.name)
            for seed in range(cfg.seeds)
        ]
        for name, count in Counter(spec.name for spec in specs).items():
            key, rule = f"{self.section}.samplers", "give every cell a name of its own"
            require(count == 1, key, rule, f"{count} cells with the name {name}")
        return specs

    def _reference(self) -> SampleSpec:
        """The full mixture's own trajectories, with the first sampler in many steps."""
        config, count = self.config, self.cfg.trajectories
        routed = self.cut.k == 1 or "router" in listed_artifacts(
            config.folder / "bundle" / MANIFEST
        )
        full: dict[str, Any] = {
            "source": "posterior" if routed else "gaussian",
            "policy": "full",
            "control_variate": "none",
            "temperature": 1.0,
            "clusters": {},
        }
        mixture = Method("reference", config.run, bundle_version(config), full)
        sampler, settings = next(iter(self.samplers.items()))
        steps = self.cfg.reference_steps
        return SampleSpec(mixture, sampler, steps, 0, count, count, settings)

    def make(self) -> Evaluation:
        """Sample and score what is not there yet, and write `record.json`."""
        if self.is_made():
            return Evaluation.read(self.folder / "record.json")
        cfg, config = self.cfg, self.config
        whole = self._images()
        if "classifier" in cfg.features:
            check_classes(classes_of(whole), f"{self.section}.features")
        self.sample()
        networks = feature_networks(
            cfg.features,
            cfg.inception_weights,
            whole,
            FEATURE_SEED,
            config.device,
            cfg.pixel_directions,
        )
        scores: dict[str, dict[str, Score]] = {}
        features: dict[str, Features] = {}
        for network in networks:
            scores[network.name], features[network.name] = self._scored(network, whole)
        cells = self._cells(scores)
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
            memorization=self._memorization(whole),
            hardware=device_name(config.device),
        )
        write_json(self.folder / "record.json", {"key": self._key(), **asdict(evaluation)})
        return evaluation

    def sample(self) -> None:
        """Make the samples that are not there yet."""
        config = self.config
        specs = [self.reference, *self.specs]
        nfe = [_nfe_per_step(spec.method, config, self.cut.k) for spec in specs]
        workers = workers_for(len(specs), config.device, config.expert.workers)
        self.store.make(specs, nfe, workers)

    def is_made(self) -> bool:
        """Whether `record.json` is there and was made from the same samples, files and settings."""
        path = self.folder / "record.json"
        return path.exists() and read_json(path).get("key") == self._key()

    def samples(self, spec: SampleSpec) -> SampleSet:
        """The samples of a cell and seed."""
        return self.store.read(spec)

    def shown_specs(self) -> list[SampleSpec]:
        """The samples that are shown: those of the first sampler and of seed 0."""
        first = next(iter(self.samplers))
        return [spec for spec in self.specs if spec.sampler == first and spec.seed == 0]

    def _images(self) -> dict[str, Tensor]:
        """The partition's images and labels in the order of the data set, however they were cut."""
        return self.cut.in_order(self.config.folder / "partition")

    def _cells(self, scores: dict[str, dict[str, Score]]) -> list[Cell]:
        reference = self.samples(self.reference).ends
        cells = []
        for spec in self.specs:
            samples = self.samples(spec)
            error = None
            if spec.trajectories > 0 and spec.method.run == self.config.run:
                error = trajectory_error(samples.ends, reference)
            by_features = {name: found[spec.name] for name, found in scores.items()}
            cells.append(
                Cell(
                    spec.method.name,
                    spec.sampler,
                    spec.steps,
                    spec.seed,
                    samples.nfe,
                    error,
                    by_features,
                )
            )
        return cells

    def _key(self) -> str:
        cfg = self.cfg
        files = [
            sha256(file)
            for name in cfg.features
            for file in feature_files(name, cfg.inception_weights, cfg.reference)
        ]
        specs = [self.reference, *self.specs]
        facts = [self.store.facts(spec) | {"name": spec.name} for spec in specs]
        shown = plain(self.config.sample)
        return digest([Scores.VERSION, VERSION, facts, plain(cfg), self.cut.hash, files, shown])

    def _scored(
        self, network: FeatureNetwork, whole: dict[str, Tensor]
    ) -> tuple[dict[str, Score], Features]:
        """The scores by one network, by the name of the samples, and what they were compared with.

        Each score is kept in a file of its own, so that an interruption loses no work.
        """
        count = len(whole["images"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(FEATURE_SEED))
        file = reference_file(network.file, self.cfg.reference)
        if file is not None:  # real images are then needed only for the floor, neighbours and KID
            order = order[: self.cfg.n * self.cfg.seeds]
        facts = Features(
            what=network.what,
            file=sha256(network.file) if network.file else None,
            reference=file.name if file else f"the {count:,} images of the run",
            reference_file=sha256(file) if file else None,
            real_confidence=None,
            real_class_frequencies=None,
        )
        scores: dict[str, Score] = {}
        total = len(order) + self.cfg.n * len(self.specs)
        with bar(f"scoring: {network.name}"[:24], total) as advance:
            real = network(whole["images"][order], advance)
            if real.logits is not None and network.name == "classifier":
                unseen = real.logits[held_out(count, FEATURE_SEED)[order]]
                facts.real_confidence = float(unseen.softmax(dim=1).amax(dim=1).mean())
                facts.real_class_frequencies = class_frequencies_of(
                    classes_of(whole), unseen.shape[1]
                )
            reference = read_reference(file) if file else None
            compared = real.features if file is None else real.features[: self.cfg.n]
            measure = Scores(compared, reference)
            for spec in self.specs:
                scores[spec.name] = self._score(spec, network, measure, facts)
                advance(self.cfg.n)
        facts.floor = self._floor(measure, real.features, resampled=file is None)
        return scores, facts

    def _memorization(self, whole: dict[str, Tensor]) -> Memorization:
        """How near the samples of every method and seed are to training images, at one step count."""
        first, steps = next(iter(self.samplers)), middle([spec.steps for spec in self.specs])
        specs = [spec for spec in self.specs if spec.steps == steps]
        folder = self.config.folder / "partition"
        held_out = self.cut.holdout(folder)["images"] if self.cut.holdout_sizes else None
        real = RealImages(
            whole["images"],
            whole["cluster"],
            held_out,
            self.config.data.flip,
            self.config.device,
        )
        methods: dict[str, list[Copies]] = {}
        with bar("copies", self.cfg.n * (len(specs) + 1)) as advance:
            floor = real.floor(self.cfg.n, FEATURE_SEED, advance)
            for spec in specs:
                name = spec.method.name + ("" if spec.sampler == first else f", {spec.sampler}")
                methods.setdefault(name, []).append(self._copies(spec, real, advance))
        count = sum(self.cut.holdout_sizes)
        return Memorization(steps, count, real.expected, floor, methods)

    def _copies(
        self, spec: SampleSpec, real: RealImages, advance: Callable[[int], object]
    ) -> Copies:
        """Of a set of samples, from its file if samples and real images are the same."""
        path = self.folder / "copies" / f"{spec.name}.json"
        key = digest([VERSION, self.store.facts(spec), self.cut.hash, real.flip])
        if path.exists() and (kept := read_json(path)).get("key") == key:
            advance(self.cfg.n)
            return Copies(**kept["copies"])
        copies = real.copies(self.samples(spec).images, advance)
        write_json(path, {"key": key, "copies": asdict(copies)})
        return copies

    def _floor(self, measure: Scores, real: Tensor, resampled: bool) -> list[float]:
        """The Frechet distance of as many real images as samples, for each seed.

        They are drawn with replacement from the images that the distance is to, which the same
        number of samples from their distribution is like. Where it is to a file's statistics, they
        are real images of the run, different ones for each seed as far as there are enough.
        """
        n = self.cfg.n
        floor = []
        for seed in range(self.cfg.seeds):
            if resampled:
                generator = torch.Generator().manual_seed(seed)
                places = torch.randint(len(real), (n,), generator=generator)
            else:
                places = torch.arange(seed * n, (seed + 1) * n) % len(real)
            floor.append(measure.frechet(real[places]))
        return floor

    def _score(
        self, spec: SampleSpec, network: FeatureNetwork, measure: Scores, facts: Features
    ) -> Score:
        """The score of a set of samples, from its file if samples and features are the same."""
        path = self.folder / "scores" / f"{spec.name}-{network.name}.json"
        key = digest([Scores.VERSION, asdict(facts), self.store.facts(spec), self.cut.hash])
        if path.exists():
            kept = read_json(path)
            if kept.get("key") == key and set(kept["score"]) == set(Score.__dataclass_fields__):
                return Score(**kept["score"])
        score = measure(network(self.samples(spec).images, lambda _: None))
        write_json(path, {"key": key, "score": asdict(score)})
        return score


def _check_clusters(bundle: Path, cut: Partition) -> None:
    """Raise `ArtifactError` if the experts of a bundle are of other clusters than a partition's."""
    mixture = read_json(bundle / MANIFEST)["mixture"]
    if mixture["clusters"] != cut.hashes:
        names, folder = mixture["names"], bundle.parent / "partition"
        raise ArtifactError(
            f"{bundle} has experts of other clusters, or in another order, {names}, than {folder}, {cut.names}: samples "
            "are measured against the images of the run's partition, which must be those of all its experts"
        )


def _nfe_per_step(method: Method, config: Config, k: int) -> float:
    """About how many experts a step evaluates per image: the longest work starts first."""
    if method.run != config.run:
        return 1.0
    chosen = policy(method.settings["policy"], top_k=method.settings.get("top_k", 1))
    return chosen.nfe_per_step(k)


def _fits(cells: Sequence[Cell]) -> dict[str, dict[str, PowerLaw]]:
    """The power law of the trajectory error of each method with each sampler."""
    errors: dict[str, dict[str, dict[int, float]]] = {}
    for cell in cells:
        if cell.trajectory_error is not None:
            by_sampler = errors.setdefault(cell.method, {})
            by_sampler.setdefault(cell.sampler, {})[cell.steps] = cell.trajectory_error
    return {
        method: {
            sampler: power_law_fit(list(points), list(points.values()))
            for sampler, points in by_sampler.items()
        }
        for method, by_sampler in errors.items()
    }


def _images_seen(row: Method) -> int:
    bundle = Path(row.run) / "bundle"
    artifacts = read_json(bundle / MANIFEST)["artifacts"]
    experts = [
        read_json(bundle / f"{name}.json") for name in artifacts if name.startswith("expert-")
    ]
    seeds = {
        facts["init"]["sha256"]: facts["init"]["images_seen"]
        for facts in experts
        if "init" in facts
    }
    return sum(facts["images_seen"] for facts in experts) + sum(seeds.values())
