"""The benchmarks of serving ask for every image, and fail if one is not served. No time is asserted."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.load.client import Reply, Tally, closed_loop
from benchmarks.load.fairness import alone_and_behind
from benchmarks.speed import serving, startup


@pytest.fixture
def few(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "digits_run", lambda: small_run)
    monkeypatch.setattr(serving, "CLIENTS", 4)
    monkeypatch.setattr(serving, "REQUESTS", 8)
    monkeypatch.setattr(serving, "REPEATS", 2)


@pytest.mark.usefixtures("few")
def test_the_engine_is_compared_with_offline_calls() -> None:
    figures = serving.in_process("cpu", serving.MIXED)
    assert {"served images/s", "offline images/s", "served / offline"} <= figures.keys()


@pytest.mark.usefixtures("few")
def test_the_event_loop_and_small_requests_are_measured() -> None:
    assert serving.event_loop("cpu", 8).keys() >= {"admission ms", "loop CPU share"}
    assert serving.small_in_process("cpu")["requests beside"] == 2


def test_a_failed_request_fails_the_row() -> None:
    tally = Tally([Reply(0, 0.0, 0.1, 200), Reply(1, 0.0, 0.1, 503, said="away")])
    with pytest.raises(RuntimeError, match="1 requests failed: away"):
        serving.all_answered(tally)


def test_a_closed_loop_sends_each_request_once_and_waits_for_the_answer() -> None:
    under_way = [0]
    most = [0]

    async def send(index: int) -> Reply:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0)
        under_way[0] -= 1
        return Reply(index, 0.0, 0.0, 200)

    tally = asyncio.run(closed_loop(send, clients=3, requests=10))
    assert sorted(reply.index for reply in tally.replies) == list(range(10))
    assert most == [3]


def test_small_requests_stop_when_a_giant_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.load.fairness.GIANTS_START_S", 0)
    ended = []

    async def small(index: int) -> None:
        await asyncio.sleep(0.01)

    async def giant(seed: int) -> None:
        await asyncio.sleep(0.02)
        ended.append(seed)

    alone, behind = asyncio.run(alone_and_behind(small, giant, repeats=50, giants=1))
    assert (len(alone), ended) == (50, [0])
    assert 0 < len(behind) < 50


@pytest.mark.usefixtures("few")
def test_first_images_are_timed(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "digits_run", lambda: small_run)
    assert startup.first_image(repeats=1).keys() >= {"wall s", "CPU s"}
    assert startup.first_served(repeats=1).keys() == {"wall s", "wall s range"}
