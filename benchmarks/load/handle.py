"""The cost of a bare call of a Ray Serve handle, with arrays like an expert's and no computation."""

import asyncio
import logging
import time
from typing import Any

from serve.ray_app import RAY_ENV  # first: Ray reads its environment when it is imported

assert RAY_ENV

import numpy as np  # noqa: E402
import ray  # noqa: E402
from ray import serve as ray_serve  # noqa: E402

from serve import load  # noqa: E402


class Echo:
    """An expert that returns x."""

    async def denoise(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Return x."""
        return x


class Caller:
    """Calls `Echo` from a replica, as the sampling service does."""

    def __init__(self, echo: Any) -> None:
        self.echo = echo

    async def measure(self, shape: tuple[int, ...], calls: int) -> list[float]:
        """The duration of each of `calls` calls in seconds, one after another."""
        x, t = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
        took = []
        for _ in range(calls):
            started = time.perf_counter()
            await self.echo.denoise.remote(x, t)
            took.append(time.perf_counter() - started)
        return took


def bare_call_ms(run: str, calls: int = 300) -> dict[str, float]:
    """The median duration of a call in ms, with one image and with 64."""
    shape = load(run).shape
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        made: Any = ray_serve.deployment
        handle = ray_serve.run(made(Caller).bind(made(Echo).bind()), name="bare", route_prefix=None)

        async def all_of_them() -> dict[str, float]:
            await handle.measure.remote((1, *shape), 30)
            sizes = {"1 image": 1, "64 images": 64}
            return {
                name: float(np.median(await handle.measure.remote((size, *shape), calls)) * 1000)
                for name, size in sizes.items()
            }

        return asyncio.run(all_of_them())
    finally:
        ray_serve.shutdown()
        ray.shutdown()
