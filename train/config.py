"""The configuration of a run: one YAML file, and `key=value` words over it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from omegaconf import DictConfig

import configs
from ddm.device import pick_device
from ddm.errors import ConfigError, DdmError, require, within
from ddm.grids import check_grid
from ddm.privacy import PrivacyConfig
from ddm.samplers import plan_steps
from ddm.schedules import schedule
from experts.denoiser import ExpertConfig
from router.networks import RouterConfig
from serve import SampleConfig
from serve.model.config_merge import filled, read_yaml
from train.clustering import PartitionConfig
from train.data import DataConfig
from train.evaluation_config import EvaluateConfig, TableConfig
from train.launch_config import LaunchConfig
from train.watch_config import WatchConfig

_SHIPPED = Path(configs.__path__[0])

STAGES = ("partition", "seed_model", "expert", "router", "bundle", "monolith", "sample", "evaluate")
COMMANDS = (
    "shard",
    "export",
    "answer",
    "grow",
    "retrain",
    "remove",
    "reroute",
)  # are run only if they are named


@dataclass
class SeedModelConfig:
    """The stage `seed_model`: one network that all experts start from, trained first on what may be shared.

    steps: of its training, which is otherwise that of an expert, without a cooldown; 0 for no seed model
    data: the images that it is trained on, as in `data`; null for those of all clusters
    t_min: it sees images at t in [t_min, 1] alone, so that their owners need only give away noisy ones; in (0, 1).
        null for expert.t_min
    above: it also stays in the bundle and moves every image at t above this, the experts at the others; in [t_min, 1].
        With 1 it moves none, and is there for sample.autoguidance. null for a bundle of the experts alone
    """

    steps: int = 0
    data: DataConfig | None = None
    t_min: float | None = None
    above: float | None = None

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        require(self.steps >= 0, "steps", "be at least 0", self.steps)
        t_min = self.t_min
        require(t_min is None or 0 < t_min < 1, "t_min", "be in (0, 1), or null", t_min)
        if self.data is not None:
            self.data.check()


@dataclass
class ExpertStageConfig(ExpertConfig):
    """The stage `expert`: which of the experts, and how many at a time on this machine.

    index: train only this expert, in this process; null for all
    shard: the folder of one cluster (`export` or `shard` makes it), from which one expert is trained and nothing else
        is read; null for the run's partition
    init: an artifact whose weights the experts start from: an expert's or a seed model's, its folder, its file, or the
        run of a single model; null for the run's seed model, if there is one
    workers: processes; null for one per core on a CPU, one per GPU; 0 for none besides this one
    threads: CPU threads per expert; null for the cores divided by the experts. Bits of the weights depend on it
    devices: processes that share each batch of one expert, one GPU each if there are GPUs; a divisor of batch / accumulate
    """

    index: int | None = None
    shard: str | None = None
    init: str | None = None
    workers: int | None = None
    threads: int | None = None
    devices: int = 1

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        super().check()
        parts, devices = self.batch // self.accumulate, self.devices
        whole = devices >= 1 and parts % devices == 0
        require(whole, "devices", f"be at least 1 and divide batch / accumulate = {parts}", devices)
        for key, least in (("index", 0), ("workers", 0), ("threads", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, key, f"be at least {least}, or null", value)


@dataclass
class BundleConfig:
    """The stage `bundle`.

    half: also write `bundle-half/`, in half precision, for download
    experts: artifacts from anywhere, their folders or files; empty for the experts of this run's partition
    names: of their clusters; empty for those that the artifacts carry
    weights: of the mixture, above 0, one per expert; empty for the number of images that each was trained on
    """

    half: bool = False
    experts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass
class ShardConfig:
    """`shard`: one cluster's folder, from images of one's own.

    images: a folder of images, in it or in folders inside it; null for all images of `data`
    name: of the cluster; null for the folder's, or the data set's
    grey: read them as grey images, with one channel; for `images`
    out: the folder that is written; null for `shard` in the run's folder
    """

    images: str | None = None
    name: str | None = None
    grey: bool = False
    out: str | None = None


@dataclass
class UpdateConfig:
    """`grow`, `retrain`, `remove` and `reroute`: how a bundle changes.

    bundle: its folder; null for the run's
    cluster: the name of the cluster that is retrained or removed; the name of a new one, null for its expert's own
    expert: the artifact that is put in, its folder or a file of it; null for one that is trained from expert.shard
    weight: of its cluster, above 0; null for its number of images
    shards: folders of clusters that reroute takes with router.data=pooled, besides the run's own
    """

    bundle: str | None = None
    cluster: str | None = None
    expert: str | None = None
    weight: float | None = None
    shards: list[str] = field(default_factory=list)


@dataclass
class SampleStageConfig(SampleConfig):
    """The stage `sample`: how many images, and which.

    n: images, at least 1
    seed: of the noise, in [0, 2^63)
    first_index: the images are `first_index ... first_index + n - 1` of the seed
    format: `sheet`, or `folder` for one PNG file per image as well
    """

    n: int = 64
    seed: int = 0
    first_index: int = 0
    format: Literal["sheet", "folder"] = "sheet"

    def check(self) -> None:
        """Raise `ConfigError` naming the key `sample.…` of a value out of its range."""
        super().check()
        require(self.n >= 1, "sample.n", "be at least 1", self.n)
        require(0 <= self.seed < 2**63, "sample.seed", "be in [0, 2^63)", self.seed)
        require(self.first_index >= 0, "sample.first_index", "be at least 0", self.first_index)


@dataclass
class Config:
    """A whole run.

    run: its folder
    seed: of its partition and its training, in [0, 2^63)
    accelerator: where it trains and samples; auto for a GPU if there is one
    launch: where experts are trained
    data: the images
    partition: how they are cut into clusters
    schedule: `name` and the parameters of the forward process
    seed_model, expert, router, bundle, sample, evaluate: the stages
    shard, update: the commands
    privacy: noise on the moments that an expert's artifact carries
    watch: what is seen of training while it goes on
    table: what `python -m benchmarks.table` measures
    """

    run: str = "runs/digits"
    seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp_linear"})
    seed_model: SeedModelConfig = field(default_factory=SeedModelConfig)
    expert: ExpertStageConfig = field(default_factory=ExpertStageConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    sample: SampleStageConfig = field(default_factory=SampleStageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    table: TableConfig = field(default_factory=TableConfig)

    def check(self) -> None:
        """Raise `ConfigError` naming the first key whose value makes no sense."""
        require(bool(self.run), "run", "be a folder", self.run)
        require(0 <= self.seed < 2**63, "seed", "be in [0, 2^63)", self.seed)
        require("name" in self.schedule, "schedule.name", "be given", None)
        with within("schedule"):
            process = schedule(**self.schedule)
        signal = float(process(torch.ones((), dtype=torch.float64)).a)
        require(
            self.expert.parameterization != "epsilon" or signal > 1e-6,
            "expert.parameterization",
            f"not be epsilon on {process}: at t = 1 x is noise alone, from which no image follows",
            self.expert.parameterization,
        )
        with within("launch"):
            self.launch.check()
        measured = self.launch.backend == "ray" and self.expert.precision == "auto"
        rule = "be given with launch.backend=ray, whose nodes auto does not measure"
        require(not measured, "expert.precision", rule, self.expert.precision)
        self.data.check()
        self.partition.check()
        with within("seed_model"):
            self.seed_model.check()
        with within("expert"):
            self.expert.check()
        with within("router"):
            self.router.check()
        self._check_high_noise()
        with within("privacy"):
            self.privacy.check()
        require(
            self.privacy.sigma == 0 or self.router.data == "experts",
            "router.data",
            "be experts with privacy.sigma above 0: in the other ways images leave their owners",
            self.router.data,
        )
        own = self.seed_model.data is None and self.expert.init is None
        rule = "be given with privacy.sigma above 0, or seed_model.steps=0: images leave their owners otherwise"
        leaves = self.privacy.sigma > 0 and self.seed_model.steps > 0 and own
        require(not leaves, "seed_model.data", rule, None)
        self.watch.check(self.partition.holdout)
        self.sample.check()
        self._check_guide(self.sample)
        self.evaluate.check("evaluate")
        self.table.check("table")
        self.check_plan(self.sample, self.sample.steps)

    def _check_guide(self, cfg: SampleConfig) -> None:
        guide = cfg.autoguidance == SampleConfig.autoguidance or self.seed_model.above is not None
        rule = "be left at 1 without a seed model in the bundle: give seed_model.above=1"
        require(guide, "sample.autoguidance", rule, cfg.autoguidance)

    def _check_high_noise(self) -> None:
        """Raise `ConfigError` naming a key that does not fit to who moves the images at high noise."""
        seed, cfg = self.seed_model, self.expert
        if seed.above is not None:
            least = cfg.t_min if seed.t_min is None else seed.t_min
            known = seed.steps > 0 or cfg.init is not None
            rule = "be null without a seed model: give seed_model.steps above 0, or expert.init"
            require(known, "seed_model.above", rule, seed.above)
            rule = f"be in [{least:g}, 1], from where on the seed model learns"
            require(least <= seed.above <= 1, "seed_model.above", rule, seed.above)
            told = cfg.condition == "none" or seed.data is None
            rule = (
                f"be null for a seed model of its own images with expert.condition={cfg.condition}"
            )
            require(told, "seed_model.above", rule, seed.above)
        if cfg.t_max is not None:
            key = "expert.t_max"
            reaches = seed.above is not None and seed.above <= cfg.t_max
            rule = (
                "be null, or at least seed_model.above, down to which the seed model moves images"
            )
            require(reaches, key, rule, cfg.t_max)
            alone = "be null with {}: an expert that knows no noise samples nothing alone"
            by_images = self.router.data != "experts"
            require(by_images, key, alone.format("router.data=experts"), cfg.t_max)
            unseen = self.watch.sheet_every == 0
            require(unseen, key, alone.format("watch.sheet_every above 0"), cfg.t_max)

    def check_plan(self, cfg: SampleConfig, *steps: int) -> None:
        """Raise `ConfigError` if the sampler or the grid is not defined for the schedule at these numbers of steps."""
        process = schedule(**self.schedule)
        with within("sample"):
            for count in steps:
                plan_steps(cfg.sampler, count, cfg.grid, process, cfg.t_min, cfg.order)
            check_grid(cfg.grid, process)

    def samplers(self, cfg: EvaluateConfig, section: str) -> dict[str, SampleConfig]:
        """The samplers that are compared, by name; `sample`'s own if none is named.

        Raises `ConfigError` naming the sampler and its setting.
        """
        usual = {field.name: getattr(self.sample, field.name) for field in fields(SampleConfig)}
        found = {}
        for name, settings in (cfg.samplers or {self.sample.sampler: {}}).items():
            try:
                one = filled(SampleConfig, usual | settings)
                one.check()
                self._check_guide(one)
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
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else config


def changed(config: Any) -> dict[str, Any]:
    """The keys of a config that are not at their defaults, for hashes: a key that is added later does not change them."""
    usual, found = type(config)(), {}
    for key, value in vars(config).items():
        if is_dataclass(value):
            found[key] = changed(value)
        elif value != getattr(usual, key):
            found[key] = plain(value)
    return found


def default_config() -> Path:
    """The config that is meant if none is named: the built-in digits."""
    return _SHIPPED / "digits.yaml"


def shipped_configs() -> list[str]:
    """The names of the configs that come with the program."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def config_file(word: str) -> Path | None:
    """The file that a word means: a path to YAML or the name of a shipped config; None if it is neither."""
    if word.endswith((".yaml", ".yml")):
        return Path(word)
    return _SHIPPED / f"{word}.yaml" if word in shipped_configs() else None


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """Read a YAML file and `key=value` words over it; unknown keys, wrong types and bad values are refused by name.

    Without a path it is the built-in digits. Raises `ConfigError`.
    """
    tree = read_config_file(path or default_config(), ConfigError)
    config = filled(Config, DictConfig(tree), *overrides)
    config.check()
    return config


def read_config_file(path: Path, error: type[DdmError]) -> dict[str, Any]:
    """The tree of keys in a YAML file. Raises the `error` given, naming the file, if it is not one."""
    if not path.exists():
        names = " ".join(shipped_configs())
        raise error(f"there is no config {path}; those that come with the program are {names}")
    if not path.is_file():
        raise error(f"{path} must be a YAML file, it is a folder, fifo or device")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), Config)
    except RecursionError as cause:
        raise error(f"{path} is nested too deeply") from cause
    except (yaml.YAMLError, OSError, ValueError) as cause:
        raise error(f"{path} is not a YAML file that can be read: {cause}") from cause
    if not isinstance(tree, dict):
        raise error(f"{path} must hold keys with values")
    return {str(key): value for key, value in tree.items()}
