"""What the HTTP API refuses, and how it says so."""

from pathlib import Path
from typing import Any

import pytest

from serve import Model, load
from tests.serve.conftest import Server, Start


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    return start_once(small_run, "sample.steps=4")


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 65}, "n must be in [1, 64], got 65"),
        ({"n": "4"}, "n must be a whole number of at least 1, got '4'"),
        ({"n": None}, "n must be a whole number of at least 1, got None"),
        ({"steps": 2.5}, "steps must be a whole number in [1, 1000], got 2.5"),
        ({"steps": 251}, "steps must be in [1, 250], got 251"),
        ({"steps": True}, "steps must be a whole number in [1, 1000], got True"),
        ({"seed": -1}, "seed must be a whole number in [0, 9223372036854775808), got -1"),
        (
            {"first_index": 2**56 - 1, "n": 2},
            "first_index must be in [0, 2^56 - n], got 72057594037927935",
        ),
        ({"prompt": "frog"}, "'prompt' is not a field of this request: /docs lists them"),
        ({"nucleus_p": 0}, "nucleus_p must be a number in [1e-06, 1], got 0"),
        ({"temperature": 0.001}, "temperature must be a number in [0.01, 100], got 0.001"),
        ({"temperature": "1"}, "temperature must be a number in [0.01, 100], got '1'"),
        (
            {"relaxation_rate": float("nan")},
            "relaxation_rate must be a number in [0, 1000000], got nan",
        ),
        ({"clip": 1}, "clip must be true or false, got 1"),
        ({"format": "gif"}, "format must be one of png webp npz b64_json, got 'gif'"),
        (
            {"grid": "linear"},
            "grid must be one of uniform_t uniform_log_snr quadratic cosine half edm own, got 'linear'",
        ),
        ({"trace": True}, "trace must have format npz or b64_json, or stream, got 'png'"),
        (
            {"clusters": {"0 + 1": -1}},
            "clusters must be a list of clusters, or an object with a finite weight of at least 0 for each, not all 0, got {'0 + 1': -1}",
        ),
        ({"scale": 0}, "scale must be a whole number in [1, 1024], got 0"),
        ({"scale": 65}, "scale must be in [1, 64] for images of 8 px, got 65"),
        (
            {"scale": 2, "format": "npz"},
            "scale must be left out unless a png or webp comes, got 2",
        ),
        ({"preview_every": 2}, "preview_every must be left out unless stream is true, got 2"),
        (
            {"format": "webp", "stream": True},
            "format must be left out of a stream, whose images are PNGs, got 'webp'",
        ),
        ({"clusters": ["nine"]}, None),
        ({"clusters": {"4 + 5 + 6": 0}}, None),
        ({"step": 4}, "'step' is not a field of this request: /docs lists them"),
        ({"seeed": 4, "n": 1}, "'seeed' is not a field of this request: /docs lists them"),
    ],
)
def test_422_names_the_field_the_rule_and_the_value(
    server: Server, given: dict[str, Any], message: str | None
) -> None:
    reply = server.request("/v1/samples", given)
    assert reply.status == 422
    assert reply.error["type"] == "invalid_value"
    assert reply.error["param"] == next(iter(given))
    assert message is None or reply.error["message"] == message


def test_a_field_of_another_endpoint_is_not_taken_for_a_wrong_value(server: Server) -> None:
    for field, value in (("first_index", 3), ("trace", True), ("strength", 0.4)):
        reply = server.request("/v1/images/generations", {"prompt": "", field: value})
        said = f"{field!r} is not a field of this request: /docs lists them"
        assert (reply.error["message"], reply.error["param"]) == (said, field)


def test_an_unknown_cluster_is_answered_with_those_there_are(server: Server, model: Model) -> None:
    for clusters in (["nine"], {"nine": 1.0}):
        message = server.request("/v1/samples", {"clusters": clusters}).error["message"]
        assert message.startswith("clusters must be one of") and message.endswith("got 'nine'")
        assert all(name in message for name in model.names)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "not_json"),
        (b'{"n": 1,}', 400, "not_json"),
        (b'{"n": \xff}', 400, "not_json"),
        (b"n=1", 400, "not_json"),
        (b"[" * 60_000, 400, "not_json"),
        (b'{"n": ' + b"1" * 5000 + b"}", 400, "not_json"),
        (b"[]", 422, "invalid_value"),
        (b"null", 422, "invalid_value"),
        (b"", 422, "invalid_value"),
        (b'{"\\ud800": 1}', 422, "invalid_value"),
        (b'{"prompt": "' + b"x" * 66_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_a_body_that_is_no_object_is_refused(
    server: Server, body: bytes, status: int, kind: str
) -> None:
    reply = server.request("/v1/samples", body, {"content-type": "application/json"})
    assert (reply.status, reply.error["type"]) == (status, kind)
    assert reply.error["message"].isascii()


def test_json_under_another_name_is_refused_with_the_header_to_send(server: Server) -> None:
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ):
        reply = server.request("/v1/samples", b'{"n": 1}', headers)
        assert reply.status == 400
        assert "Content-Type: application/json" in reply.error["message"]
    assert (
        server.request(
            "/v1/samples", b'{"n": 1}', {"content-type": "application/json; charset=utf-8"}
        ).status
        == 200
    )


def test_other_paths_and_methods_are_refused_in_the_same_shape(server: Server) -> None:
    for path in (
        "/v2/samples",
        "/v1/samples/",
        "/page/",
        "/page/../api.py",
        "/page/%00",
        "/page/" + "a" * 3000,
    ):
        reply = server.request(path)
        assert (reply.status, reply.error["type"]) == (404, "not_found"), path
    reply = server.request("/v1/samples")
    assert (reply.status, reply.error["type"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    reply = server.request("/v1/models/%ff%00")
    assert (reply.status, reply.error["type"], reply.error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
