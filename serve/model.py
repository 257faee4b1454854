"""A trained bundle in this process: load it, check every hash, sample."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ddm.bundle import Artifact, Bundle, read_bundle
from ddm.errors import ArtifactError, ConfigError, one_of, require
from ddm.gaussian import MOMENTS, Gaussians
from ddm.grids import GRIDS
from ddm.partition import Partition
from ddm.randomness import Use, normal
from ddm.samplers import SAMPLERS, Sampler, Walk, drive, plan, sampler
from ddm.schedules import Schedule, schedule
from experts.denoiser import Denoiser, ExpertConfig
from router.networks import DerivativeNet, PosteriorNet, RouterConfig
from router.policies import POLICIES, policy
from router.routing import Control, RoutedDenoiser, Router
from router.sources import SOURCES, Alpha, Forgetful, Integrated, Source, prior
from router.targets import exact_posterior
from serve.fill import filled

C = TypeVar("C")

CONTROLS = ("none", "gaussian")
_KEPT = 64  # recipes and routers, of as many different settings


@dataclass
class SampleConfig:
    """How pictures are drawn; the names are those of configs, code and HTTP."""

    steps: int = 25
    sampler: str = "dpmpp_2m"
    grid: str = "uniform_t"
    source: str = "combined"
    policy: str = "balanced"
    top_k: int = 1  # for policy=top_k
    nucleus_p: float = 0.9  # for policy=nucleus
    budget: float = 1.5  # for policy=adaptive: calls a step, on average at most
    temperature: float = 1.0  # alpha^(1/temperature), renormalized, is what the policy sees: below 1 more decided
    control: str = "gaussian"  # what stands in for the experts that are not asked; none for nothing
    order: int = 3  # for sampler=unipc
    pull: float = 40.0  # for source=combined, towards the posterior net, a unit of t
    t_min: float = 0.0  # where the grid ends
    clip: bool = True  # bound the denoised pictures to [-1, 1], after mixing
    clusters: dict[str, float] = field(default_factory=dict)  # factors of their shares, 0 for others; none for all

    def check(self) -> None:
        """Raise `ConfigError` naming the key `sample.…` of a value that is unknown or out of range."""
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        require(whole and 1 <= self.steps <= 1000, "sample.steps", "be in [1, 1000]", self.steps)
        for key, names in (("sampler", SAMPLERS), ("grid", GRIDS), ("source", SOURCES), ("policy", POLICIES)):
            if getattr(self, key) not in names:
                raise one_of(f"sample.{key}", getattr(self, key), names)
        if self.control not in CONTROLS:
            raise one_of("sample.control", self.control, CONTROLS)
        policy(self.policy, self.top_k, self.nucleus_p, self.budget)
        require(0.01 <= self.temperature <= 100, "sample.temperature", "be in [0.01, 100]", self.temperature)
        sampler(self.sampler, self.order)
        require(self.pull >= 0, "sample.pull", "be at least 0", self.pull)
        require(0 <= self.t_min <= 0.999, "sample.t_min", "be in [0, 0.999]", self.t_min)
        enough = all(0 <= weight < math.inf for weight in self.clusters.values()) and sum(self.clusters.values()) > 0
        require(
            not self.clusters or enough,
            "sample.clusters",
            "have finite weights of at least 0, not all 0",
            self.clusters,
        )


class Trace(NamedTuple):
    """What happened on the way of B pictures in N steps, over K experts."""

    t: Tensor  # [N], the times of the calls
    alpha: Tensor  # [N, B, K]
    chosen: Tensor  # bool [N, B, K]: which experts moved which picture when
    calls: int  # expert evaluations, a picture each


@dataclass(frozen=True)
class Recipe:
    """The way of a picture under one `SampleConfig`, but for the experts: who moves it, from where, by which sampler."""

    config: SampleConfig
    router: Router
    control: Control | None
    method: Sampler
    times: Sequence[Tensor]
    schedule: Schedule
    shape: Sequence[int]

    def start(self, seed: int | Tensor, index: Tensor) -> Tensor:
        """x at t = 1 of the pictures `index` `[B]` of a seed, or of one each `[B]`: `[B, C, H, W]`."""
        return normal(seed, Use.START, index, 0, self.shape) * self.schedule(self.times[0]).s

    def walk(self, x: Tensor, seed: int, index: Tensor) -> Walk:
        """The sampler, ready to be driven from `start`."""
        return self.method.walk(
            x, self.schedule, self.times, lambda step: normal(seed, Use.STEP, index, step, self.shape)
        )


class Model:
    """K experts and their router, ready to sample. Made by `load`.

    Attributes: `shape` of a picture `[C, H, W]`, `names` and `pi` of the clusters, `version` (the SHA-256 of the manifest), and
    the parts: `schedule`, `experts`, `posterior`, `derivative` (None where the bundle has no router).
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device,
        pictures: Callable[[], dict[str, Tensor]] | None,
        experts: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.shape, self.names, self.version = bundle.partition.shape, bundle.partition.names, bundle.version
        self.pi = bundle.partition.pi.to(self.device)
        self.schedule: Schedule = schedule(**bundle.schedule)
        self.gaussians = self._gaussians(bundle.experts)
        self.experts = [_expert(artifact, self.schedule, self.device) for artifact in bundle.experts] if experts else []
        self.posterior: PosteriorNet | None = None
        self.derivative: DerivativeNet | None = None
        if bundle.router:
            self.posterior, self.derivative = self._router(bundle.router)
        self._pictures = pictures
        self._analytic: Alpha | None = None
        self._routers: dict[str, Router] = {}
        self._recipes: dict[str, Recipe] = {}

    @overload
    def sample(self, n: int, *, trace: Literal[False] = False, **settings: Any) -> Tensor: ...

    @overload
    def sample(self, n: int, *, trace: Literal[True], **settings: Any) -> tuple[Tensor, Trace]: ...

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        trace: bool = False,
        progress: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> Tensor | tuple[Tensor, Trace]:
        """Draw pictures `first_index ... first_index + n - 1` of a seed: `[n, C, H, W]` in [-1, 1], float32, on the CPU.

        Picture i is a function of (seed, i) and the settings: the same alone or among others. `settings` are the fields of
        `SampleConfig`. `batch` pictures go through the networks together; `progress` hears of every step how many they are.
        With `trace=True` returns `(images, Trace)`.

        Raises `ConfigError` naming the setting, the rule and the value.
        """
        config = self.settings(**settings)
        for key, value, least in (("n", n, 1), ("first_index", first_index, 0), ("batch", batch, 1)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= least, f"sample.{key}", f"be a whole number, at least {least}", value)
        require(isinstance(seed, int) and 0 <= seed < 2**63, "sample.seed", "be a whole number in [0, 2^63)", seed)
        images, traces = [], []
        for low in range(first_index, first_index + n, batch):
            index = torch.arange(low, min(low + batch, first_index + n), device=self.device)
            pictures, routed = self._walk(index, seed, config, trace, progress)
            images.append(pictures.float().cpu())
            traces.append(routed)
        whole_batch = torch.cat(images)
        return (whole_batch, _joined(traces)) if trace else whole_batch

    def settings(self, **settings: Any) -> SampleConfig:
        """The checked settings of a call to `sample`. Raises `ConfigError` naming what is unknown or out of range."""
        known = [field.name for field in fields(SampleConfig)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"sample has no setting {key!r}; it takes {', '.join(known)}")
        config = SampleConfig(**settings)
        config.check()
        plan(config.sampler, config.steps, config.grid, self.schedule, config.t_min, config.order)
        if unknown := [name for name in config.clusters if name not in self.names]:
            raise one_of("sample.clusters", unknown[0], tuple(self.names))
        needs_router = config.source in ("posterior", "derivative", "combined") and len(self.names) > 1
        if needs_router and self.posterior is None:
            raise ConfigError(
                f"sample.source must be prior or analytic for a bundle without a router, got {config.source!r}"
            )
        if config.source == "analytic" and self._pictures is None:
            raise ConfigError(
                "sample.source=analytic needs the training pictures: load the run's folder, a bundle carries none"
            )
        return config

    def recipe(self, config: SampleConfig) -> Recipe:
        """The way of a picture under these checked settings; the same object for the same ones."""
        return kept(self._recipes, repr(config), lambda: self._recipe(config))

    def _recipe(self, config: SampleConfig) -> Recipe:
        method, times = plan(config.sampler, config.steps, config.grid, self.schedule, config.t_min, config.order)
        return Recipe(
            config,
            self._routed_by(config),
            self.gaussians.mix if config.control == "gaussian" and config.policy != "fixed" else None,
            method,
            list(times),
            cache(self.schedule),  # the same few times for every picture
            self.shape,
        )

    def _routed_by(self, config: SampleConfig) -> Router:
        """The router of these settings, the same object for the same ones: whoever has it can be routed together."""
        c = config
        key = repr((c.source, c.pull, c.policy, c.top_k, c.nucleus_p, c.budget, c.temperature, c.clusters))
        most = max(c.clusters.values(), default=1.0)  # the largest is 1: they become float32
        weights = self.pi.new_tensor([c.clusters.get(name, 0.0) / most for name in self.names]) if c.clusters else None
        rule = policy(c.policy, c.top_k, c.nucleus_p, c.budget)
        return kept(self._routers, key, lambda: Router(self._source(c), rule, self.pi, weights, c.temperature))

    def _source(self, config: SampleConfig) -> Source:
        if len(self.names) == 1 or config.source == "prior":
            return Forgetful(prior(self.pi))
        if config.source == "analytic":
            return Forgetful(self._exact())
        assert self.posterior is not None
        assert self.derivative is not None
        match config.source:
            case "posterior":
                return Forgetful(self.posterior)
            case "derivative":
                return Integrated(self.derivative, self.pi)
            case _:
                return Integrated(self.derivative, self.pi, self.posterior, config.pull)

    @torch.inference_mode()
    def _walk(
        self, index: Tensor, seed: int, config: SampleConfig, trace: bool, progress: Callable[[int], object] | None
    ) -> tuple[Tensor, RoutedDenoiser]:
        recipe = self.recipe(config)
        calls_per_step, router = recipe.method.calls_per_step, recipe.router
        routed = RoutedDenoiser(
            self.experts,
            router.source,
            router.policy,
            seed,
            index=index,
            pi=router.pi,
            weights=router.weights,
            temperature=router.temperature,
            calls_per_step=calls_per_step,
            clip=config.clip,
            control=recipe.control,
            trace=trace,
        )
        asked = itertools.count()

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if progress is not None and next(asked) % calls_per_step == 0:
                progress(len(x))
            return routed(x, t)

        pictures, _calls = drive(recipe.walk(recipe.start(seed, index), seed, index), denoise)
        return (pictures.clamp(-1, 1) if config.clip else pictures), routed

    def _exact(self) -> Alpha:
        if self._analytic is None:
            assert self._pictures is not None
            whole = self._pictures()
            images, cluster = whole["images"].to(self.device), whole["cluster"].to(self.device)
            self._analytic = lambda x, t: exact_posterior(x, t, images, cluster, self.schedule, len(self.pi))
        return self._analytic

    def _gaussians(self, artifacts: list[Artifact]) -> Gaussians:
        means, variances = (
            torch.stack([_taken(artifact, name) for artifact in artifacts]).to(self.device) for name in MOMENTS
        )
        return Gaussians(means, variances, self.schedule)

    def _router(self, artifact: Artifact) -> tuple[PosteriorNet, DerivativeNet]:
        posterior, derivative = _config(RouterConfig, artifact).build(self.shape, self.pi.cpu(), self.schedule)
        _fill(torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative}), artifact)
        return (
            posterior.eval().requires_grad_(False).to(self.device),
            derivative.eval().requires_grad_(False).to(self.device),
        )


