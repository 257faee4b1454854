"""Bad requests by the thousand against one server: none breaks it, none costs memory, and a good one right after is served.

As many as `DDM_HOSTILE` (default 2000). `pytest -s` shows how many had which status, and the server's memory before and after.
"""

import itertools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve import Model, load
from serve.http.schemas import RULES, ImagesRequest, JobRequest, SampleRequest
from tests.serve.conftest import JSON, Reply, Server, Start, pixels, same
from tests.serve.http.test_app import images

COUNT = int(os.environ.get("DDM_HOSTILE", "2000"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
POSTS = ("/v1/samples", "/v1/images/generations", "/v1/jobs")
JOB = "/v1/jobs/{job_id}"
COUNTS: Counter[tuple[str, int]] = Counter()

POISON: list[Any] = [
    *(-1, 0, 2**31, 2**63, 2**64, 10**400, -(10**4000), 1.5, 1e308, -1e308, 5e-324, -0.0),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "1",
        "x" * 10_000,
        "\0",
        "\ud800",
        "é\u202e\U0001f600",
        "../../etc/passwd",
        "'; DROP TABLE",
        "{}",
        "NaN",
    ),
    *(
        True,
        False,
        [],
        [[]],
        [None],
        {},
        {"": None},
        {"a": {"b": []}},
        [1] * 1000,
        {"\ud800": 1},
        ["\ud800"],
    ),
    {str(i): i for i in range(1000)},
    json.loads("[" * 500 + "]" * 500),
]


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    words = ("n=4", "steps=8", "body_timeout_s=5", "deadline_s=60")
    limits = [f"serve.limits.{word}" for word in words]
    return start_once(small_run, "sample.steps=3", *limits)


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.fixture(autouse=True)
def it_lives_and_serves(server: Server, model: Model) -> Iterator[None]:
    """After each of these tests the same server answers a good request as ever, and holds nothing of what it was asked before."""
    yield
    reply = server.request("/v1/samples", {"seed": 9, "n": 4, "steps": 4, "format": "npz"})
    assert same(images(reply), pixels(model.sample(4, seed=9, steps=4)))
    server.await_metric("ddm_active_requests", 0)
    server.await_metric("ddm_pending_cost", 0)
    assert server.process.poll() is None
    assert "Traceback" not in server.output


def memory_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        / 1024
    )


def sent(server: Server, *pieces: bytes, wait_s: float = 30, pause_s: float = 0) -> bytes:
    """What comes back for bytes that are sent as they are, until the server closes or the time is up."""
    parts = urlsplit(server.url)
    answer = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=wait_s) as connection:
        with suppress(ConnectionError, TimeoutError):  # an answer may have come already
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        with suppress(ConnectionError, TimeoutError):
            while more := connection.recv(65_536):
                answer += more
    return answer


def post(body: bytes, *lines: str, path: str = "/v1/samples", close: bool = True) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *lines]
    head += (
        [f"content-length: {len(body)}"]
        if not any("transfer-encoding" in line for line in lines)
        else []
    )
    head += ["connection: close"] if close else []
    return "\r\n".join([*head, "", ""]).encode() + body


def replies(answer: bytes) -> list[Reply]:
    """The answers in what a connection carried, by their content-length."""
    found = []
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        length = int(headers["content-length"])
        found.append(Reply(int(first.split()[1]), headers, rest[:length]))
        answer = rest[length:]
    return found


def only(answer: bytes) -> Reply:
    (reply,) = replies(answer)
    return reply


# By the thousand


def test_the_first_requests_fill_what_a_server_keeps(server: Server) -> None:
    for i in range(40):
        server.request(
            "/v1/samples", {"n": 4, "steps": 8, "seed": i, "sampler": ("ddim", "heun")[i % 2]}
        )
    server.log.with_name("memory").write_text(str(memory_mib(server)))


PATHS = [
    *(("POST", path, mode) for path in POSTS for mode in GenerationMode),
    *(("GET", path, GenerationMode.POSITIVE) for path in ("/v1/jobs", JOB, f"{JOB}/result")),
    *(("DELETE", path, GenerationMode.POSITIVE) for path in (JOB, "/v1/requests/{request_id}")),
]


