"""Serving (`serve.engine`, `serve.http`): the digits' five networks of 0.16M parameters, 25 steps,
one expert per step. 64 clients, each with one request for one image at a time, against one offline
call for as many images: in this process without HTTP (`engine`), and over HTTP from another one.
Both sides compute with the same number of threads, over HTTP one less than there are, as the server
does. `mixed`: the requests differ in steps, sampler and policy, and offline is a call for each kind. The
event loop's CPU time is that of its thread, where all but the arithmetic happens. `small`: requests
of one image and 3 steps, one after another, alone and while one of 64 images and 250 steps runs.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.load import fairness
from benchmarks.load.child import server
from benchmarks.load.client import Reply, Tally, closed, closed_loop
from benchmarks.load.fairness import (
    GIANT_IMAGES,
    GIANT_STEPS,
    SMALL_STEPS,
    alone_and_behind,
    percentiles_ms,
)
from benchmarks.speed.digits_run import digits_run
from benchmarks.speed.timing import Call, Figures, Variant, alternate
from serve import Model, load
from serve.engine.metrics import Prometheus
from serve.engine.service import SamplingParams, Service
from serve.settings import settings
from train.launch import torch_threads

CLIENTS = 64
REQUESTS = 128
PENDING = (64, 1000)
REPEATS = 40  # of the small request
SAME: tuple[dict[str, Any], ...] = ({},)
MIXED: tuple[dict[str, Any], ...] = (
    {"steps": 8, "sampler": "ddim", "policy": "switching"},
    {"steps": 12, "sampler": "dpmpp_2m", "policy": "stochastic"},
    {"steps": 6, "sampler": "heun", "policy": "switching"},
    {"steps": 5, "sampler": "unipc", "policy": "full"},
    {"steps": 15, "sampler": "euler", "policy": "balanced"},
    {"steps": 20, "sampler": "ddim", "policy": "top_k"},
    {"steps": 10, "sampler": "ipndm", "policy": "fixed"},
    {"steps": 18, "sampler": "ddpm", "policy": "nucleus"},
)


def variants(device: str) -> list[Variant]:
    """The rows of the table."""
    rows = []
    for rank, (name, kinds) in enumerate((("", SAME), (", mixed", MIXED))):
        for where, served in (("engine", in_process), ("HTTP", over_http)):
            title = f"{where}, {CLIENTS} clients{name}"
            rows.append(Variant(title, partial(served, device, kinds), rank + 1, 60))
    for pending in PENDING:
        title = f"event loop, {pending:,} requests pending"
        rows.append(Variant(title, partial(event_loop, device, pending), 2, 30))
    rows.append(Variant("engine, small beside a giant", partial(small_in_process, device), 2, 60))
    rows.append(Variant("HTTP, small beside a giant", partial(small_over_http, device), 2, 60))
    return rows


def in_process(device: str, kinds: tuple[dict[str, Any], ...]) -> Figures:
    """Clients that call the service on its event loop."""
    with running(device) as (runner, service):

        def served() -> Tally:
            send = partial(request_in_process, service, kinds)
            return runner.run(closed_loop(send, CLIENTS, REQUESTS))

        return against_offline(device, served, kinds)


def over_http(device: str, kinds: tuple[dict[str, Any], ...]) -> Figures:
    """Clients of a server, which is another process and leaves a core to its event loop."""

    def served() -> Tally:
        return asyncio.run(closed(url, CLIENTS, REQUESTS, *kinds))

    with (
        server(str(digits_run()), f"serve.device={device}") as (url, _),
        torch_threads(max(1, torch.get_num_threads() - 1)),
    ):
        return against_offline(device, served, kinds)


def against_offline(
    device: str, served: Callable[[], Tally], kinds: tuple[dict[str, Any], ...]
) -> Figures:
    """Images per second of both, and their ratio."""
    model = load(digits_run(), device)
    sides: dict[str, Call] = {
        "served": lambda: all_answered(served()),
        "offline": partial(offline, model, kinds),
    }
    timing = alternate(sides, device, rounds=3)
    return {
        **timing.rates(tuple(sides), REQUESTS, "images/s"),
        **timing.compared("served", "offline"),
    }


def offline(model: Model, kinds: tuple[dict[str, Any], ...]) -> None:
    """One call for each kind of request, for as many images together as the clients ask for."""
    for kind in kinds:
        model.sample(REQUESTS // len(kinds), batch=CLIENTS, **kind)


def all_answered(tally: Tally) -> None:
    """Raise `RuntimeError` unless every request got its image."""
    failed = [reply for reply in tally.replies if reply.status != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].said}")


@contextmanager
def running(device: str) -> Iterator[tuple[asyncio.Runner, Service]]:
    """A service without HTTP, and the runner of its event loop."""
    config = settings({"run": str(digits_run()), "serve": {"device": device}})
    with asyncio.Runner() as runner:
        service = Service(config, Prometheus())
        runner.run(service.start())
        try:
            yield runner, service
        finally:
            runner.run(service.stop())


async def request_in_process(
    service: Service, kinds: tuple[dict[str, Any], ...], index: int
) -> Reply:
    """Image `index` of seed 0."""
    started = time.perf_counter()
    params = SamplingParams(seed=0, first_index=index, settings=kinds[index % len(kinds)])
    await service.run(service.admit(params))
    return Reply(index, started, time.perf_counter() - started, 200)


def event_loop(device: str, pending: int) -> Figures:
    """CPU time of the event loop, while so many requests come at once and until all are done."""

    async def work(service: Service) -> Figures:
        async def one(index: int) -> float:
            began = time.perf_counter()
            admitted = service.admit(SamplingParams(seed=0, first_index=index))
            took = time.perf_counter() - began
            await service.run(admitted)
            return took

        await one(0)
        began, cpu = time.perf_counter(), time.thread_time()
        admissions = await asyncio.gather(*(one(index) for index in range(pending)))
        cpu = time.thread_time() - cpu
        last = admissions[-pending // 4 :]
        return {
            "admission ms": 1000 * sum(last) / len(last),
            "loop CPU ms per image": 1000 * cpu / pending,
            "loop CPU share": cpu / (time.perf_counter() - began),
        }

    with running(device) as (runner, service):
        return runner.run(work(service))


def small_in_process(device: str) -> Figures:
    """The latency of small requests to the service on its event loop."""
    with running(device) as (runner, service):

        async def sampled(n: int, seed: int, steps: int) -> None:
            await service.run(service.admit(SamplingParams(n, seed, settings={"steps": steps})))

        async def small(index: int) -> None:
            await sampled(1, index, SMALL_STEPS)

        async def giant(seed: int) -> None:
            await sampled(GIANT_IMAGES, seed, GIANT_STEPS)

        return latencies(*runner.run(alone_and_behind(small, giant, REPEATS, giants=1)))


def small_over_http(device: str) -> Figures:
    """The latency of small requests over HTTP."""
    with server(str(digits_run()), f"serve.device={device}") as (url, _):
        return latencies(*asyncio.run(fairness.small_over_http(url, REPEATS, giants=1)))


def latencies(alone: list[float], beside: list[float]) -> Figures:
    """Of the small requests, without and with a giant one, from seconds."""
    figures: Figures = {}
    for name, seconds in (("alone", alone), ("beside", beside)):
        p50, p99 = percentiles_ms(seconds)
        figures |= {f"{name} p50 ms": p50, f"{name} p99 ms": p99}
    return {**figures, "requests beside": float(len(beside))}
