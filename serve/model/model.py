"""A trained bundle in this process, ready to sample."""

import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from ddm.bundle import Bundle
from ddm.condition import Condition, Vocabulary
from ddm.errors import ArtifactError, ConfigError, one_of, require, within
from ddm.rng import RngStream, normal
from ddm.samplers import Course, Sampler, Trajectory, drive, plan_steps
from ddm.schedules import Schedule
from router.networks import DerivativeNet, PosteriorNet
from router.policies import policy
from router.routing import RoutedDenoiser
from router.sources import Alpha, Integrated, Source, Stateless, prior
from router.step import ControlVariate, Router
from router.targets import exact_posterior
from serve.model.build import (
    build_counts,
    build_expert,
    build_gaussians,
    build_router,
    build_schedule,
)
from serve.model.params import SETTINGS, SampleConfig, SampleSettings, described

_CACHED = 64  # sampling plans, and routers, of as many different settings


class Trace(NamedTuple):
    """What happened while B images were sampled by N denoiser calls, over K experts.

    t: times of the calls, `[N]`
    alpha: `[N, B, K]`
    chosen: which experts moved which image at which call, bool `[N, B, K]`
    calls: expert evaluations, counted per image
    router_calls: evaluations of alpha, counted per image; between two, `alpha` is the last
    """

    t: Tensor
    alpha: Tensor
    chosen: Tensor
    calls: int
    router_calls: int


@dataclass(frozen=True)
class SamplingPlan:
    """Everything needed to sample with one `SampleConfig`, except the experts."""

    config: SampleConfig
    router: Router
    control_variate: ControlVariate | None
    method: Sampler
    times: Sequence[Tensor]
    schedule: Schedule
    shape: Sequence[int]
    condition: Condition | None = None  # None for experts without one

    @property
    def evaluations(self) -> float:
        """Of a network by each expert that is called, on average over the steps: 2 with guidance."""
        if self.condition is None:
            return 1.0
        times = torch.stack(list(self.times[:-1]))
        return float(self.condition.at(times, len(times)).evaluations.float().mean())

    def start(self, seed: int | Tensor, index: Tensor) -> Tensor:
        """x at t = 1, `[B, C, H, W]`, of images `index` `[B]`; one seed or one per image `[B]`."""
        return normal(seed, RngStream.START, index, 0, self.shape) * self.schedule(self.times[0]).s

    def course(self, seed: int | Tensor, index: Tensor) -> Course:
        """What the sampler's steps share, for images `index` `[B]` of one seed or one each `[B]`."""
        return Course(
            self.schedule,
            self.times,
            lambda n: normal(seed, RngStream.STEP, index, n, self.shape),
        )

    def trajectory(self, x: Tensor, seed: int, index: Tensor) -> Trajectory:
        """The sampler, ready to be driven from `start`."""
        return self.method.trajectory(x, *self.course(seed, index))


