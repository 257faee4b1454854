"""From settings to a sampling plan: what is checked, and what is kept for the next request."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ddm.bundle import Bundle
from ddm.condition import Condition
from ddm.editing import Given, noised, resampled
from ddm.errors import ConfigError, one_of, require, within
from ddm.grids import check_grid
from ddm.rng import RngStream, normal
from ddm.samplers import Course, Sampler, Trajectory, plan_steps
from ddm.schedules import Schedule
from router.policies import policy
from router.sources import Integrated, Source, Stateless, prior
from router.step import ControlVariate, Router
from serve.model.edits import Edit
from serve.model.params import SETTINGS, SampleConfig
from serve.model.parts import Parts

_CACHED = 64  # sampling plans, and routers, of as many different settings
INTEGRATED = ("derivative", "combined")  # sources that start from pi at t = 1


@dataclass(frozen=True)
class SamplingPlan:
    """Everything needed to sample with one `SampleConfig`, except the experts.

    times: at which each step begins, and the end; falling, or the same where a step is repeated.
    """

    config: SampleConfig
    router: Router
    control_variate: ControlVariate | None
    method: Sampler
    times: Sequence[Tensor]
    schedule: Schedule
    shape: Sequence[int]
    condition: Condition | None = None  # None where there can be neither it nor guidance

    @property
    def evaluations(self) -> float:
        """Of networks for each expert that is called, on average over the steps: one more for each
        guidance.
        """
        if self.condition is None:
            return 1.0
        times = torch.stack(list(self.times[:-1]))
        return float(self.condition.at(times, len(times)).evaluations.float().mean())

    def start(
        self,
        seed: int | Tensor,
        index: Tensor,
        given: Given | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x at the first time, `[B, C, H, W]`, of images `index` `[B]`; one seed or one per image
        `[B]`.

        given: images to start from, and their masks. noise: standard normal, in place of the
        seed's, `[B, C, H, W]`.
        """
        c = self.schedule(self.times[0])
        if noise is None:
            noise = normal(seed, RngStream.START, index, 0, self.shape)
        if given is None:
            return noise * c.s
        return noised(given, noise, c, whole=bool(self.times[0] < 1))

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


class Planner(Parts):
    """The parts of a bundle, with the sampling plans that are made of them."""

    def __init__(
        self,
        bundle: Bundle,
        device: str | torch.device,
        images: Callable[[], dict[str, Tensor]] | None,
        experts: bool = True,
    ) -> None:
        super().__init__(bundle, device, images, experts)
        # The caches hold the model weakly: a model that is replaced frees its memory at once.
        weak = weakref.proxy(self)
        self._cached_plan = lru_cache(_CACHED)(partial(Planner._plan, weak))
        self._cached_router = lru_cache(_CACHED)(partial(Planner._router, weak))

    def _forget_plans(self) -> None:
        self._cached_plan.cache_clear()
        self._cached_router.cache_clear()

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
        require(
            self.seeded or config.autoguidance == SampleConfig.autoguidance,
            "sample.autoguidance",
            "be left at 1 for a bundle without a seed model (seed_model.above)",
            config.autoguidance,
        )
        needs_router = config.source in ("posterior", *INTEGRATED)
        if needs_router and len(self.names) > 1 and self.posterior is None:
            why = (
                "whose router was trained for other experts (python -m train reroute trains it on)"
                if self._old_router
                else "without a router"
            )
            raise ConfigError(
                f"sample.source must be prior, gaussian or analytic for a bundle {why}, "
                f"got {config.source!r}",
                "sample.source",
            )
        if config.source == "analytic" and self._images is None:
            raise ConfigError(
                "sample.source=analytic needs the training images: "
                "load the run's folder, a bundle carries none",
                "sample.source",
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
        if self.vocabulary is None and not self.seeded:
            return None
        vector = torch.zeros(0)
        if self.vocabulary is not None:
            vector = self.vocabulary.vector(config.condition or {})
        first, last = config.guidance_interval or (0.0, 1.0)
        return Condition(
            vector.to(self.device),
            config.guidance,
            config.autoguidance,
            (first, last),
            self.seeded_from,
            self.above,
        )

    def plan(self, config: SampleConfig, edit: Edit | None = None) -> SamplingPlan:
        """Everything needed to sample with these settings, except the experts; cached.

        Raises `ConfigError` if the sampler or the grid is not defined for the schedule, or the
        source not for images that start from a given one.
        """
        if edit is None:
            return self._cached_plan(config, 1.0, 1)
        edit.check()
        own = edit.start * config.steps
        require(
            config.grid != "own" or abs(own - round(own)) < 1e-9,
            "strength",
            f"be one of the steps n / {config.steps} for grid=own",
            edit.start,
        )
        require(
            config.source not in INTEGRATED or len(self.names) == 1,
            "source",
            "be prior, gaussian, posterior or analytic with an image: the others start at t = 1",
            config.source,
        )
        return self._cached_plan(config, edit.start, edit.repeats)

    def _plan(self, config: SampleConfig, start: float, repeats: int) -> SamplingPlan:
        c = config
        check_grid(c.grid, self.schedule)
        method, times = plan_steps(
            c.sampler, c.steps, c.grid, self.schedule, c.t_min, c.order, t_max=start
        )
        router = self._router_of(config)
        # A policy that keeps its experts follows their own ODEs, not the mixture's.
        with_gaussians = config.control_variate == "gaussian" and not router.policy.keeps
        return SamplingPlan(
            config,
            router,
            self.gaussians.mix if with_gaussians else None,
            *resampled(method, times, repeats),
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
            self._source(source, relaxation_rate),
            policy(*rule),
            self.pi,
            weights,
            temperature,
            self.above,
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
