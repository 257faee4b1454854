import asyncio
import hmac
import json
from typing import Any

import pytest

from serve.engine.shares import Key
from serve.http.middleware import LimitsMiddleware, key_of, shown

TOKEN = "correct-horse"
KEYS = {TOKEN: Key("one"), "battery": Key("other")}


class Behind:
    """An application that remembers what reached it, and says OK."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"OK"})


def parts_of(*bodies: bytes) -> list[dict[str, Any]]:
    return [
        {"type": "http.request", "body": body, "more_body": i < len(bodies) - 1}
        for i, body in enumerate(bodies)
    ]


def through(
    guard: LimitsMiddleware,
    path: str = "/v1/samples",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    parts: list[dict[str, Any]] | None = None,
    kind: str = "http",
) -> list[dict[str, Any]]:
    """What is sent in answer to a request whose body comes in parts; after them nothing comes."""
    sent, waiting = [], parts_of(b"") if parts is None else parts

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": list(headers)}
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), 20))
    return sent


def status_of(*request: Any, **options: Any) -> int:
    return through(*request, **options)[0]["status"]


def error_of(sent: list[dict[str, Any]]) -> dict[str, Any]:
    body = b"".join(message["body"] for message in sent[1:])
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
    assert not sent[-1].get("more_body", False)
    error = json.loads(body)["error"]
    assert error["param"] is None and error["code"] == error["type"]
    return error


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("ddm.localhost", 200),
        ("attacker.example:8000", 403),
        ("localhost.attacker.example", 403),
        ("10.0.0.3", 403),
        ("", 403),
    ],
)
def test_without_a_token_a_local_server_answers_to_its_own_names_alone(
    host: str, status: int
) -> None:
    headers = ((b"host", host.encode()),)
    assert status_of(LimitsMiddleware(Behind(), local=True), headers=headers) == status
    assert status_of(LimitsMiddleware(Behind()), headers=headers) == 200
    assert (
        status_of(LimitsMiddleware(Behind(), KEYS, local=True), headers=(*headers, *bearer(TOKEN)))
        == 200
    )
    assert status_of(LimitsMiddleware(Behind(), local=True)) == 200  # no page leaves it out


def bearer(token: str, scheme: str = "Bearer") -> tuple[tuple[bytes, bytes], ...]:
    return ((b"authorization", f"{scheme} {token}".encode()),)


def test_without_a_token_all_pass() -> None:
    assert status_of(LimitsMiddleware(Behind())) == 200


@pytest.mark.parametrize("site", [b"cross-site", b"same-site"])
def test_without_a_token_pages_of_other_sites_sample_nothing(site: bytes) -> None:
    behind, headers = Behind(), ((b"Sec-Fetch-Site", site),)
    sent = through(LimitsMiddleware(behind), "/v1/images/edits", headers)
    assert (sent[0]["status"], error_of(sent)["type"]) == (403, "forbidden")
    assert behind.scopes == []
    assert status_of(LimitsMiddleware(behind), "/", headers) == 200  # a link to the page
    assert status_of(LimitsMiddleware(behind, KEYS), headers=headers + bearer(TOKEN)) == 200
    own = ((b"sec-fetch-site", b"same-origin"),)
    assert status_of(LimitsMiddleware(behind), "/v1/samples", own) == 200


def test_a_token_lets_its_bearer_pass_and_nobody_else() -> None:
    behind = Behind()
    guard = LimitsMiddleware(behind, KEYS)
    assert status_of(guard, headers=bearer(TOKEN)) == 200
    assert status_of(guard, headers=bearer(TOKEN, "bearer")) == 200
    assert status_of(guard, headers=bearer("battery")) == 200
    assert [key_of(scope).name for scope in behind.scopes] == ["one", "one", "other"]
    passed = len(behind.scopes)
    for headers in (
        (),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN.upper()),
        bearer(TOKEN, "Basic"),
        bearer(""),
        ((b"authorization", TOKEN.encode()),),
        ((b"authorization", b"\xff\xfe"),),
        (*bearer(TOKEN), *bearer(TOKEN)),
        (*bearer(TOKEN), *bearer("x")),
        ((b"x-authorization", f"Bearer {TOKEN}".encode()),),
    ):
        sent = through(guard, headers=headers)
        assert sent[0]["status"] == 401, headers
        assert dict(sent[0]["headers"])[b"www-authenticate"] == b"Bearer"
        assert error_of(sent)["type"] == "unauthorized"
        assert TOKEN not in error_of(sent)["message"]
    assert len(behind.scopes) == passed


def test_a_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append({a, b})
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given in (TOKEN, "wrong"):
        through(LimitsMiddleware(Behind(), KEYS), headers=bearer(given))
    assert compared == [
        {token.encode(), own.encode()} for token in (TOKEN, "wrong") for own in KEYS
    ]


def test_the_page_the_docs_and_probes_are_open_and_nothing_else_is() -> None:
    guard = LimitsMiddleware(Behind(), KEYS)
    for path in (
        "/",
        "/page/page.css",
        "/docs",
        "/openapi.json",
        "/healthz",
        "/readyz",
        "/favicon.ico",
    ):
        assert status_of(guard, path) == 200, path
    for path in (
        "/v1/samples",
        "/v1/models",
        "/metrics",
        "/v1/images/generations",
        "/page",
        "//",
        "/healthz/",
        "/Docs",
    ):
        assert status_of(guard, path) == 401, path


def test_headers_that_override_limits_of_ray_do_not_pass_and_others_do() -> None:
    behind = Behind()
    given = (
        (b"x-request-timeout-seconds", b"9"),
        (b"X-Request-Disconnect-Disabled", b"?1"),
        (b"accept", b"*/*"),
    )
    through(LimitsMiddleware(behind), headers=given)
    assert behind.scopes[0]["headers"] == [(b"accept", b"*/*")]


def test_a_body_reaches_the_application_whole() -> None:
    behind = Behind()
    assert (
        status_of(LimitsMiddleware(behind, body_bytes=6), parts=parts_of(b"ab", b"", b"cd", b"ef"))
        == 200
    )
    assert behind.bodies == [b"abcdef"]


def test_a_body_above_the_limit_is_413_however_it_comes() -> None:
    behind = Behind()
    for headers, parts in (
        (((b"content-length", b"7"),), parts_of(b"")),  # by what it says, before it came
        (((b"content-length", b"9" * 5000),), parts_of(b"")),
        (((b"content-length", b"3"),), parts_of(b"abcdefg")),  # by what it is, whatever it says
        ((), parts_of(b"abc", b"defg")),
    ):
        sent = through(
            LimitsMiddleware(behind, body_bytes=6, body_timeout_s=0.1), headers=headers, parts=parts
        )
        assert sent[0]["status"] == 413
        assert dict(sent[0]["headers"])[b"connection"] == b"close"
        assert error_of(sent) == {
            "message": "a body must be at most 6 bytes",
            "type": "body_too_large",
            "param": None,
            "code": "body_too_large",
        }
    assert behind.scopes == []


def test_what_follows_a_body_that_is_too_large_is_heard_out_and_dropped() -> None:
    parts = parts_of(*[b"abcd"] * 50)
    assert status_of(LimitsMiddleware(Behind(), body_bytes=6), parts=parts) == 413
    assert parts == []


def test_a_client_that_sends_too_much_for_ever_is_left_in_the_end() -> None:
    async def more(n: int = 0) -> None:
        sent = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": b"abcd", "more_body": True}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/samples", "headers": []}
        await asyncio.wait_for(
            LimitsMiddleware(Behind(), body_bytes=6, body_timeout_s=0.1)(scope, receive, send), 20
        )
        assert sent[0]["status"] == 413
        assert error_of(sent)["type"] == "body_too_large"

    asyncio.run(more())


def test_a_body_that_does_not_come_is_408() -> None:
    behind = Behind()
    unfinished = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent = through(LimitsMiddleware(behind, body_timeout_s=0.05), parts=unfinished)
    assert sent[0]["status"] == 408
    assert dict(sent[0]["headers"])[b"connection"] == b"close"
    assert error_of(sent)["message"] == "the body must arrive within 0.05 s"
    assert behind.scopes == []


def test_a_client_that_leaves_within_its_body_is_not_answered() -> None:
    behind = Behind()
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert through(LimitsMiddleware(behind), parts=parts) == []
    assert behind.scopes == []


def test_after_the_body_the_application_hears_of_the_client_that_leaves() -> None:
    heard = []

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), await receive()])

    through(LimitsMiddleware(listening), parts=[*parts_of(b"abc"), {"type": "http.disconnect"}])
    assert heard == [
        {"type": "http.request", "body": b"abc", "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_there_are_no_websockets_with_or_without_a_token() -> None:
    behind = Behind()
    for guard in (LimitsMiddleware(behind), LimitsMiddleware(behind, KEYS)):
        assert through(guard, "/page/x", kind="websocket") == [{"type": "websocket.close"}]
    assert behind.scopes == []


def test_the_life_of_the_application_is_not_guarded() -> None:
    behind = Behind()
    through(LimitsMiddleware(behind, KEYS), kind="lifespan")
    assert behind.scopes[0]["type"] == "lifespan"


def test_refusals_are_told_by_kind() -> None:
    told: list[str] = []
    guard = LimitsMiddleware(
        Behind(), KEYS, body_bytes=6, body_timeout_s=0.05, on_refusal=told.append
    )
    through(guard)
    through(guard, headers=bearer(TOKEN), parts=parts_of(b"abcdefg"))
    through(
        guard,
        headers=bearer(TOKEN),
        parts=[{"type": "http.request", "body": b"", "more_body": True}],
    )
    through(guard, headers=bearer(TOKEN))
    assert told == ["unauthorized", "body_too_large", "body_timeout"]


def test_what_an_error_shows_is_short_and_ascii_however_large_deep_or_odd() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        "é" * 10**6,
        10**4000,
        deep,
        ["x" * 1000] * 1000,
        {"k" * 1000: "\ud800"},
        b"\xff" * 1000,
        float("nan"),
    ):
        assert shown(value).isascii()
        assert len(shown(value)) < 1000
    assert shown("two\nlines\0") == "'two\\nlines\\x00'"
    assert shown("\ud800") == "'\\ud800'"
    while deep:  # piece by piece: the interpreter frees nested lists by recursion
        deep = deep.pop()