class Model:
    """K experts and their router, ready to sample. Made by `load`.

    shape: of an image, `[C, H, W]`
    names, pi: of the clusters, `[K]`
    version: the SHA-256 of the manifest
    vocabulary: what a condition may name, None if the experts take none
    schedule, experts, gaussians, posterior, derivative: the parts; the last two are None for a
        bundle without a router
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device,
        images: Callable[[], dict[str, Tensor]] | None,
        experts: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.shape = bundle.mixture.shape
        self.names = bundle.mixture.names
        self.version = bundle.version
        self.pi = bundle.mixture.pi.to(self.device)
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
                bundle.router, self.shape, self.pi, self.gaussians, self.device
            )
        self._counts = [one for one in map(build_counts, bundle.experts) if one is not None]
        self.vocabulary: Vocabulary | None = self._counts[0].vocabulary if self._counts else None
        self._images = images
        self._old_router = bundle.old_router is not None
        self._analytic: Alpha | None = None
        self._manifest = bundle.manifest
        # The caches hold the model weakly: a model that is replaced frees its memory at once.
        weak = weakref.proxy(self)
        self._cached_plan = lru_cache(_CACHED)(partial(Model._plan, weak))
        self._cached_router = lru_cache(_CACHED)(partial(Model._router, weak))

    def __repr__(self) -> str:
        clusters = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        networks = [*self.experts, *filter(None, (self.posterior, self.derivative))]
        numbers = sum(p.numel() for network in networks for p in network.parameters())
        return (
            f"Model({len(self.names)} experts ({clusters}), "
            f"{'with' if self.posterior else 'without'} a router, "
            f"{numbers / 1e6:.2f}M parameters, images {' x '.join(map(str, self.shape))}, "
            f"{self.schedule}, on {self.device}, version {self.version[:12]})"
        )

    @overload
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        trace: Literal[False] = False,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        trace: Literal[True],
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> tuple[Tensor, Trace]: ...

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 256,
        trace: bool = False,
        progress: Callable[[int], object] | None = None,
        **settings: Unpack[SampleSettings],
    ) -> Tensor | tuple[Tensor, Trace]:
        """Sample images `first_index ... first_index + n - 1` of a seed: `[n, C, H, W]`, float32,
        on the CPU.

        Image i is a function of (seed, i) and the settings, whatever else is sampled. Values are in
        [-1, 1] unless `clip=False`.

        n: at least 1
        seed: in [0, 2^63)
        first_index: at least 0
        batch: images that go through the networks together, at least 1
        trace: also return a `Trace`
        progress: called at each step with the number of images that take it

        Raises `ConfigError` naming the setting, the rule and the value; `ArtifactError` if the
        images are not finite.
        """
        config = self.settings(**settings)
        with within("sample"):
            _check_whole("n", n, 1)
            _check_whole("seed", seed, 0)
            _check_whole("first_index", first_index, 0)
            _check_whole("batch", batch, 1)
        finished = []
        traces = []
        for low in range(first_index, first_index + n, batch):
            index = torch.arange(low, min(low + batch, first_index + n), device=self.device)
            images, routed = self._sample_batch(index, seed, config, trace, progress)
            if not images.isfinite().all():
                raise ArtifactError(
                    f"{self._manifest}: images {low} to {low + len(index) - 1} "
                    f"of seed {seed} are not finite: "
                    "the weights are damaged, or do not work with these settings"
                )
            finished.append(images.float().cpu())
            traces.append(routed)
        whole_batch = torch.cat(finished)
        return (whole_batch, _joined(traces)) if trace else whole_batch

    def settings(self, **settings: Any) -> SampleConfig:
        """The checked settings of a call to `sample`.

        Raises `ConfigError` naming what is unknown or out of range.
        """
        known = [setting.name for setting in SETTINGS]
        for key in settings:
            if key not in known:
                raise ConfigError(f"sample has no setting {key!r}; it takes {', '.join(known)}")
        config = SampleConfig(**settings)
        config.check()
        for name in config.clusters or ():
            if name not in self.names:
                raise one_of("sample.clusters", name, tuple(self.names))
        self._check_condition(config)
        needs_router = config.source in ("posterior", "derivative", "combined")
        if needs_router and len(self.names) > 1 and self.posterior is None:
            why = (
                "whose router was trained for other experts (python -m train reroute trains it on)"
                if self._old_router
                else "without a router"
            )
            raise ConfigError(
                f"sample.source must be prior, gaussian or analytic for a bundle {why}, "
                f"got {config.source!r}"
            )
        if config.source == "analytic" and self._images is None:
            raise ConfigError(
                "sample.source=analytic needs the training images: "
                "load the run's folder, a bundle carries none"
            )
        with within("sample"):
            self.plan(config)
        return config

    def _check_condition(self, config: SampleConfig) -> None:
        condition, key = config.condition, "sample.condition"
        if not condition:
            return
        rule = "be left out for a bundle whose experts were trained without one"
        require(self.vocabulary is not None, key, rule, condition)
        assert self.vocabulary is not None
        with within("sample"):
            self.vocabulary.check(condition)
        some = f" of {', '.join(config.clusters)}" if config.clusters else ""
        rule = f"be what training images of a cluster{some} show"
        require(max(self._factors(config) or [1]) > 0, key, rule, condition)

    def _factors(self, config: SampleConfig) -> tuple[float, ...] | None:
        """The factors of pi and alpha by `clusters` and `condition`, the largest 1; None for 1.

        By Bayes' rule those of a condition c are `p(c | k)`, its fraction in each cluster. For pi
        they are exact, and for alpha if `p_k(x, t | c) = p_k(x, t)`.
        """
        if not config.clusters and not config.condition:
            return None
        factors = [1.0] * len(self.names)
        if config.clusters:
            factors = [config.clusters.get(name, 0.0) for name in self.names]
        if config.condition:
            parts = [counts.fraction(config.condition) for counts in self._counts]
            factors = [factor * part for factor, part in zip(factors, parts, strict=True)]
        most = max(factors) or 1.0  # becomes 1, because they become float32
        return tuple(factor / most for factor in factors)

    def _condition(self, config: SampleConfig) -> Condition | None:
        if self.vocabulary is None:
            return None
        vector = self.vocabulary.vector(config.condition or {}).to(self.device)
        first, last = config.guidance_interval or (0.0, 1.0)
        return Condition(vector, config.guidance, (first, last))

    def plan(self, config: SampleConfig) -> SamplingPlan:
        """Everything needed to sample with these settings, except the experts; cached.

        Raises `ConfigError` if the sampler or the grid is not defined for the schedule.
        """
        return self._cached_plan(config)

    def _plan(self, config: SampleConfig) -> SamplingPlan:
        method, times = plan_steps(
            config.sampler, config.steps, config.grid, self.schedule, config.t_min, config.order
        )
        router = self._router_of(config)
        # A policy that keeps its experts follows their own ODEs, not the mixture's.
        with_gaussians = config.control_variate == "gaussian" and not router.policy.keeps
        return SamplingPlan(
            config,
            router,
            self.gaussians.mix if with_gaussians else None,
            method,
            list(times),
            cache(self.schedule),  # called at the same few times for every image
            self.shape,
            self._condition(config),
        )

    def _router_of(self, config: SampleConfig) -> Router:
        """The router of these settings; the same object for the same settings, so that requests can
        share a batch.
        """
        c = config
        rule = (c.policy, c.top_k, c.nucleus_p, c.budget, c.switch_rate)
        factors = self._factors(c)
        return self._cached_router(c.source, c.relaxation_rate, rule, factors, c.temperature)

    def _router(
        self,
        source: str,
        relaxation_rate: float,
        rule: tuple[str, int, float, float, float],
        factors: tuple[float, ...] | None,
        temperature: float,
    ) -> Router:
        weights = None if factors is None else self.pi.new_tensor(factors)
        return Router(
            self._source(source, relaxation_rate), policy(*rule), self.pi, weights, temperature
        )

    def _source(self, source: str, relaxation_rate: float) -> Source:
        if len(self.names) == 1 or source == "prior":
            return Stateless(prior(self.pi))
        if source == "analytic":
            model = weakref.proxy(self)  # a cached router must not hold the model

            def exact(x: Tensor, t: Tensor) -> Tensor:
                return model._exact(x, t)

            return Stateless(exact)
        if source == "gaussian":
            return Stateless(partial(self.gaussians.posterior, pi=self.pi))
        assert self.posterior is not None
        assert self.derivative is not None
        match source:
            case "posterior":
                return Stateless(self.posterior)
            case "derivative":
                return Integrated(self.derivative, self.pi)
            case _:
                return Integrated(self.derivative, self.pi, self.posterior, relaxation_rate)

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
            condition=plan.condition,
            trace=trace,
        )
        calls = itertools.count()

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if progress is not None and next(calls) % calls_per_step == 0:
                progress(len(x))
            return routed(x, t)

        images, _calls = drive(plan.trajectory(plan.start(seed, index), seed, index), denoise)
        return (images.clamp(-1, 1) if config.clip else images), routed

    def _exact(self, x: Tensor, t: Tensor) -> Tensor:
        """alpha over the training set, which is read at the first call: on no event loop."""
        if self._analytic is None:
            assert self._images is not None
            whole = self._images()
            self._analytic = partial(
                exact_posterior,
                images=whole["images"].to(self.device),
                labels=whole["cluster"].to(self.device),
                schedule=self.schedule,
                k=len(self.pi),
            )
        return self._analytic(x, t)


def _check_whole(key: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    rule = f"be a whole number in [{least}, 2^63)"
    require(whole and least <= value < 2**63, key, rule, value)


def _joined(batches: list[RoutedDenoiser]) -> Trace:
    steps = list(zip(*(routed.steps for routed in batches), strict=True))
    return Trace(
        torch.tensor([parts[0].t for parts in steps], dtype=torch.float64),
        torch.stack([torch.cat([part.alpha for part in parts]) for parts in steps]),
        torch.stack([torch.cat([part.chosen for part in parts]) for parts in steps]),
        sum(routed.calls for routed in batches),
        sum(routed.router_calls for routed in batches),
    )


def _with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function with each field of `SampleConfig` in place of `**settings`."""
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = SampleSettings.__annotations__
    settings = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=hints[setting.name],
        )
        for setting in SETTINGS
    ]
    return signature.replace(parameters=[*fixed, *settings])


# For `help` and completion: every setting by name, with its default, its type and its rule.
Model.sample.__signature__ = _with_settings(Model.sample)  # type: ignore[attr-defined]
Model.sample.__doc__ = f"{inspect.getdoc(Model.sample)}\n\nSettings:\n\n{described()}"
