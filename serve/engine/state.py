"""Requests and the images under way."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ddm.samplers import Trajectory
from router.routing import Memory
from serve.engine.expert import ServingError
from serve.model.model import SamplingPlan


class StepRecord(NamedTuple):
    """One call on an image's way: the time, alpha `[K]`, who was asked, bool `[K]`, and how many they are."""

    t: float
    alpha: Tensor
    chosen: Tensor
    calls: int


@dataclass(eq=False)
class Request:
    """Images `index` `[n]` of a seed, under one recipe; `watch` hears `(place, call, denoised [C, H, W])` as it happens."""

    plan: SamplingPlan
    seed: int
    index: Tensor
    watch: Callable[[int, StepRecord, Tensor], None] | None = None
    trace: bool = False
    images: dict[int, Tensor] = field(
        default_factory=dict
    )  # by place, `[C, H, W]`, as they are done
    record: dict[int, list[StepRecord]] = field(default_factory=dict)  # by place, where traced
    calls: int = 0  # expert evaluations
    absent: set[str] = field(default_factory=set)  # experts that were done without
    begun: int = 0  # images on their way or done
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def steps(self) -> int:
        """Denoiser calls on an image's way."""
        return (len(self.plan.times) - 1) * self.plan.method.calls_per_step

    @property
    def cost(self) -> int:
        """Images × steps that are still to come."""
        return (len(self.index) - len(self.images)) * self.steps

    def fail(self, error: ServingError) -> None:
        """End it."""
        if not self.done.done():
            self.done.set_exception(error)


class Row(NamedTuple):
    """What routing remembers of one path: a row of the batch that it was routed in."""

    memory: Memory
    i: int


@dataclass(eq=False)
class ImageState:
    """One image on its way. Everything about it is its own, so its company changes nothing."""

    request: Request
    place: int
    trajectory: Trajectory
    draws: list[float]  # uniform, one a step
    memory: Row
    before: Row  # the last call's, for routing it again
    x: Tensor | None = None  # [1, C, H, W]
    t: Tensor | None = None  # []
    asked: int = 0  # calls of its sampler
    alpha: Tensor | None = None  # [K]
    chosen: Tensor | None = None  # bool [K]
    waits_for: dict[int, float] = field(
        default_factory=dict
    )  # the experts asked, and the weight of what each says
    answers: dict[int, Tensor] = field(default_factory=dict)
    rest: Tensor | None = None  # what the stand-ins add, [1, C, H, W]
    turn: int = 0  # counts what is asked, so that an answer to an earlier question is known as such
    failures: dict[int, int] = field(
        default_factory=dict
    )  # by expert: calls in a row that it answered with an error
    record: StepRecord | None = None  # the call that brought it here
    denoised: Tensor | None = None  # what was said then, [1, C, H, W]
    image: Tensor | None = None  # [C, H, W], at the end
