"""The HTTP API when it is full, late, without an expert, left by its client; and its metrics."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engine.expert import UnavailableError
from serve.engine.metrics import Prometheus
from serve.engine.models import Models
from serve.engine.turn import Turn
from serve.http.app import build_app
from serve.settings import settings
from tests.serve.conftest import Client, Reply, Start, request


class Gate:
    """An expert that answers once it is open, with what it is asked about, or with an error."""

    calls = 1

    def __init__(self, k: int) -> None:
        self.name, self.turn = f"expert-{k:02d}", Turn(1)
        self.open, self.asked = asyncio.Event(), 0
        self.error: Exception | None = None

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked += len(x)
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return torch.zeros_like(x)

    async def check(self) -> None:
        if self.error is not None:
            raise self.error


class Served:
    """The application over three gates."""

    def __init__(self, run: Path, *words: str) -> None:
        self.gates = [Gate(k) for k in range(3)]
        self.metrics = Prometheus()
        tree = settings({"run": str(run)}, ["sample.steps=4", *words])
        self.models = Models(tree, self.metrics, lambda *_: self.gates)
        (self.service,) = self.models.services
        self.app = build_app(self.models)

    def open(self, error: Exception | None = None) -> None:
        for gate in self.gates:
            gate.error = error
            gate.open.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)

    async def until_asked(self) -> None:
        await self.until(lambda: any(gate.asked for gate in self.gates))

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"ddm_{name}", labels) or 0.0

    async def cost(self) -> float:
        await request(self.app, "/metrics")
        return self.counted("pending_cost")


def served(run: Path, test: Callable[[Served], Any], *words: str) -> None:
    async def whole() -> None:
        found = Served(run, *words)
        await found.models.start()
        try:
            await test(found)
        finally:
            await found.models.stop()

    asyncio.run(whole())


def test_more_than_may_be_pending_is_429_with_a_time_to_come_back(small_run: Path) -> None:
    async def test(it: Served) -> None:
        first = Client(it.app, "/v1/samples", b'{"n": 5}')
        await it.until_asked()
        assert await it.cost() == 20
        refused = await request(it.app, "/v1/samples", {"n": 2})
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.error["type"] == "busy"
        assert (
            "20 expert evaluations are pending, and 8 more would exceed 25"
            in refused.error["message"]
        )
        assert it.counted("rejections_total", reason="busy") == 1
        assert it.counted("requests_total", status="429") == 1
        fits = Client(it.app, "/v1/samples", b'{"n": 1}')
        it.open()
        assert (await first.reply()).status == (await fits.reply()).status == 200
        assert (await request(it.app, "/v1/samples", {"n": 2})).status == 200
        assert await it.cost() == 0

    served(small_run, test, "serve.limits.pending=25")


def test_what_is_not_done_by_the_deadline_is_504_and_takes_its_cost_along(small_run: Path) -> None:
    async def test(it: Served) -> None:
        reply = await request(it.app, "/v1/samples", {"n": 2})
        assert (reply.status, reply.error["type"]) == (504, "deadline")
        assert reply.error["message"] == "not done within 0.2 s"
        assert reply.headers["x-should-retry"] == "false"  # for OpenAI's client
        streamed = (await request(it.app, "/v1/samples", {"stream": True})).events
        assert [name for name, _ in streamed] == ["start", "error"]
        assert streamed[1][1]["error"]["type"] == "deadline"
        asked = (
            await request(it.app, "/v1/images/generations", {"prompt": "", "stream": True})
        ).events
        assert asked == [("error", {"type": "error", **streamed[1][1]})]
        assert await it.cost() == 0
        assert it.counted("rejections_total", reason="deadline") == 3
        assert it.counted("requests_total", status="504") == 3
        it.open()
        it.service.settings.serve.limits.deadline_s = 60
        assert (await request(it.app, "/v1/samples", {})).status == 200

    served(small_run, test, "serve.limits.deadline_s=0.2")


def test_an_expert_that_is_away_is_503_by_name_and_not_ready(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open(UnavailableError("gone"))
        reply = await request(it.app, "/v1/samples", {"policy": "full"})
        assert (reply.status, reply.error["type"]) == (503, "unavailable")
        assert "expert-0" in reply.error["message"] and "away" in reply.error["message"]
        assert int(reply.headers["retry-after"]) > 0
        ready = await request(it.app, "/readyz")
        assert ready.status == 503
        assert ready.json["status"] == "unavailable" and "away" in ready.json["experts"].values()

    served(small_run, test, "serve.retry_s=0.01")


def test_experts_that_are_done_without_are_named_in_header_and_body(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open()
        it.gates[1].error = UnavailableError("gone")
        given = {"policy": "full", "steps": 8}
        reply = await request(it.app, "/v1/samples", {**given, "format": "b64_json"})
        assert reply.status == 200
        assert reply.headers["ddm-degraded"] == "expert-01" and reply.json["degraded"] == [
            "expert-01"
        ]
        streamed = (await request(it.app, "/v1/samples", {**given, "stream": True})).events
        assert streamed[-1][0] == "done" and streamed[-1][1]["degraded"] == ["expert-01"]
        ready = await request(it.app, "/readyz")
        assert ready.status == 200
        assert ready.json["status"] == "degraded" and ready.json["experts"]["expert-01"] == "away"

    served(small_run, test, "serve.retry_s=0.01", "serve.degraded=renormalize")


def test_before_anything_is_in_service_all_is_503(small_run: Path) -> None:
    async def test() -> None:
        it = Served(small_run)
        for path, tree in (
            ("/v1/samples", {}),
            ("/v1/images/generations", {"prompt": ""}),
            ("/v1/models", None),
        ):
            reply = await request(it.app, path, tree)
            assert (reply.status, reply.error["type"]) == (503, "unavailable")
        ready = await request(it.app, "/readyz")
        assert (ready.status, ready.json) == (503, {"status": "starting", "experts": {}})
        assert (await request(it.app, "/healthz")).status == 200
        assert (await request(it.app, "/metrics")).status == 200

    asyncio.run(test())


@pytest.mark.parametrize("given", [{"n": 4}, {"n": 4, "stream": True}])
@pytest.mark.parametrize("path", ["/v1/samples", "/v1/images/generations"])
def test_a_client_that_leaves_takes_its_cost_along(
    small_run: Path, path: str, given: dict[str, Any]
) -> None:
    async def test(it: Served) -> None:
        tree = {**given, "prompt": ""} if "images" in path else given
        client = Client(it.app, path, json.dumps(tree).encode())
        await it.until_asked()
        assert await it.cost() == 16
        assert it.counted("active_requests") == 1
        client.left.set()
        await asyncio.wait_for(client.task, 20)
        assert await it.cost() == 0
        assert it.counted("active_requests") == 0
        assert it.counted("requests_total", status="499") == 1
        it.open()
        assert (await request(it.app, "/v1/samples", {})).status == 200

    served(small_run, test)


def test_a_client_that_stops_reading_and_leaves_takes_its_cost_along(small_run: Path) -> None:
    class Deaf(Client):
        async def _send(self, message: dict[str, Any]) -> None:
            await super()._send(message)
            if len(self.sent) > 2:
                await asyncio.Event().wait()

    async def test(it: Served) -> None:
        client = Deaf(it.app, "/v1/samples", b'{"n": 4, "stream": true}')
        await it.until_asked()
        for gate in it.gates:  # a step for those that wait, and no more
            gate.open.set()
            gate.open.clear()
        await it.until(lambda: len(client.sent) == 3)
        client.left.set()
        await asyncio.wait_for(client.task, 20)
        await it.until(lambda: not it.service.current.engine.requests)
        assert await it.cost() == 0

    served(small_run, test)


@pytest.mark.filterwarnings("default")
def test_what_nobody_expects_is_500_in_the_same_shape_and_says_nothing(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(it: Served) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("secret: what the log may say")

        it.open()
        monkeypatch.setattr("serve.http.responses.encoded", broken)
        client = Client(it.app, "/v1/samples", b"{}")
        with pytest.raises(RuntimeError):  # what was answered goes on to the server's log
            await client.task
        answer = Reply(
            client.sent[0]["status"], {"content-type": "application/json"}, client.sent[1]["body"]
        )
        assert (answer.status, answer.error["type"]) == (500, "internal")
        assert "secret" not in answer.error["message"]
        events = (await request(it.app, "/v1/samples", {"stream": True})).events
        assert [name for name, _ in events] == ["start", "error"]
        assert events[-1][1]["error"]["type"] == "internal"
        assert "secret" not in json.dumps(events)
        assert it.counted("requests_total", status="500") == 2

    served(small_run, test)


# Metrics


def test_metrics_count_what_happens(small_run: Path, start: Start) -> None:
    server = start(small_run, "sample.steps=4", "serve.limits.body_bytes=500")
    names = ("ddm_images_total", "ddm_nfe_total", "ddm_request_seconds_count", "ddm_requests_total")
    assert [server.metric(name) for name in names] == [0, 0, 0, 0]
    server.request("/v1/samples", {"n": 3, "policy": "full"})
    server.request("/v1/samples", {"n": 2, "stream": True})
    server.request("/v1/images/generations", {"prompt": "", "n": 2})
    assert [server.metric(name) for name in names] == [7, 3 * 4 * 3 + 2 * 4 + 2 * 4, 3, 3]
    assert server.metric("ddm_requests_total", status="200") == 3
    assert server.metric("ddm_nfe_total", expert="expert-01") >= 3 * 4
    assert server.metric("ddm_batch_fill_count") == server.metric("ddm_call_seconds_count") > 0
    assert server.metric("ddm_batch_fill_sum") == pytest.approx(server.metric("ddm_nfe_total") / 64)
    assert server.metric("ddm_route_seconds_count") >= 12
    assert server.metric("ddm_expert_alive") == 3
    for name in (
        "ddm_pending_cost",
        "ddm_active_requests",
        "ddm_queue_length",
        "ddm_rejections_total",
    ):
        assert server.metric(name) == 0
    server.request("/v1/samples", {"n": 0})
    server.request("/v1/samples", {"steps": 251})
    server.request("/v1/samples", b"{", {"content-type": "application/json"})
    server.request("/v1/samples", b" " * 501, {"content-type": "application/json"})
    server.request("/nowhere")
    kinds = {"invalid_value": 2, "not_json": 1, "body_too_large": 1, "not_found": 1}
    assert {kind: server.metric("ddm_rejections_total", reason=kind) for kind in kinds} == kinds
    assert server.metric("ddm_requests_total", status="422") == 2
    assert server.metric("ddm_requests_total", status="400") == 1
    assert server.metric("ddm_images_total") == 7
    answer = server.request("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
