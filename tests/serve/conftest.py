"""`python -m serve` in a process of its own, and the HTTP API in this one."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}


class Reply(NamedTuple):
    """An answer over HTTP; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, in the one shape that all have."""
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["code"] == error["type"]
        assert isinstance(error["message"], str) and "Traceback" not in error["message"]
        return error

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream: names and data."""
        parts = [part for part in self.body.decode().split("\n\n") if part]
        blocks = [part.split("\n") for part in parts if not part.startswith(":")]
        assert all(len(block) == 2 for block in blocks)
        return [
            (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
            for name, data in blocks
        ]


class Server:
    """`python -m serve RUN WORDS`, in a process of its own, on a port of its own; its output goes to `log`."""

    def __init__(self, log: Path, run: Path, *words: str) -> None:
        self.log, self.url = log, ""
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "error::ResourceWarning",
                    "-m",
                    "serve",
                    str(run),
                    "serve.port=0",
                    *words,
                ],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def await_output(self, text: str, timeout_s: float = 180) -> None:
        """Wait until it has said something."""
        end = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, (
                f"it ended with {self.process.returncode}:\n{self.output}"
            )
            assert time.monotonic() < end, f"it never said {text!r}:\n{self.output}"
            time.sleep(0.02)

    def await_ready(self) -> None:
        self.await_output("ctrl-C ends it")
        self.url = next(word for word in self.output.split() if word.startswith("http://"))

    def connect(self, timeout_s: float = 60) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)

    def request(
        self,
        path: str,
        tree: Any = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> Reply:
        """GET, or POST a body: bytes, or a tree that becomes JSON."""
        connection = self.connect()
        try:
            body = tree if tree is None or isinstance(tree, bytes) else json.dumps(tree).encode()
            method = method or ("GET" if tree is None else "POST")
            connection.request(method, path, body, headers or ({} if tree is None else JSON))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """What /metrics says of a metric's sample, 0 where it has none."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.request("/metrics").body.decode())
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def await_metric(self, name: str, value: float, timeout_s: float = 30, **labels: str) -> None:
        end = time.monotonic() + timeout_s
        while (found := self.metric(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


Start = Callable[..., Server]


@contextmanager
def servers(folder: Path) -> Iterator[Start]:
    started: list[Server] = []

    def start(run: Path, *words: str, ready: bool = True) -> Server:
        server = Server(folder / f"serve-{len(started)}.log", run, *words)
        started.append(server)
        if ready:
            server.await_ready()
        return server

    try:
        yield start
    finally:
        for server in started:
            server.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(RUN, WORDS ..., ready=True)`: a server that ends with the test."""
    with servers(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same, for a server that ends with the test's module."""
    with servers(tmp_path_factory.mktemp("serve")) as found:
        yield found


def pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Images in [-1, 1] as uint8 `[n, H, W, C]`, computed in float64."""
    return (
        np.rint((images.double().numpy().clip(-1, 1) + 1) * 127.5)
        .astype(np.uint8)
        .transpose(0, 2, 3, 1)
    )


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """uint8 images that come from the same floats up to 1e-4: a value at the border of two may fall to either."""
    assert found.dtype == expected.dtype == np.uint8
    apart = np.abs(found.astype(int) - expected.astype(int))
    return found.shape == expected.shape and apart.max() <= 1 and bool((apart > 0).mean() < 0.02)


class Client:
    """One request to an ASGI application in this process; `leave` it and the client is gone."""

    def __init__(
        self,
        app: Any,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> None:
        self.left = asyncio.Event()
        self.parts = [{"type": "http.request", "body": body or b"", "more_body": False}]
        self.sent: list[dict[str, Any]] = []
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method or ("GET" if body is None else "POST"),
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 9),
            "headers": [
                (name.lower().encode(), value.encode())
                for name, value in {**JSON, **(headers or {})}.items()
            ],
            "state": {},
        }
        self.task = asyncio.create_task(app(self.scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self.parts:
            return self.parts.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(dict(message))
        await asyncio.sleep(0)

    async def reply(self) -> Reply:
        await self.task
        start, *rest = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], headers, b"".join(part.get("body", b"") for part in rest))


async def request(app: Any, path: str, tree: Any = None, **options: Any) -> Reply:
    """GET, or POST a tree as JSON, to an ASGI application in this process."""
    body = None if tree is None else json.dumps(tree).encode()
    return await Client(app, path, body, **options).reply()
