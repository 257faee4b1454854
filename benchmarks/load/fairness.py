"""What large requests and slow readers cost the others: `fairness` and `stalled` of
benchmarks.load.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.load.child import server
from benchmarks.load.client import request_image, session

GIANTS = 6
GIANT_IMAGES = 64
GIANT_STEPS = 250
SMALL_STEPS = 3
STALLED = 20
LONGEST_S = 60.0
GIANTS_START_S = 3.0


def fairness_mode(run: str, repeats: int = 30) -> list[dict[str, Any]]:
    """Latency of requests of one image and 3 steps: alone, and behind six of 64 images x 250 steps.

    One after another. Those behind the giants are given up after a minute and count as that long.
    """
    with server(run, "serve.limits.deadline_s=600") as (url, _):
        alone, behind = asyncio.run(small_over_http(url, repeats, GIANTS))
    return [_row("alone", alone), _row(f"behind {GIANTS} giants", behind)]


async def small_over_http(url: str, repeats: int, giants: int) -> tuple[list[float], list[float]]:
    """`alone_and_behind` of a server's requests."""
    async with session(url) as client:

        async def small(index: int) -> None:
            await request_image(client, index, {"steps": SMALL_STEPS})

        async def giant(seed: int) -> None:
            body = {"n": GIANT_IMAGES, "steps": GIANT_STEPS, "seed": seed, "format": "npz"}
            async with client.post("/v1/samples", json=body) as response:
                await response.read()

        return await alone_and_behind(small, giant, repeats, giants)


Run = Callable[[int], Coroutine[Any, Any, None]]  # a request by its number


async def alone_and_behind(
    small: Run, giant: Run, repeats: int, giants: int
) -> tuple[list[float], list[float]]:
    """Seconds of small requests, one after another: alone, and while giant ones are under way."""

    async def timed(index: int) -> float:
        started = time.perf_counter()
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_S):
                await small(index)
        return time.perf_counter() - started

    alone = [await timed(i) for i in range(repeats)]
    tasks = [asyncio.create_task(giant(seed)) for seed in range(giants)]
    await asyncio.sleep(GIANTS_START_S)
    behind: list[float] = []
    started = time.perf_counter()
    while len(behind) < repeats and time.perf_counter() - started < 2 * LONGEST_S:
        if any(task.done() for task in tasks):
            break
        behind.append(await timed(len(behind)))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return alone, behind


def percentiles_ms(seconds: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile, in ms; not a number if there are none."""
    p50, p99 = np.percentile(np.array(seconds or [np.nan]) * 1000, (50, 99))
    return float(p50), float(p99)


def _row(what: str, seconds: list[float]) -> dict[str, Any]:
    p50, p99 = percentiles_ms(seconds)
    return {"what": what, "requests": len(seconds), "p50_ms": p50, "p99_ms": p99}


def stalled_mode(run: str, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Memory of the server while 20 clients do not read their streams of 64 images x 250 steps."""
    with server(run, "serve.limits.pending=1000000") as (url, _):
        parts = urlsplit(url)
        pid = _child()
        rows = [{"what": "before", "rss_MiB": _rss_mib(pid)}]
        body = {"n": 64, "steps": 250, "stream": True, "preview_every": 1, "trace": True}
        readers = []
        for seed in range(STALLED):
            raw = json.dumps({**body, "seed": seed}).encode()
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((parts.hostname, parts.port))
            head = (
                "POST /v1/samples HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
            )
            reader.sendall(head.encode() + raw)
            readers.append(reader)
        most, started = 0.0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            time.sleep(0.5)
            most = max(most, _rss_mib(pid))
        rows.append({"what": f"{STALLED} stalled streams, most", "rss_MiB": most})
        rows.append({"what": f"after {seconds:g} s", "rss_MiB": _rss_mib(pid)})
        rows.append({"what": "sockets open then", "count": _sockets(pid)})
        for reader in readers:
            reader.close()
    return rows


def _child() -> int:
    """The process of the server, this process's only child."""
    children = Path("/proc/thread-self/children").read_text().split()
    return int(children[0])


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = next(line for line in status if line.startswith("VmRSS:")).split()[1]
    return int(kib) / 1024


def _sockets(pid: int) -> int:
    return sum("socket:" in str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir())
