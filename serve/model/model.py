"""A trained bundle in this process, ready to sample."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ddm.bundle import Bundle
from ddm.errors import ConfigError, one_of, require, within
from ddm.grids import check_grid
from ddm.rng import RngStream, normal
from ddm.samplers import Sampler, Trajectory, drive, plan_steps
from ddm.schedules import Schedule
from router.networks import DerivativeNet, PosteriorNet
from router.policies import policy
from router.routing import ControlVariate, RoutedDenoiser, Router
from router.sources import Alpha, Integrated, Source, Stateless, prior
from router.targets import exact_posterior
from serve.model.build import build_expert, build_gaussians, build_router, build_schedule
from serve.model.params import SampleConfig

C = TypeVar("C")

_KEPT = 64  # recipes and routers, of as many different settings


class Trace(NamedTuple):
    """What happened on the way of B images in N steps, over K experts."""

    t: Tensor  # [N], the times of the calls
    alpha: Tensor  # [N, B, K]
    chosen: Tensor  # bool [N, B, K]: which experts moved which image when
    calls: int  # expert evaluations, an image each


@dataclass(frozen=True)
class SamplingPlan:
    """The way of an image under one `SampleConfig`, but for the experts: who moves it, from where, by which sampler."""

    config: SampleConfig
    router: Router
    control_variate: ControlVariate | None
    method: Sampler
    times: Sequence[Tensor]
    schedule: Schedule
    shape: Sequence[int]

    def start(self, seed: int | Tensor, index: Tensor) -> Tensor:
        """x at t = 1 of the images `index` `[B]` of a seed, or of one each `[B]`: `[B, C, H, W]`."""
        return normal(seed, RngStream.START, index, 0, self.shape) * self.schedule(self.times[0]).s

    def trajectory(self, x: Tensor, seed: int, index: Tensor) -> Trajectory:
        """The sampler, ready to be driven from `start`."""
        return self.method.trajectory(
            x,
            self.schedule,
            self.times,
            lambda step: normal(seed, RngStream.STEP, index, step, self.shape),
        )


class Model:
    """K experts and their router, ready to sample. Made by `load`.

    Attributes: `shape` of an image `[C, H, W]`, `names` and `pi` of the clusters, `version` (the SHA-256 of the manifest), and
    the parts: `schedule`, `experts`, `posterior`, `derivative` (None where the bundle has no router).
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device,
        images: Callable[[], dict[str, Tensor]] | None,
        experts: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.shape = bundle.partition.shape
        self.names = bundle.partition.names
        self.version = bundle.version
        self.pi = bundle.partition.pi.to(self.device)
        self.schedule: Schedule = build_schedule(bundle)
        self.experts = (
            [build_expert(artifact, self.schedule, self.device) for artifact in bundle.experts]
            if experts
            else []
        )
        self.gaussians = build_gaussians(bundle.experts, self.schedule, self.device)
        self.posterior: PosteriorNet | None = None
        self.derivative: DerivativeNet | None = None
        if bundle.router:
            self.posterior, self.derivative = build_router(
                bundle.router, self.shape, self.pi, self.schedule, self.device
            )
        self._images = images
        self._analytic: Alpha | None = None
        self._routers: dict[str, Router] = {}
        self._plans: dict[str, SamplingPlan] = {}

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
        """Draw images `first_index ... first_index + n - 1` of a seed: `[n, C, H, W]` in [-1, 1], float32, on the CPU.

        Image i is a function of (seed, i) and the settings: the same alone or among others. `settings` are the fields of
        `SampleConfig`. `batch` images go through the networks together; `progress` hears of every step how many they are.
        With `trace=True` returns `(images, Trace)`.

        Raises `ConfigError` naming the setting, the rule and the value.
        """
        config = self.settings(**settings)
        for key, value, least in (
            ("n", n, 1),
            ("first_index", first_index, 0),
            ("batch", batch, 1),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and value >= least,
                f"sample.{key}",
                f"be a whole number, at least {least}",
                value,
            )
        require(
            isinstance(seed, int) and 0 <= seed < 2**63,
            "sample.seed",
            "be a whole number in [0, 2^63)",
            seed,
        )
        finished, traces = [], []
        for low in range(first_index, first_index + n, batch):
            index = torch.arange(low, min(low + batch, first_index + n), device=self.device)
            images, routed = self._sample_batch(index, seed, config, trace, progress)
            finished.append(images.float().cpu())
            traces.append(routed)
        whole_batch = torch.cat(finished)
        return (whole_batch, _joined(traces)) if trace else whole_batch

    def settings(self, **settings: Any) -> SampleConfig:
        """The checked settings of a call to `sample`. Raises `ConfigError` naming what is unknown or out of range."""
        known = [field.name for field in fields(SampleConfig)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"sample has no setting {key!r}; it takes {', '.join(known)}")
        config = SampleConfig(**settings)
        config.check()
        with within("sample"):
            plan_steps(
                config.sampler, config.steps, config.grid, self.schedule, config.t_min, config.order
            )
            check_grid(config.grid, self.schedule)
        if unknown := [name for name in config.clusters if name not in self.names]:
            raise one_of("sample.clusters", unknown[0], tuple(self.names))
        needs_router = (
            config.source in ("posterior", "derivative", "combined") and len(self.names) > 1
        )
        if needs_router and self.posterior is None:
            raise ConfigError(
                f"sample.source must be prior or analytic for a bundle without a router, got {config.source!r}"
            )
        if config.source == "analytic" and self._images is None:
            raise ConfigError(
                "sample.source=analytic needs the training images: load the run's folder, a bundle carries none"
            )
        return config

    def plan(self, config: SampleConfig) -> SamplingPlan:
        """The way of an image under these checked settings; the same object for the same ones."""
        return kept(self._plans, repr(config), lambda: self._plan(config))

    def _plan(self, config: SampleConfig) -> SamplingPlan:
        method, times = plan_steps(
            config.sampler, config.steps, config.grid, self.schedule, config.t_min, config.order
        )
        return SamplingPlan(
            config,
            self._routed_by(config),
            self.gaussians.mix
            if config.control_variate == "gaussian" and config.policy != "fixed"
            else None,
            method,
            list(times),
            cache(self.schedule),  # the same few times for every image
            self.shape,
        )

    def _routed_by(self, config: SampleConfig) -> Router:
        """The router of these settings, the same object for the same ones: whoever has it can be routed together."""
        c = config
        key = repr(
            (
                c.source,
                c.relaxation_rate,
                c.policy,
                c.top_k,
                c.nucleus_p,
                c.budget,
                c.temperature,
                c.clusters,
            )
        )
        most = max(c.clusters.values(), default=1.0)  # the largest is 1: they become float32
        weights = (
            self.pi.new_tensor([c.clusters.get(name, 0.0) / most for name in self.names])
            if c.clusters
            else None
        )
        rule = policy(c.policy, c.top_k, c.nucleus_p, c.budget)
        return kept(
            self._routers,
            key,
            lambda: Router(self._source(c), rule, self.pi, weights, c.temperature),
        )

    def _source(self, config: SampleConfig) -> Source:
        if len(self.names) == 1 or config.source == "prior":
            return Stateless(prior(self.pi))
        if config.source == "analytic":
            return Stateless(self._exact())
        assert self.posterior is not None
        assert self.derivative is not None
        match config.source:
            case "posterior":
                return Stateless(self.posterior)
            case "derivative":
                return Integrated(self.derivative, self.pi)
            case _:
                return Integrated(self.derivative, self.pi, self.posterior, config.relaxation_rate)

    @torch.inference_mode()
    def _sample_batch(
        self,
        index: Tensor,
        seed: int,
        config: SampleConfig,
        trace: bool,
        progress: Callable[[int], object] | None,
    ) -> tuple[Tensor, RoutedDenoiser]:
        plan = self.plan(config)
        calls_per_step = plan.method.calls_per_step
        routed = RoutedDenoiser(
            self.experts,
            plan.router,
            seed=seed,
            index=index,
            calls_per_step=calls_per_step,
            clip=config.clip,
            control_variate=plan.control_variate,
            trace=trace,
        )
        asked = itertools.count()

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if progress is not None and next(asked) % calls_per_step == 0:
                progress(len(x))
            return routed(x, t)

        images, _calls = drive(plan.trajectory(plan.start(seed, index), seed, index), denoise)
        return (images.clamp(-1, 1) if config.clip else images), routed

    def _exact(self) -> Alpha:
        if self._analytic is None:
            assert self._images is not None
            whole = self._images()
            images, cluster = whole["images"].to(self.device), whole["cluster"].to(self.device)
            self._analytic = lambda x, t: exact_posterior(
                x, t, images, cluster, self.schedule, len(self.pi)
            )
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
