"""Requests and the images under way."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from ddm.condition import Conditions
from ddm.editing import Given
from ddm.samplers import Carry
from router.step import Routed, RoutingState
from serve.engine.expert import ServingError
from serve.engine.shares import ANYONE, Flow, Key, size_of
from serve.engine.stacking import Row
from serve.model.planning import SamplingPlan


class StepRecord(NamedTuple):
    """One denoiser call for an image.

    step: of the sampler, from 1. t: its time, in [0, 1]. alpha: `[K]`. chosen: bool `[K]`, the
    experts evaluated. nfe: their number, plus as many for each guidance used.
    """

    step: int
    t: float
    alpha: Tensor
    chosen: Tensor
    nfe: int


# Called on the loop with (place, record, denoised [C, H, W]) after each denoiser call for an image.
OnStep = Callable[[int, StepRecord, Tensor], None]


@dataclass(eq=False)
class Request:
    """Images `index` `[n]` of a seed, sampled by one plan; a place is a position in `index`.

    given: the image and the mask that each of them starts from, None for noise alone.
    """

    plan: SamplingPlan
    seed: int
    index: Tensor
    on_step: OnStep | None = None
    trace: bool = False
    key: Key = ANYONE
    given: Given | None = None
    images: dict[int, Tensor] = field(default_factory=dict)  # finished, by place, [C, H, W]
    records: dict[int, list[StepRecord]] = field(default_factory=dict)  # by place, if traced
    nfe: int = 0  # expert evaluations so far
    router_nfe: int = 0  # evaluations of alpha so far
    absent: set[str] = field(default_factory=set)  # experts that were away when routed
    begun: int = 0  # images under way or finished
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def denoiser_calls(self) -> int:
        """Denoiser calls per image; some samplers need one less."""
        return (len(self.plan.times) - 1) * self.plan.method.calls_per_step

    @property
    def cost(self) -> float:
        """About how many expert evaluations the images need that are not finished."""
        return (len(self.index) - len(self.images)) * self.nfe_per_image

    @cached_property
    def nfe_per_image(self) -> float:
        """About how many expert evaluations an image needs."""
        router = self.plan.router
        assert router.pi is not None
        per_call = router.policy.nfe_per_step(len(router.pi)) * self.evaluations
        return self.denoiser_calls * per_call

    @cached_property
    def evaluations(self) -> float:
        """Of a network in each call of an expert, on average."""
        return self.plan.evaluations

    @cached_property
    def flow(self) -> Flow:
        """With which requests it takes turns."""
        return Flow(self.key, size_of(len(self.index) * self.nfe_per_image))

    @property
    def active(self) -> int:
        """Images under way."""
        return self.begun - len(self.images)

    def fail(self, error: ServingError) -> None:
        """End the request with an error, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class Path(NamedTuple):
    """Where B images are on their trajectories.

    seed, image: int64 `[B]`. uniforms: the policy's, one per step, float64 `[B, N]`. carry: what
    their step starts from. denoised: the images of the calls that their step has had, each
    `[B, C, H, W]`. given: what they keep, None without a mask.
    """

    seed: Tensor
    image: Tensor
    uniforms: Tensor
    carry: Carry
    denoised: tuple[Tensor, ...]
    given: Given | None


class Call(NamedTuple):
    """The denoiser call that B images need: x `[B, C, H, W]`, t `[B]`.

    u: the policy's uniform numbers, float64 `[B]`. keep: whether their step has begun, so that they
    keep their experts, bool `[B]`. given: what they are conditioned on and how they are guided, None
    for a bundle whose experts take no condition and that has no seed model.
    """

    x: Tensor
    t: Tensor
    u: Tensor
    keep: Tensor
    given: Conditions | None


@dataclass(eq=False)
class ImageState:
    """One image under way: its rows of what was computed for many at once.

    Independent of the other rows. `path` to `routed` are there once it has `begun`.
    """

    request: Request
    place: int
    entry: int = 0  # counts the images that were queued, here and elsewhere
    begun: bool = False
    step: int = 0
    path: Row[Path] = field(init=False)
    call: Row[Call] = field(init=False)
    memory: Row[RoutingState] = field(init=False)
    previous_memory: Row[RoutingState] = field(init=False)  # before the last routing
    routed: Row[Routed] = field(init=False)
    experts: list[int] = field(default_factory=list)  # to be evaluated; none until routed
    answers: dict[int, Row[Tensor]] = field(default_factory=dict)  # by expert
    attempt: int = 0  # changes when routed anew, so that late answers are recognized
    failures: dict[int, int] = field(default_factory=dict)  # by expert: failed calls in a row
    record: StepRecord | None = None  # of the last denoiser call, if asked for, until reported
    denoised: Tensor | None = None  # by that call, [C, H, W]
    image: Tensor | None = None  # [C, H, W], when finished
