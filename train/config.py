"""The configuration of a run: one YAML file, and `key=value` words over it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf

import configs
from ddm.device import pick_device
from ddm.errors import ConfigError, one_of, require, within
from ddm.grids import check_grid
from ddm.samplers import plan_steps
from ddm.schedules import schedule
from experts.denoiser import ExpertConfig
from router.networks import RouterConfig
from serve import SampleConfig
from serve.model.config_merge import filled
from train.clustering import PartitionConfig
from train.data import DataConfig
from train.evaluation.feature_files import script_files

STAGES = ("partition", "expert", "router", "bundle", "monolith", "sample", "evaluate")


@dataclass
class ExpertStageConfig(ExpertConfig):
    """The stage `expert`: which of the experts, and how many at a time on this machine."""

    index: int | None = None  # train only this one
    workers: int | None = None  # processes; null is one a core on a CPU, one on a GPU

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        super().check()
        require(
            self.index is None or self.index >= 0,
            "index",
            "be at least 0, or null for all",
            self.index,
        )
        require(
            self.workers is None or self.workers >= 1,
            "workers",
            "be at least 1, or null",
            self.workers,
        )


@dataclass
class BundleConfig:
    """The stage `bundle`."""

    half: bool = False  # also bundle-half/, in half precision, to give away


@dataclass
class SampleStageConfig(SampleConfig):
    """The stage `sample`: how many images, from which seed."""

    n: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raise `ConfigError` naming the key `sample.…` of a value out of its range."""
        super().check()
        require(self.n >= 1, "sample.n", "be at least 1", self.n)
        require(self.seed >= 0, "sample.seed", "be at least 0", self.seed)


PAPER = ("DDIM", "Naive", "MoG-a", "MoG-da")
METHODS = (*PAPER, "balanced", "balanced-cv", "adaptive", "top-1", "top-2", "nucleus", "full")
Precision = Literal["32-true", "bf16-mixed"]


@dataclass
class EvaluateConfig:
    """What is measured: which methods and samplers, on how many images, and with whose features."""

    n: int = 1000  # images a method, sampler, number of steps and seed
    seeds: int = 1  # sampling seeds 0, 1, ...: with several there are error bars
    steps: list[int] = field(default_factory=lambda: [10, 25, 50, 100])
    methods: list[str] = field(
        default_factory=lambda: [*PAPER, "balanced", "balanced-cv", "top-1", "full"]
    )
    # NAME: {settings over sample}; none means sample's own:
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    # `classifier` (a small one, trained on the spot), `inception`, TorchScript files, or folders of them:
    features: list[str] = field(default_factory=lambda: ["classifier"])
    # Distances are to REFERENCE.NETWORK.npz beside NETWORK.pt; null: to the run's images.
    reference: str | None = None
    inception_weights: str | None = None  # for inception: pt_inception-2015-12-05-6726825d.pth
    trajectories: int = 64  # paths for the trajectory error, of seed 0
    reference_steps: int = 1000
    monolith_steps: int | None = (
        None  # of the row DDIM's one model; null is as many as all experts; 0 for no row
    )
    batch: int = 256
    precision: Precision = "32-true"  # of the networks while drawing

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

    def check_files(self, section: str) -> None:
        """Raise `ConfigError` naming the key of a file that is not there: asked only where it is to be measured."""
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
            elif name != "classifier" and not Path(name).is_dir():
                require(
                    Path(name).is_file(),
                    f"{section}.features",
                    "be of classifier, inception, TorchScript files and folders of them",
                    name,
                )
            found += name in ("classifier", "inception") or len(script_files(Path(name)))
        require(
            found > 0,
            f"{section}.features",
            "hold at least one network: such as [classifier]",
            list(self.features),
        )


@dataclass
class TableConfig(EvaluateConfig):
    """What `python -m benchmarks.table` measures: every method, over three seeds."""

    seeds: int = 3
    methods: list[str] = field(default_factory=lambda: list(METHODS))


@dataclass
class Config:
    """A whole run. `run` is its folder, `seed` that of its training."""

    run: str = "runs/digits"
    seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp_linear"})
    expert: ExpertStageConfig = field(default_factory=ExpertStageConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)
    sample: SampleStageConfig = field(default_factory=SampleStageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    table: TableConfig = field(default_factory=TableConfig)

    def check(self) -> None:
        """Raise `ConfigError` naming the first key whose value makes no sense."""
        require(bool(self.run), "run", "be a folder", self.run)
        require(0 <= self.seed < 2**63, "seed", "be in [0, 2^63)", self.seed)
        require("name" in self.schedule, "schedule.name", "be given", None)
        with within("schedule"):
            schedule(**self.schedule)
        self.data.check()
        self.partition.check()
        with within("expert"):
            self.expert.check()
        with within("router"):
            self.router.check()
        self.sample.check()
        self.evaluate.check("evaluate")
        self.table.check("table")
        self.check_plan(self.sample, self.sample.steps)

    def check_plan(self, cfg: SampleConfig, *steps: int) -> None:
        """Raise `ConfigError` where the sampler or the grid is not defined for the schedule at these numbers of steps."""
        process = schedule(**self.schedule)
        with within("sample"):
            for count in steps:
                plan_steps(cfg.sampler, count, cfg.grid, process, cfg.t_min, cfg.order)
            check_grid(cfg.grid, process)

    def samplers(self, cfg: EvaluateConfig, section: str) -> dict[str, SampleConfig]:
        """The samplers that are compared, by name; `sample`'s own where none is named.

        Raises `ConfigError` naming the sampler and what of it cannot be.
        """
        usual = {field.name: getattr(self.sample, field.name) for field in fields(SampleConfig)}
        found = {}
        for name, settings in (cfg.samplers or {self.sample.sampler: {}}).items():
            try:
                one = filled(SampleConfig, usual, settings)
                one.check()
                require(
                    one.grid != "own",
                    "sample.grid",
                    "not be own where several numbers of steps are compared",
                    "own",
                )
                self.check_plan(one, *cfg.steps, cfg.reference_steps)
            except ConfigError as error:
                if not cfg.samplers:
                    raise
                raise ConfigError(f"{section}.samplers.{name}: {error}") from error
            found[name] = one
        return found

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run)

    @property
    def device(self) -> str:
        """Where the networks run when they sample."""
        return "cpu" if self.accelerator == "cpu" else pick_device()


def plain(config: Any) -> Any:
    """A config as plain data, for JSON, YAML and hashes."""
    return OmegaConf.to_container(OmegaConf.structured(config)) if is_dataclass(config) else config


def default_config() -> Path:
    """The file that is meant where none is named: the built-in digits."""
    return Path(configs.__path__[0]) / "digits.yaml"


def load_config(path: Path, overrides: Sequence[str]) -> Config:
    """Read a YAML file and `key=value` words over it; unknown keys, wrong types and bad values are refused by name.

    Raises `ConfigError`.
    """
    try:
        text = OmegaConf.load(path)
    except FileNotFoundError:
        at_hand = " ".join(
            sorted(f"configs/{file.name}" for file in default_config().parent.glob("*.yaml"))
        )
        raise ConfigError(
            f"there is no config {path}; those that come with the program are {at_hand}"
        ) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file that can be read: {error}") from error
    if not isinstance(text, DictConfig):
        raise ConfigError(f"{path} must hold keys with values, and holds a list")
    config = filled(Config, text, *overrides)
    config.check()
    return config
