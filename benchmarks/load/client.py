"""Clients of `POST /v1/samples`: many at once, in a closed or an open loop."""

import asyncio
import base64
import io
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image


@dataclass
class Reply:
    """The response to one request for image `index` of seed 0; times in seconds."""

    index: int
    sent_s: float
    seconds: float
    status: int
    image: np.ndarray | None = None  # uint8 [H, W] or [H, W, C]
    version: str = ""
    said: str = ""


Send = Callable[[int], Awaitable[Reply]]  # image `index`


@dataclass
class Tally:
    """All responses of a load, and its duration in seconds."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, float]:
        """Requests, failures, images per second, and latencies in ms."""
        took = np.array([reply.seconds for reply in self.replies]) * 1000
        failed = sum(reply.status != 200 for reply in self.replies)
        p50, p90, p99 = np.percentile(took, (50, 90, 99))
        return {
            "requests": len(self.replies),
            "failed": failed,
            "images_per_s": (len(self.replies) - failed) / self.seconds,
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "max_ms": float(took.max()),
        }


@asynccontextmanager
async def session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of that server without a limit on connections."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as client:
        yield client


async def request_image(
    client: aiohttp.ClientSession, index: int, settings: dict[str, Any]
) -> Reply:
    """Request one image. A failed connection is a reply with status 0."""
    sent = time.perf_counter()
    body = {"n": 1, "seed": 0, "first_index": index, "format": "b64_json", **settings}
    try:
        async with client.post("/v1/samples", json=body) as response:
            said = await response.json(content_type=None)
            reply = Reply(index, sent, time.perf_counter() - sent, response.status)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return Reply(index, sent, time.perf_counter() - sent, 0, said=repr(error))
    if reply.status == 200:
        reply.image = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(said["data"][0]["b64_json"])))
        )
        reply.version = said["version"]
    else:
        reply.said = str(said)
    return reply


async def closed_loop(send: Send, clients: int, requests: int) -> Tally:
    """A closed loop: each client sends its next request as soon as it has the last."""
    numbers: Iterator[int] = iter(range(requests))
    tally = Tally()

    async def one() -> None:
        for index in numbers:
            tally.replies.append(await send(index))

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    tally.seconds = time.perf_counter() - started
    return tally


async def closed(url: str, clients: int, requests: int, *settings: dict[str, Any]) -> Tally:
    """A closed loop of requests for one image, with the settings in turn."""
    async with session(url) as client:

        async def send(index: int) -> Reply:
            return await request_image(client, index, settings[index % len(settings)])

        return await closed_loop(send, clients, requests)


async def opened(url: str, rate_per_s: float, requests: int, settings: dict[str, Any]) -> Tally:
    """An open loop: requests at exponential intervals, whether or not the server keeps up."""
    gaps = np.random.default_rng(0).exponential(1 / rate_per_s, requests)
    tally = Tally()
    async with session(url) as client:
        started = time.perf_counter()
        tasks = []
        for index, due in zip(itertools.count(), gaps.cumsum(), strict=False):
            if index == requests:
                break
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(request_image(client, index, settings)))
        tally.replies = list(await asyncio.gather(*tasks))
        tally.seconds = time.perf_counter() - started
    return tally
