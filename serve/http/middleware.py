"""Middleware: the token, the size of a body and its time, headers that clients may not set, HEAD.

Plain ASGI, so that it serves this server and Ray Serve's proxy alike.
"""

import asyncio
import contextlib
import hmac
import json
import reprlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from serve.engine.shares import ANYONE, Key
from serve.http.limits import is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Ray Serve lets clients override the server's limits with these.
_STRIPPED = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
# Paths that need no token: the page and its files, the API's description, probes.
_OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico")
_OPEN_UNDER = "/page/"
UPLOADS = ("/v1/images/edits", "/v1/images/variations")  # paths whose bodies hold images
_KEY = "ddm.key"  # in a request's scope
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 120


def error_body(kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The one shape of every error, which clients of OpenAI's API know."""
    return {"error": {"message": message, "type": kind, "param": param, "code": kind}}


def shown(value: Any) -> str:
    """A value for an error's message: in ASCII and short, also if it is nested deeply."""
    return _BRIEF.repr(value).encode("ascii", "backslashreplace").decode()


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_UNDER)


def _is_from_another_site(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a browser says so, which sends a form to any address without asking it first."""
    return any(
        name.lower() == b"sec-fetch-site" and value in (b"cross-site", b"same-site")
        for name, value in headers
    )


def _is_by_another_name(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether this machine is asked by a name that anybody can take: a page can make its own lead
    here, and is then of the same site (DNS rebinding).
    """
    for key, value in headers:
        if key.lower() == b"host":
            host = value.decode("latin-1").lower()
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if not (is_loopback(name) or name.endswith(".localhost")):
                return True
    return False


def key_of(scope: MutableMapping[str, Any]) -> Key:
    """The key whose token a request carries."""
    key: Key = scope.get(_KEY, ANYONE)
    return key


class LimitsMiddleware:
    """Passes requests within the limits on to an application, with their whole body.

    keys: by the tokens of which `Authorization: Bearer` must carry one; none: anything passes but
    what a page of another site sends (403), which could use the server of any of its visitors.
    local: without keys, answer only at localhost and loopback addresses.
    The application finds the key of a request with `key_of`. body_bytes and body_timeout_s: of a
    body, upload_bytes: of one of `UPLOADS`; beyond them 413 and 408. on_refusal: gets the kind of each refusal.
    """

    def __init__(
        self,
        app: App,
        keys: Mapping[str, Key] | None = None,
        body_bytes: int = 65_536,
        body_timeout_s: float = 10.0,
        upload_bytes: int = 4 << 20,
        on_refusal: Callable[[str], object] = lambda kind: None,
        local: bool = False,
    ) -> None:
        self.app, self.on_refusal = app, on_refusal
        self.keys = {token.encode(): key for token, key in (keys or {}).items()}
        self.body_bytes, self.body_timeout_s = body_bytes, body_timeout_s
        self.upload_bytes = upload_bytes
        self.local = local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # not supported
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = [
            pair for pair in scope["headers"] if pair[0].lower() not in _STRIPPED
        ]
        key = self._key(scope["path"], headers)
        scope = {**scope, "headers": headers, _KEY: key}
        refusal = self._refusal(scope["path"], headers, key)
        if refusal is not None:
            await self._refuse(send, *refusal)
            return
        try:
            async with asyncio.timeout(self.body_timeout_s):
                most = self.upload_bytes if scope["path"] in UPLOADS else self.body_bytes
                body = await self._body(headers, receive, most)
        except TimeoutError:
            await self._refuse(
                send, 408, "body_timeout", f"the body must arrive within {self.body_timeout_s:g} s"
            )
            return
        except _GoneError:
            return
        if body is None:
            await self._refuse(
                send,
                413,
                "body_too_large",
                f"a body must be at most {most} bytes",
                receive,
            )
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    def _refusal(
        self, path: str, headers: list[tuple[bytes, bytes]], key: Key | None
    ) -> tuple[int, str, str] | None:
        """The status, kind and message for a sender who may not use the path."""
        if key is None:
            message = (
                "this needs the header Authorization: Bearer TOKEN, with a token of the server"
            )
            return 401, "unauthorized", message
        if not self.keys and not _is_open(path) and _is_from_another_site(headers):
            return 403, "forbidden", "without a token the server answers no page of another site"
        if not self.keys and self.local and not _is_open(path) and _is_by_another_name(headers):
            message = (
                "without a token the server answers at localhost alone, unless serve.open is set"
            )
            return 403, "forbidden", message
        return None

    def _key(self, path: str, headers: list[tuple[bytes, bytes]]) -> Key | None:
        """Whose token the headers carry; None for nobody's."""
        if not self.keys or _is_open(path):
            return ANYONE
        given = [
            value.partition(b" ") for name, value in headers if name.lower() == b"authorization"
        ]
        if len(given) != 1 or given[0][0].lower() != b"bearer":
            return None
        token = given[0][2].strip()
        # All are compared, so that the time says nothing.
        found = [key for own, key in self.keys.items() if hmac.compare_digest(token, own)]
        return found[0] if found else None

    async def _body(
        self, headers: list[tuple[bytes, bytes]], receive: Receive, most: int
    ) -> bytes | None:
        """The whole body, None if it has more than `most` bytes; nothing above that is kept."""
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        if any(value.isdigit() and (len(value) > 18 or int(value) > most) for value in lengths):
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _refuse(
        self, send: Send, status: int, kind: str, message: str, receive: Receive | None = None
    ) -> None:
        self.on_refusal(kind)
        body = json.dumps(error_body(kind, message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [(b"connection", b"close")] if status in (408, 413) else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": receive is not None})
        if receive is not None:
            # A client that is cut off while it sends may never read the answer: let it send.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.body_timeout_s):
                    while (await receive()).get("more_body", False):
                        pass
            await send({"type": "http.response.body", "body": b""})


class HeadAsGet:
    """Answers HEAD as GET without a body."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_without_body)


class _GoneError(Exception):
    """The client left before its body had arrived."""
