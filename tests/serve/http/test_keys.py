"""Keys over HTTP: quotas and what is counted for each, and cancelling by a request's id."""

import asyncio
from pathlib import Path
from typing import Any

from serve.engine.shares import Key
from serve.http.middleware import LimitsMiddleware
from tests.serve.conftest import Client, Reply, Start, request
from tests.serve.http.test_app_states import Served, served

ALICE, BOB = Key("alice", requests=1, images_per_minute=5), Key("bob")
KEYS = {"a": ALICE, "b": BOB}


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **more}


async def ask(it: Served, token: str, tree: Any) -> Reply:
    app = LimitsMiddleware(it.app, KEYS)
    return await request(app, "/v1/samples", tree, headers=bearer(token))


def test_a_key_beyond_its_quota_is_429_and_others_are_served(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.service.shared.quotas.clock = lambda: 0.0
        app = LimitsMiddleware(it.app, KEYS)
        first = Client(app, "/v1/samples", b'{"n": 5}', bearer("a"))
        await it.until_asked()
        refused = await ask(it, "a", {})
        assert (refused.status, refused.error["type"]) == (429, "busy")
        assert "1 requests of this key are pending, and it may have 1" in refused.error["message"]
        it.open()
        assert (await first.reply()).status == 200
        refused = await ask(it, "a", {})
        assert refused.status == 429 and refused.headers["retry-after"] == "12"
        assert "this key has used its quota" in refused.error["message"]
        assert (await ask(it, "b", {"n": 7})).status == 200
        assert it.counted("key_images_total", key="alice") == 5
        assert it.counted("key_nfe_total", key="alice") == 20
        assert it.counted("key_images_total", key="bob") == 7
        assert it.counted("key_rejections_total", key="alice") == 2

    served(small_run, test)


def test_a_request_is_cancelled_by_its_id_and_by_its_key_alone(small_run: Path) -> None:
    async def test(it: Served) -> None:
        app = LimitsMiddleware(it.app, KEYS)

        async def cancel(token: str, request_id: str) -> int:
            path = f"/v1/requests/{request_id}"
            reply = await request(app, path, method="DELETE", headers=bearer(token))
            return reply.status

        headers = bearer("a", **{"x-request-id": "mine/1"})
        client = Client(app, "/v1/samples", b'{"n": 3}', headers)
        await it.until_asked()
        assert await cancel("b", "mine/1") == await cancel("a", "other") == 404
        assert await it.cost() == 12
        assert await cancel("a", "mine/1") == 204
        reply = await client.reply()
        assert (reply.status, reply.error["type"]) == (409, "cancelled")
        assert reply.headers["x-should-retry"] == "false"  # for OpenAI's client
        assert await it.cost() == 0 and await cancel("a", "mine/1") == 404
        engine = it.service.current.engine  # type: ignore[union-attr]
        assert [engine.waiting(k) for k in range(3)] == [0, 0, 0]

        stream = Client(app, "/v1/samples", b'{"stream": true}', bearer("b"))
        await it.until(lambda: bool(stream.sent))
        name = dict(stream.sent[0]["headers"])[b"x-request-id"].decode()
        await it.until(lambda: len(engine.requests) == 1)
        assert await cancel("b", name) == 204
        assert (await stream.reply()).events[-1][1]["error"]["type"] == "cancelled"
        too_long = bearer("b", **{"x-request-id": "x" * 129})
        assert (await request(app, "/v1/samples", {}, headers=too_long)).status == 422

    served(small_run, test)


def test_the_docs_can_authenticate(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame")

    async def test(it: Served) -> None:
        await asyncio.sleep(0)
        tree = (await request(it.app, "/openapi.json")).json
        assert tree["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        for path, methods in tree["paths"].items():
            for method in methods.values():
                assert ("security" in method) == path.startswith("/v1/"), path

    served(small_run, test, f"serve.token_file={tmp_path / 'token'}")


def test_each_token_of_a_server_passes(small_run: Path, tmp_path: Path, start: Start) -> None:
    words = []
    for name in ("alice", "bob"):
        (tmp_path / name).write_text(f"token-{name}\n")
        words.append(f"serve.keys.{name}.token_file={tmp_path / name}")
    server = start(small_run, *words, "serve.keys.bob.images_per_minute=1", "sample.steps=2")
    for name in ("alice", "bob"):
        reply = server.request("/v1/models", headers=bearer(f"token-{name}"))
        assert reply.status == 200
    assert server.request("/v1/models", headers=bearer("token-carol")).status == 401
