"""Streams: bounds for readers that are slow, comments in silence."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch

from serve.engine.metrics import Metrics
from serve.engine.service import SamplingParams, Service
from serve.engine.state import StepRecord
from serve.http.streams import StreamQueue, stream_samples, with_comments
from serve.settings import settings


def record(t: float = 0.5) -> StepRecord:
    return StepRecord(1, t, torch.tensor([0.25, 0.75]), torch.tensor([False, True]), 1)


def fill(queue: StreamQueue, calls: int, images: int = 2, side: int = 8) -> None:
    for _ in range(calls):
        for place in range(images):
            queue(place, record(), torch.zeros(1, side, side))


def test_a_reader_in_time_gets_every_step_in_order() -> None:
    queue = StreamQueue(3, trace=True)
    fill(queue, 9)
    steps = [queue.pop() for _ in range(len(queue))]
    assert [(step.place, step.call) for step in steps] == [
        (place, call) for call in range(1, 10) for place in range(2)
    ]
    assert [step.preview is not None for step in steps] == [s.call % 3 == 0 for s in steps]
    assert steps[0].alpha == [0.25, 0.75] and steps[0].chosen == [1]


def test_steps_that_nobody_is_told_of_are_not_kept() -> None:
    queue = StreamQueue(4, trace=False)
    fill(queue, 9)
    assert [queue.pop().call for _ in range(len(queue))] == [4, 4, 8, 8]
    silent = StreamQueue(0, trace=False)
    fill(silent, 9)
    assert len(silent) == 0


def test_a_slow_reader_misses_previews_then_the_oldest_steps() -> None:
    queue = StreamQueue(1, trace=True)
    fill(queue, 2000, side=128)
    steps = [queue.pop() for _ in range(len(queue))]
    assert len(steps) == 1024
    assert [step.call for step in steps[-4:]] == [1999, 1999, 2000, 2000]
    assert steps[0].call == 2000 - 1024 // 2 + 1
    previews = [step.preview for step in steps if step.preview is not None]
    assert 0 < sum(preview.numel() for preview in previews) <= 4 << 20
    fill(queue, 1)
    assert queue.pop().preview is not None  # there is room again


def collect(events: AsyncGenerator[str], silence_s: float) -> list[str]:
    async def work() -> list[str]:
        return [event async for event in with_comments(events, silence_s)]

    return asyncio.run(work())


def test_silence_is_broken_by_comments() -> None:
    async def work() -> list[str]:
        go_on, found = asyncio.Event(), list[str]()

        async def events() -> AsyncGenerator[str]:
            yield "one"
            await go_on.wait()
            yield "two"

        async for event in with_comments(events(), 0.05):
            found.append(event)
            if len(found) == 3:
                go_on.set()
        return found

    first, *comments, last = asyncio.run(work())
    assert (first, last) == ("one", "two")
    assert len(comments) >= 2 and set(comments) == {": keep-alive\n\n"}


def test_events_without_silence_have_no_comments() -> None:
    async def events() -> AsyncGenerator[str]:
        for i in range(20):
            yield str(i)

    assert collect(events(), 30) == [str(i) for i in range(20)]


def test_closing_a_silent_stream_closes_its_events() -> None:
    closed = []

    async def events() -> AsyncGenerator[str]:
        try:
            yield "one"
            await asyncio.sleep(3600)
        finally:
            closed.append(True)

    async def work() -> None:
        stream = with_comments(events(), 0.01)
        assert await anext(stream) == "one"
        assert await anext(stream) == ": keep-alive\n\n"
        await stream.aclose()
        assert closed
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())


def test_a_stream_that_is_not_read_ends_and_frees_its_request(
    small_run: Path, monkeypatch: Any
) -> None:
    async def work() -> None:
        tree = {"run": str(small_run), "sample": {"steps": 3}}
        words = ["serve.limits.deadline_s=0.2", "serve.limits.send_timeout_s=0.2"]
        service = Service(settings(tree, words), Metrics())
        await service.start()
        response = stream_samples(service, SamplingParams(2, seed=1), 1)
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 2:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        async with asyncio.timeout(30):
            await response(scope, receive, send)  # type: ignore[arg-type]
        assert service.pending == 0
        start = sent[1]["body"].decode().split("data: ")[1]
        assert json.loads(start)["seed"] == 1
        await service.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())