def load(folder: str | Path, device: str | torch.device = "cpu", experts: bool = True) -> Model:
    """Load a run's folder or a bundle's, checking every hash; without `experts`, all but their networks.

    Raises `ArtifactError` naming the file that is missing, damaged or foreign, and why.
    """
    inner, clusters = bundle_folder(folder), Path(folder) / "partition"

    def pictures() -> dict[str, Tensor]:
        return Partition.read(clusters).all(clusters)

    return Model(read_bundle(inner), device, None if inner == Path(folder) else pictures, experts)


def bundle_folder(folder: str | Path) -> Path:
    """The bundle of a run, or the folder itself. Raises `ArtifactError` where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder: give a run or a bundle, such as runs/digits")
    return folder / "bundle" if (folder / "bundle").is_dir() else folder


def picked_device(name: str) -> str:
    """`auto` is cuda where there is one. Raises `ConfigError` where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"serve.device must be auto or a device of this machine, got {name!r}", "serve.device"
        ) from error
    return name


def load_expert(folder: str | Path, k: int, device: str | torch.device = "cpu") -> tuple[Denoiser, str]:
    """Expert k of a run or a bundle, alone, and the bundle's version; no other artifact is read.

    Raises `ArtifactError` naming the file that is missing, damaged or foreign, and why.
    """
    inner = bundle_folder(folder)
    bundle = read_bundle(inner, only=[f"expert-{k:02d}"])
    if not bundle.experts:
        raise ArtifactError(f"{inner} has no expert {k}, it has {bundle.partition.k}")
    _ = [_taken(bundle.experts[0], name) for name in MOMENTS]
    return _expert(bundle.experts[0], schedule(**bundle.schedule), torch.device(device)), bundle.version


