"""A trained bundle in this process, ready to sample."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ddm.bundle import Bundle
from ddm.errors import ConfigError, one_of, require
from ddm.rng import Use, normal
from ddm.samplers import Sampler, Walk, drive, plan
from ddm.schedules import Schedule, schedule
from router.networks import DerivativeNet, PosteriorNet
from router.policies import policy
from router.routing import Control, RoutedDenoiser, Router
from router.sources import Alpha, Forgetful, Integrated, Source, prior
from router.targets import exact_posterior
from serve.model.build import build_expert, build_gaussians, build_router
from serve.model.params import SampleConfig

C = TypeVar("C")

_KEPT = 64  # recipes and routers, of as many different settings


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
        self.gaussians = build_gaussians(bundle.experts, self.schedule, self.device)
        self.experts = [build_expert(artifact, self.schedule, self.device) for artifact in bundle.experts] if experts else []
        self.posterior: PosteriorNet | None = None
        self.derivative: DerivativeNet | None = None
        if bundle.router:
            self.posterior, self.derivative = build_router(
                bundle.router, self.shape, self.pi, self.schedule, self.device
            )
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


