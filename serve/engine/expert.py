"""What the engine asks of an expert, wherever it runs, and how it can fail."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")

# One thread for all arithmetic of this process: turns are taken anyway, and its caches stay warm.
_THREAD = ThreadPoolExecutor(1, "arithmetic")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run arithmetic beside the loop."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *args)


class UnavailableError(Exception):
    """An expert cannot be reached now; the same call may be made again, since an answer depends on (x, t) alone."""


class ServingError(Exception):
    """Why a request's images were not made."""


class ExpertAwayError(ServingError):
    """An expert stays unreachable."""


class ExpertFailedError(ServingError):
    """An expert answered an image with an error, each time it was asked."""


class Expert(Protocol):
    """Where one expert can be asked.

    `turn` is acquired for each call: the experts of one device share one, and a remote expert's counts its replicas. `calls` is
    how many can be under way at once.
    """

    name: str
    turn: asyncio.Semaphore
    calls: int

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x `[B, C, H, W]`, t `[B]` -> the denoised x. Raises `UnavailableError` where it cannot be reached."""
        ...

    async def check(self) -> None:
        """Return if it can be reached, else raise `UnavailableError`."""
        ...