@pytest.mark.parametrize(("method", "path", "mode"), PATHS)
def test_what_the_description_of_the_api_gives_rise_to_is_answered_as_it_says(
    server: Server, path: str, method: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(server.request("/openapi.json").json)
    schema.config.update(base_url=server.url)

    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=max(10, COUNT // (20 if mode is GenerationMode.POSITIVE else 10)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answered(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        COUNTS[f"schemathesis, {mode.value}", response.status_code] += 1
        refused = response.status_code == 413  # which negative_data_rejection does not know
        case.validate_response(
            response, checks=CHECKS if refused else [*CHECKS, negative_data_rejection]
        )

    answered()


def bad_values() -> list[tuple[str, str, Any]]:
    """A path, a field, and a value that the field can hardly have, for every field and value."""
    found = []
    for path, kind in (
        ("/v1/samples", SampleRequest),
        ("/v1/images/generations", ImagesRequest),
        ("/v1/jobs", JobRequest),
    ):
        for field, value in itertools.product(
            [*kind.model_fields, "unknown", "__proto__", "\ud800"], POISON
        ):
            found.append((path, field, value))
    return found


def test_every_field_survives_every_bad_value(server: Server) -> None:
    cases = bad_values()
    wanted = max(100, COUNT - sum(COUNTS.values()))
    rounds = (
        cases[i % len(cases)] for i in range(0, wanted * 7, 7)
    )  # 7 apart: all kinds, however few are wanted
    for path, field, value in rounds:
        tree = {
            "n": 1,
            "steps": 1,
            "seed": 1,
            **({"prompt": ""} if "images" in path else {}),
            field: value,
        }
        reply = server.request(path, tree)
        COUNTS["by hand", reply.status] += 1
        assert reply.status in (200, 202, 400, 404, 413, 422), (path, field, value)
        if reply.status in (200, 202):
            assert field in RULES
        elif reply.status == 422:
            assert reply.error["type"] == "invalid_value"
            assert reply.error["param"] == (field if field != "\ud800" else None), (
                path,
                field,
                value,
            )
            assert len(reply.body) < 12_000 + 2 * 10_000 * (field == "clusters")
        else:
            assert reply.error["message"]


# By hand


@pytest.mark.parametrize(
    "brackets", [100_000, 60_000, 2_000, 1_000, *range(960, 1000, 7), 900, 500, 100]
)
def test_json_however_deep_is_refused(server: Server, brackets: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * brackets + b"1" + closing * brackets
        for body in (
            deep,
            opening * brackets,
            b'{"clusters":' + deep + b"}",
            b'{"unknown":' + deep + b"}",
        ):
            reply = server.request("/v1/samples", body, JSON)
            assert reply.status == (413 if len(body) > 65_536 else reply.status)
            assert reply.status in (400, 413, 422)
            assert len(reply.error["message"]) < 1000


def test_whole_numbers_of_many_digits_are_refused(server: Server) -> None:
    for digits, status in (
        (100_000, 413),
        (60_000, 400),
        (4_301, 400),
        (4_300, 422),
        (400, 422),
        (20, 422),
    ):
        for field in ("n", "seed", "steps", "budget", "relaxation_rate", "first_index", "top_k"):
            reply = server.request("/v1/samples", f'{{"{field}": {"9" * digits}}}'.encode(), JSON)
            assert reply.status == status
            assert len(reply.error["message"]) <= 2000


def test_60_mb_are_refused_however_they_are_announced_and_leave_no_trace(server: Server) -> None:
    size, before = 60_000_000, memory_mib(server)
    megabyte = b" " * 1_000_000
    chunk = b"%x\r\n" % len(megabyte) + megabyte + b"\r\n"
    announced = post(b"", close=False).replace(b"content-length: 0", b"content-length: %d" % size)
    chunked = post(b"", "transfer-encoding: chunked", close=False)
    for answer in (
        sent(server, announced, *[megabyte] * 60),
        sent(server, announced),  # who only says so is not waited for
        sent(server, chunked, *[chunk] * 60, b"0\r\n\r\n"),
        sent(server, chunked, *[chunk] * 60),
    ):
        reply = only(answer)
        assert (reply.status, reply.error["type"]) == (413, "body_too_large")
        assert reply.headers["connection"] == "close"
    print(f"\n60 MB bodies: {before:.1f} MiB before, {memory_mib(server):.1f} MiB after")


def test_a_body_that_is_slow_is_408_and_others_are_served_meanwhile(server: Server) -> None:
    head = post(b"{}" + b" " * 98, close=False)[:-100]
    parts = urlsplit(server.url)
    slow = [socket.create_connection((parts.hostname, parts.port), timeout=30) for _ in range(50)]
    for connection in slow:
        connection.sendall(head + b"{")
    assert server.request("/v1/samples", {"n": 1}).status == 200
    for connection in slow:
        with connection:
            answer = b""
            while more := connection.recv(65_536):
                answer += more
            assert only(answer).status == 408
            assert only(answer).error["type"] == "body_timeout"


def test_headers_and_addresses_without_end_are_refused(server: Server) -> None:
    megabytes = [b"x" * 1_000_000] * 20
    for beginning in (
        b"GET /",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: ",
        b"",
        b"POST /v1/samples HTTP/1.1\r\n",
    ):
        answer = sent(server, beginning, *megabytes)
        assert answer == b"" or answer.startswith(
            b"HTTP/1.1 400 "
        )  # none where it closed before all was sent
    many = b"".join(b"x-%d: y\r\n" % i for i in range(100_000))
    assert sent(server, b"GET / HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n")[:13] in (
        b"HTTP/1.1 400 ",
        b"",
    )


def test_what_is_no_http_is_refused(server: Server) -> None:
    for junk in (
        b"\0" * 100 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\r\n\r\n",
        b"GET\r\n\r\n",
        b"{}\r\n\r\n",
    ):
        assert sent(server, junk)[:12] in (b"HTTP/1.1 400", b"")
    twice = post(b"{}").replace(b"content-length: 2", b"content-length: 2\r\ncontent-length: 3")
    assert sent(server, twice)[:12] == b"HTTP/1.1 400"
    for length in (b"-1", b"x", b"1e3", b"9" * 5000):
        answer = sent(
            server, post(b"{}").replace(b"content-length: 2", b"content-length: " + length)
        )
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")
    upgrade = b"GET /page/x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    upgrade += b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(upgrade)  # of a page that is not there; the connection stays open
        assert connection.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 404"


def test_other_content_types_and_methods_are_refused(server: Server) -> None:
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/x-npz",
        "*/*",
        "\xff",
    ):
        assert (
            server.request("/v1/samples", b'{"n": 1}', {"content-type": kind}).error["type"]
            == "not_json"
        )
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FROB"):
        line = post(b"{}").replace(b"POST", method.encode(), 1)
        assert only(sent(server, line)).error["type"] == "method_not_allowed"


def test_requests_in_a_row_on_one_connection_are_answered_in_their_order(
    server: Server, model: Model
) -> None:
    good = [json.dumps({"seed": seed, "format": "npz"}).encode() for seed in range(4)]
    bodies = [good[0], b"{", good[1], b'{"n": 0}', good[2], b"[]", good[3]]
    rows = [post(body, close=body is bodies[-1]) for body in bodies]
    found = replies(sent(server, b"".join(rows)))
    assert [reply.status for reply in found] == [200, 400, 200, 422, 200, 422, 200]
    for seed, reply in enumerate(found[::2]):
        assert same(images(reply), pixels(model.sample(1, seed=seed, steps=3)))


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_take_their_cost_along(server: Server, stream: bool) -> None:
    parts = urlsplit(server.url)
    request = post(
        json.dumps({"n": 4, "steps": 8, "sampler": "heun", "stream": stream}).encode(), close=False
    )
    before = server.metric("ddm_requests_total", status="499")
    for cut in (
        len(request),
        len(request),
        len(request) - 1,
        30,
    ):  # after the request, and within it
        leaving = [
            socket.create_connection((parts.hostname, parts.port), timeout=30) for _ in range(25)
        ]
        for connection in leaving:
            connection.sendall(request[:cut])
        for connection in leaving[::2] if stream else []:
            if cut == len(request):
                assert connection.recv(20) == b"HTTP/1.1 200 OK\r\ndat"
        for connection in leaving:
            connection.close()
    server.await_metric("ddm_pending_cost", 0)
    server.await_metric("ddm_active_requests", 0)
    assert server.metric("ddm_requests_total", status="499") > before


def test_memory_is_flat_and_every_status_was_meant(server: Server) -> None:
    before, after = float(server.log.with_name("memory").read_text()), memory_mib(server)
    by_kind = {f"{kind}: {status}": count for (kind, status), count in sorted(COUNTS.items())}
    print(
        f"\n{sum(COUNTS.values())} bad requests: {by_kind}; memory {before:.1f} MiB before, {after:.1f} MiB after"
    )
    assert {status for _, status in COUNTS} <= {200, 202, 400, 404, 413, 422}
    assert after < 1.5 * before  # one body of 60 MB kept would be seen
