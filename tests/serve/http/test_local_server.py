"""Connections: what a client must do in time, and how many there may be."""

import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import Server, Start

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    limits = ("serve.limits.header_timeout_s=3", "serve.limits.keep_alive_s=3")
    return start_once(small_run, "sample.steps=2", *limits)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def connect(server: Server, stack: ExitStack) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    return stack.enter_context(socket.create_connection((parts.hostname, parts.port), 30))


def get(connection: socket.socket) -> None:
    """One request, with its whole answer."""
    connection.sendall(HEAD + b"\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        part = connection.recv(65536)
        assert part
        answer += part
    assert b"200 OK" in answer


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_open(connection: socket.socket) -> bool:
    return not select.select([connection], [], [], 0)[0]


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-Long: "])
def test_headers_that_do_not_arrive_end_the_connection(
    server: Server, stack: ExitStack, sent: bytes
) -> None:
    connection = connect(server, stack)
    connection.sendall(sent)
    assert read_to_end(connection) == b""


def test_headers_that_arrive_byte_by_byte_have_one_deadline(
    server: Server, stack: ExitStack
) -> None:
    connection = connect(server, stack)
    connection.settimeout(0.05)
    for _ in range(200):
        try:
            connection.sendall(b"G")
            if connection.recv(1) == b"":
                return
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return
    raise AssertionError("it is still open")


def test_a_second_request_has_the_deadline_too(server: Server, stack: ExitStack) -> None:
    connection = connect(server, stack)
    get(connection)
    connection.sendall(HEAD)
    assert read_to_end(connection) == b""


def test_a_kept_connection_is_closed_after_keep_alive_s(server: Server, stack: ExitStack) -> None:
    connection = connect(server, stack)
    connection.sendall(HEAD + b"\r\n" + HEAD + b"\r\n")  # two in one: both are answered
    assert read_to_end(connection).count(b"200 OK") == 2


def test_the_oldest_idle_connection_makes_room_for_a_new_one(
    small_run: Path, start: Start, stack: ExitStack
) -> None:
    times = ("serve.limits.header_timeout_s=60", "serve.limits.keep_alive_s=600")
    server = start(small_run, "serve.limits.connections=5", *times)
    idle = []
    for _ in range(5):
        idle.append(connect(server, stack))
        get(idle[-1])
    assert all(map(is_open, idle))
    get(connect(server, stack))
    assert read_to_end(idle[0]) == b""
    assert all(map(is_open, idle[2:]))


def test_a_client_that_does_not_read_is_cut_off(small_run: Path, start: Start) -> None:
    server = start(small_run, "serve.limits.send_timeout_s=0.3")
    with ExitStack() as stack:
        connection = socket.socket()
        stack.enter_context(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(server.url)
        connection.connect((parts.hostname, parts.port))
        body = b'{"n": 64, "steps": 250, "stream": true, "trace": true}'
        head = b"POST /v1/samples HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.await_metric("ddm_requests_total", 1, 60, status="499")
        server.await_metric("ddm_active_requests", 0)
        assert server.metric("ddm_images_total") < 64


def test_with_few_files_idle_connections_leave_room_for_a_request(
    small_run: Path, start: Start
) -> None:
    server = start(small_run, "sample.steps=2")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = resource.prlimit(0, resource.RLIMIT_NOFILE, (200, hard))
    few = start(small_run, "sample.steps=2", ready=False)  # which inherits it
    resource.prlimit(0, resource.RLIMIT_NOFILE, before)
    few.await_ready()
    assert server.request("/healthz").status == 200
    with ExitStack() as stack:
        for _ in range(300):
            connect(few, stack)
        for _ in range(3):
            assert few.request("/v1/samples", {}).status == 200
    assert "Traceback" not in few.output