def _expert(artifact: Artifact, schedule: Schedule, device: torch.device) -> Denoiser:
    denoiser = _config(ExpertConfig, artifact).build(artifact.facts["shape"], schedule)
    _fill(denoiser, artifact)
    return denoiser.eval().requires_grad_(False).to(device)


def kept(cache: dict[str, C], key: str, make: Callable[[], C]) -> C:
    """The cache's own, made where it is not there; the oldest goes where there are many."""
    if key not in cache:
        if len(cache) >= _KEPT:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]


def _joined(batches: list[RoutedDenoiser]) -> Trace:
    steps = list(zip(*(routed.steps for routed in batches), strict=True))
    return Trace(
        torch.tensor([parts[0].t for parts in steps], dtype=torch.float64),
        torch.stack([torch.cat([part.alpha for part in parts]) for parts in steps]),
        torch.stack([torch.cat([part.chosen for part in parts]) for parts in steps]),
        sum(routed.calls for routed in batches),
    )


def _config(schema: type[C], artifact: Artifact) -> C:
    try:
        return filled(schema, artifact.facts["config"])
    except (ConfigError, KeyError) as error:
        raise ArtifactError(
            f"{artifact.stem}.json is not of this version: its config does not fit ({error})"
        ) from error


def _taken(artifact: Artifact, name: str) -> Tensor:
    """A tensor of an artifact that is not the network's, taken out."""
    try:
        return artifact.tensors.pop(name)
    except KeyError as error:
        raise ArtifactError(
            f"{artifact.stem}.safetensors is not of this version: it has no tensor {name}, so train it anew"
        ) from error


def _fill(module: torch.nn.Module, artifact: Artifact) -> None:
    try:
        module.load_state_dict(artifact.tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{artifact.stem}.safetensors does not fit the network that its JSON describes: {error}"
        ) from error
