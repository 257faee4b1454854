"""An expert as the engine calls it, wherever it runs, and how it can fail."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ddm.condition import Conditions
from serve.engine.turn import Turn

T = TypeVar("T")

# One thread for all arithmetic of requests in this process: it runs in turns anyway, and caches stay warm.
_THREAD = ThreadPoolExecutor(1, "arithmetic")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run arithmetic in a thread, so that the event loop stays responsive."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *args)


class UnavailableError(Exception):
    """An expert cannot be reached now. The call may be repeated: it depends on its arguments alone."""


class ServingError(Exception):
    """Why a request's images could not be sampled."""


class CancelledRequestError(ServingError):
    """A request was cancelled by its id."""


class ExpertAwayError(ServingError):
    """An expert stays unreachable."""


class ExpertFailedError(ServingError):
    """An expert failed on an image each time it was called."""


class Expert(Protocol):
    """An expert that can be called.

    turn: acquired for each call; the experts of one device share it, a remote expert's counts its
    replicas. calls: how many may be under way at once.
    """

    name: str
    turn: Turn
    calls: int

    async def __call__(self, x: Tensor, t: Tensor, given: Conditions | None = None) -> Tensor:
        """The denoised x `[B, C, H, W]` at t `[B]`, by what each image is conditioned on and how it is
        guided, if it is. Raises `UnavailableError`.
        """
        ...

    async def check(self) -> None:
        """Return if the expert can be reached. Raises `UnavailableError` if it cannot."""
        ...
