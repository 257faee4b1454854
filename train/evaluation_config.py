"""The configuration of `evaluate` and of the table: which methods are measured, on how many images, by what."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddm.errors import one_of, require
from train.evaluation.feature_files import reference_file, script_files
from train.evaluation.pixels import DIRECTIONS
from train.evaluation.rows import METHODS, PAPER

Precision = Literal["32-true", "bf16-mixed"]


@dataclass
class EvaluateConfig:
    """What is measured: which methods and samplers, on how many images, and with which features.

    n: images per method, sampler, number of steps and seed; at least 20
    seeds: sampling seeds 0, 1, ...; in [1, 100]; with one there are no error bars
    steps: two or more numbers of steps in [1, 1000]
    steps_up_to: `{METHOD: steps}`: a row that costs more is measured up to this many steps, the others at all of them;
        at two numbers of steps at least
    methods: rows of the table, of `METHODS`
    samplers: `{NAME: {settings over sample}}`; empty for the sampler of `sample`
    features: `classifier` (a small one, trained on the spot), `pixels` (whitened: for small images), `inception`,
        TorchScript files, or folders of them. Name at least two of different kinds: a classifier rewards images that
        are clearly of a class, pixels do not
    pixel_directions: leading principal directions of the real images for pixels; in [1, 1024]
    reference: distances are to `REFERENCE.NETWORK.npz` beside `NETWORK.pt`; null for the run's images
    inception_weights: the file pt_inception-2015-12-05-6726825d.pth, for inception
    trajectories: trajectories for the trajectory error, of seed 0; in [1, n]
    reference_steps: steps of the trajectories that these are compared with; above `steps`, at most 1000
    monolith_steps: training steps of the row one-model; null for as many as all experts together, 0 for no such row
    batch: images per call of the networks
    precision: of the networks while sampling
    """

    n: int = 1000
    seeds: int = 2
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100])
    steps_up_to: dict[str, int] = field(default_factory=dict)
    methods: list[str] = field(
        default_factory=lambda: [*PAPER, "balanced", "balanced-cv", "top-1", "full"]
    )
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: list[str] = field(default_factory=lambda: ["classifier", "pixels"])
    pixel_directions: int = DIRECTIONS
    reference: str | None = None
    inception_weights: str | None = None
    trajectories: int = 64
    reference_steps: int = 1000
    monolith_steps: int | None = None
    batch: int = 256
    precision: Precision = "32-true"

    def check(self, section: str) -> None:
        """Raise `ConfigError` naming the key `section.…` of a value out of its range."""
        require(self.n >= 20, f"{section}.n", "be at least 20", self.n)
        require(1 <= self.seeds <= 100, f"{section}.seeds", "be in [1, 100]", self.seeds)
        steps = self.steps
        require(
            len(set(steps)) == len(steps) >= 2 and all(1 <= n <= 1000 for n in steps),
            f"{section}.steps",
            "be two or more different step counts in [1, 1000]",
            steps,
        )
        require(len(self.methods) > 0, f"{section}.methods", "name at least one method", [])
        for name in self.methods:
            if name not in METHODS:
                raise one_of(f"{section}.methods", name, METHODS)
        once = len(set(self.methods)) == len(self.methods)
        require(once, f"{section}.methods", "name each row once", self.methods)
        for name, most in self.steps_up_to.items():
            if name not in METHODS:
                raise one_of(f"{section}.steps_up_to", name, METHODS)
            require(1 <= most <= 1000, f"{section}.steps_up_to.{name}", "be in [1, 1000]", most)
        require(
            1 <= self.pixel_directions <= 1024,
            f"{section}.pixel_directions",
            "be in [1, 1024]",
            self.pixel_directions,
        )
        for name in self.samplers:
            require(
                name.replace("-", "").replace("_", "").isalnum(),
                f"{section}.samplers",
                "have plain names",
                name,
            )
        require(
            1 <= self.trajectories <= self.n,
            f"{section}.trajectories",
            f"be in [1, {section}.n = {self.n}]",
            self.trajectories,
        )
        reference = self.reference_steps
        require(
            max(steps) < reference <= 1000,
            f"{section}.reference_steps",
            f"be in ({max(steps)}, 1000], above every {section}.steps",
            reference,
        )
        require(
            self.monolith_steps is None or self.monolith_steps >= 0,
            f"{section}.monolith_steps",
            "be at least 0, or null",
            self.monolith_steps,
        )
        require(self.batch >= 1, f"{section}.batch", "be at least 1", self.batch)

    def steps_for(self, method: str) -> list[int]:
        """The numbers of steps that a method is measured at, at least two."""
        most = self.steps_up_to.get(method, 1000)
        kept = [n for n in self.steps if n <= most]
        return kept if len(kept) > 1 else sorted(self.steps)[:2]

    def check_files(self, section: str) -> None:
        """Raise `ConfigError` naming the key of a file that does not exist: checked only before measuring."""
        found = 0
        for name in self.features:
            if name == "inception":
                weights = self.inception_weights
                require(
                    weights is not None and Path(weights).is_file(),
                    f"{section}.inception_weights",
                    f"be a file for inception among {section}.features",
                    weights,
                )
            elif name not in ("classifier", "pixels") and not Path(name).is_dir():
                require(
                    Path(name).is_file(),
                    f"{section}.features",
                    "hold classifier, pixels, inception, or TorchScript files that exist, or folders of them",
                    name,
                )
            built_in = name in ("classifier", "pixels", "inception")
            found += built_in or len(script_files(Path(name)))
        require(
            found > 0,
            f"{section}.features",
            "hold at least one network: such as [classifier, pixels]",
            list(self.features),
        )
        self._check_names(section)

    def _check_names(self, section: str) -> None:
        """Raise `ConfigError` for two networks of one name, and for a reference that none has."""
        files = [
            file
            for name in self.features
            if name not in ("classifier", "pixels", "inception")
            for file in script_files(Path(name))
        ]
        own = [name for name in self.features if name in ("classifier", "pixels", "inception")]
        names = own + [file.stem for file in files]
        once = len(set(names)) == len(names)
        require(once, f"{section}.features", "hold networks of different names", names)
        if "inception" in own and self.inception_weights is not None:
            files.append(Path(self.inception_weights))
        known = [file for file in files if reference_file(file, self.reference) is not None]
        require(
            self.reference is None or not files or bool(known),
            f"{section}.reference",
            "be null, or name statistics REFERENCE.NETWORK.npz beside one of the networks",
            self.reference,
        )


@dataclass
class TableConfig(EvaluateConfig):
    """What `python -m benchmarks.table` measures: every method, over three seeds."""

    seeds: int = 3
    methods: list[str] = field(default_factory=lambda: list(METHODS))
