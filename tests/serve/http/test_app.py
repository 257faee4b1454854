import asyncio
import base64
import io
import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from serve import Model, load
from serve.engine.expert import UnavailableError
from serve.engine.metrics import Prometheus
from serve.engine.service import Service
from serve.http.app import build_app
from serve.settings import settings
from tests.serve.conftest import Client, Reply, Server, Start, pixels, request, same

# A settled sampler and policy, whatever the defaults: it ends in what was denoised last, and
# evaluates alpha at every step.
GIVEN = {"seed": 5, "steps": 4, "sampler": "dpmpp_2m", "grid": "uniform_t", "policy": "balanced"}
STATUSES = (400, 401, 408, 413, 422, 429, 503, 504)


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    return start_once(small_run, "sample.steps=4")


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


def image(file: bytes) -> np.ndarray[Any, Any]:
    """A grey image in a file, `[H, W, 1]`."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("L"))[:, :, None]


def arrays(reply: Reply) -> dict[str, np.ndarray[Any, Any]]:
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/x-npz"
    with np.load(io.BytesIO(reply.body), allow_pickle=False) as file:
        return dict(file)


def images(reply: Reply) -> np.ndarray[Any, Any]:
    return arrays(reply)["images"]


def decoded(data: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    return np.stack([image(base64.b64decode(item["b64_json"])) for item in data])


# Images


def test_npz_holds_the_images_of_load_and_sample(server: Server, model: Model) -> None:
    reply = server.request("/v1/samples", {**GIVEN, "n": 5, "first_index": 2, "format": "npz"})
    found = arrays(reply)
    assert set(found) == {"images", "seed", "first_index"}
    assert same(found["images"], pixels(model.sample(5, first_index=2, **GIVEN)))
    assert found["images"].shape == (5, 8, 8, 1)
    assert found["seed"] == 5 and found["first_index"] == 2
    assert reply.headers["ddm-seed"] == "5"
    assert reply.headers["ddm-version"] == model.version
    assert reply.headers["ddm-nfe"] == str(5 * 4)  # `balanced` asks one expert a step
    assert "ddm-degraded" not in reply.headers


def test_one_image_comes_as_a_png_of_its_pixels_unless_told_otherwise(
    server: Server, model: Model
) -> None:
    reply = server.request("/v1/samples", {**GIVEN, "first_index": 3})
    assert reply.headers["content-type"] == "image/png"
    assert reply.body[:8] == b"\x89PNG\r\n\x1a\n"
    assert same(image(reply.body)[None], pixels(model.sample(1, first_index=3, **GIVEN)))


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 2), (5, 3), (9, 3)])
def test_many_images_come_as_a_contact_sheet_by_rows(
    server: Server, form: str, n: int, columns: int
) -> None:
    expected = images(server.request("/v1/samples", {**GIVEN, "n": n, "format": "npz"}))
    reply = server.request("/v1/samples", {**GIVEN, "n": n, "format": form, "scale": 1})
    assert reply.headers["content-type"] == f"image/{form}"
    assert reply.headers["ddm-scale"] == "1"
    sheet = image(reply.body)
    rows = -(-n // columns)
    assert sheet.shape == (rows * 10 - 2, columns * 10 - 2, 1)
    for i in range(n):
        top, left = i // columns * 10, i % columns * 10
        assert np.array_equal(sheet[top : top + 8, left : left + 8], expected[i])
        sheet[top : top + 8, left : left + 8] = 255
    assert (sheet == 255).all()  # nothing else but white


def test_images_of_a_contact_sheet_are_enlarged_to_64_pixels_unless_asked_otherwise(
    server: Server,
) -> None:
    expected = images(server.request("/v1/samples", {**GIVEN, "n": 4, "format": "npz"}))
    for given, scale in (({}, 8), ({"scale": 3}, 3), ({"scale": 64}, 64)):
        reply = server.request("/v1/samples", {**GIVEN, "n": 4, **given})
        assert reply.headers["ddm-scale"] == str(scale)
        sheet, side = image(reply.body).astype(float), 8 * scale
        assert sheet.shape == (2 * side + 2, 2 * side + 2, 1)
        for i in range(4):
            top, left = i // 2 * (side + 2), i % 2 * (side + 2)
            large = sheet[top : top + side, left : left + side, 0]
            small = large.reshape(8, scale, 8, scale).mean((1, 3))
            assert np.abs(small - expected[i][:, :, 0]).mean() < 20  # enlarged smoothly


def test_one_image_is_enlarged_only_if_asked(server: Server) -> None:
    plain = server.request("/v1/samples", GIVEN)
    assert plain.headers["ddm-scale"] == "1" and image(plain.body).shape == (8, 8, 1)
    large = server.request("/v1/samples", {**GIVEN, "scale": 5})
    assert large.headers["ddm-scale"] == "5" and image(large.body).shape == (40, 40, 1)


def test_b64_json_holds_a_png_each_and_says_what_they_are(server: Server, model: Model) -> None:
    reply = server.request("/v1/samples", {**GIVEN, "n": 3, "first_index": 7, "format": "b64_json"})
    assert reply.headers["content-type"] == "application/json"
    expected = images(
        server.request("/v1/samples", {**GIVEN, "n": 3, "first_index": 7, "format": "npz"})
    )
    assert np.array_equal(decoded(reply.json["data"]), expected)
    assert [item["index"] for item in reply.json["data"]] == [7, 8, 9]
    facts = {key: value for key, value in reply.json.items() if key != "data"}
    assert facts == {
        "seed": 5,
        "first_index": 7,
        "version": model.version,
        "nfe": 12,
        "router_nfe": 12,
        "degraded": [],
    }


def test_a_trace_is_that_of_load_and_sample_in_npz_and_in_json(
    server: Server, model: Model
) -> None:
    given = {
        "seed": 2,
        "steps": 3,
        "policy": "adaptive",
        "budget": 2.0,
        "source": "posterior",
        "temperature": 0.7,
    }
    expected, trace = model.sample(4, trace=True, **given)
    found = arrays(server.request("/v1/samples", {**given, "n": 4, "trace": True, "format": "npz"}))
    traced = {"t", "alpha", "chosen", "nfe", "router_nfe"}
    assert set(found) == {"images", "seed", "first_index"} | traced
    assert same(found["images"], pixels(expected))
    np.testing.assert_allclose(found["t"], trace.t.numpy())
    np.testing.assert_allclose(found["alpha"], trace.alpha.numpy(), atol=1e-5)
    assert np.array_equal(found["chosen"], trace.chosen.numpy()) and found["chosen"].dtype == bool
    assert found["nfe"] == trace.calls
    assert found["router_nfe"] == trace.router_calls
    told = server.request("/v1/samples", {**given, "n": 4, "trace": True, "format": "b64_json"})
    assert np.array_equal(decoded(told.json["data"]), found["images"])
    assert told.json["nfe"] == trace.calls and told.headers["ddm-nfe"] == str(trace.calls)
    assert told.json["trace"]["experts"] == model.names
    np.testing.assert_allclose(told.json["trace"]["t"], trace.t.numpy())
    np.testing.assert_allclose(told.json["trace"]["alpha"], trace.alpha.numpy(), atol=1e-5)
    assert np.array_equal(told.json["trace"]["chosen"], trace.chosen.int().numpy())


@pytest.mark.parametrize(
    "given",
    [
        {"sampler": "heun", "grid": "edm"},
        {"sampler": "unipc", "order": 2, "t_min": 0.01},
        {"sampler": "ddpm", "policy": "stochastic"},
        {"policy": "top_k", "top_k": 2, "control_variate": "none", "clip": False},
        {"policy": "nucleus", "nucleus_p": 0.5, "source": "posterior"},
        {"policy": "full", "source": "analytic"},
        {"source": "derivative", "relaxation_rate": 3.0},
        {"source": "prior", "policy": "fixed"},
    ],
)
def test_every_setting_of_a_request_is_heard(
    server: Server, model: Model, given: dict[str, Any]
) -> None:
    reply = server.request("/v1/samples", {**GIVEN, **given, "n": 3, "format": "npz"})
    expected = pixels(model.sample(3, **{**GIVEN, **given}))
    assert same(images(reply), expected)
    assert not same(expected, pixels(model.sample(3, **GIVEN)))


def test_what_a_request_leaves_out_is_the_services_own(server: Server, model: Model) -> None:
    found = images(server.request("/v1/samples", {"seed": 1, "n": 2, "format": "npz"}))
    assert same(found, pixels(model.sample(2, seed=1, steps=4)))
    assert not same(found, pixels(model.sample(2, seed=1)))  # of 25 steps


def test_a_request_without_a_seed_says_which_it_got_and_that_gives_the_same_again(
    server: Server,
) -> None:
    first, other = (server.request("/v1/samples", {"n": 2, "format": "npz"}) for _ in range(2))
    seed = int(first.headers["ddm-seed"])
    assert 0 <= seed < 2**53  # a number that JavaScript keeps
    assert arrays(first)["seed"] == seed
    again = server.request("/v1/samples", {"n": 2, "format": "npz", "seed": seed})
    assert np.array_equal(images(first), images(again))
    assert other.headers["ddm-seed"] != first.headers["ddm-seed"]
    assert not same(images(other), images(first))


def test_clusters_are_named_or_weighted(server: Server, model: Model) -> None:
    one, two, _ = model.names

    def asked(clusters: Any) -> np.ndarray[Any, Any]:
        return images(
            server.request("/v1/samples", {**GIVEN, "n": 6, "clusters": clusters, "format": "npz"})
        )

    named = asked([one, two])
    assert same(named, pixels(model.sample(6, clusters={one: 1.0, two: 1.0}, **GIVEN)))
    assert np.array_equal(asked({one: 1, two: 1}), named)
    assert np.array_equal(
        asked({one: 1e-300, two: 1e-300}), named
    )  # only their ratio counts, however small
    assert np.array_equal(asked({one: 1e300, two: 1e300}), named)
    weighted = asked({one: 0.01, two: 5.0})
    assert same(weighted, pixels(model.sample(6, clusters={one: 0.01, two: 5.0}, **GIVEN)))
    assert not same(weighted, named)
    everything = asked(model.names)
    assert same(everything, pixels(model.sample(6, **GIVEN)))
    assert np.array_equal(asked([]), everything) and np.array_equal(asked(None), everything)
    assert not same(asked([one]), asked([two]))


def test_64_requests_at_once_are_answered_as_each_alone(server: Server, model: Model) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"sampler": "heun"},
        {"policy": "full"},
        {"clusters": model.names[:1]},
    ]

    def one(i: int) -> Reply:
        given = {
            "seed": i // 8,
            "first_index": 3 * i,
            "n": 1 + i % 3,
            "steps": 2 + i % 4,
            **kinds[i % 4],
        }
        return server.request("/v1/samples", {**given, "format": "npz", "trace": True})

    alone = [arrays(one(i)) for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = [arrays(reply) for reply in pool.map(one, range(64))]
    for a, b in zip(alone, together, strict=True):
        assert same(a["images"], b["images"])
        assert np.array_equal(a["chosen"], b["chosen"])
        assert a["nfe"] == b["nfe"]


def test_curl_gets_a_png(server: Server, model: Model, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    words = ["--fail", "--silent", "--json", json.dumps(GIVEN), "--output", str(file)]
    subprocess.run(["curl", *words, f"{server.url}/v1/samples"], check=True, timeout=60)
    assert same(image(file.read_bytes())[None], pixels(model.sample(1, **GIVEN)))


# Streams


def test_a_stream_starts_steps_gives_its_images_and_is_done(server: Server, model: Model) -> None:
    given = {**GIVEN, "n": 3, "first_index": 4, "sampler": "heun"}
    expected, trace = model.sample(3, first_index=4, trace=True, **{**GIVEN, "sampler": "heun"})
    reply = server.request(
        "/v1/samples", {**given, "stream": True, "trace": True, "preview_every": 2}
    )
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["ddm-seed"] == "5" and reply.headers["ddm-version"] == model.version
    names, data = zip(*reply.events, strict=True)
    calls = len(trace.t)
    assert (
        calls == 7
    )  # of Heun's method in 4 steps: of 8 at most, because the last step to t = 0 needs no second
    assert list(names) == ["start", *["step"] * 3 * calls, *["image"] * 3, "done"]
    facts = {"seed": 5, "first_index": 4, "version": model.version, "degraded": []}
    shape = {"n": 3, "steps": 4, "nfe_per_image": 8, "experts": model.names, "shape": [1, 8, 8]}
    assert data[0] == {**facts, **shape, "nfe": 0, "router_nfe": 0}
    assert data[-1] == {**facts, "nfe": trace.calls, "router_nfe": trace.router_calls}
    steps = data[1 : 1 + 3 * calls]
    for place in range(3):
        cfg = [step for step in steps if step["index"] == 4 + place]
        assert [step["call"] for step in cfg] == list(range(1, calls + 1))
        assert [step["step"] for step in cfg] == [1, 1, 2, 2, 3, 3, 4]
        np.testing.assert_allclose([step["t"] for step in cfg], trace.t.numpy())
        np.testing.assert_allclose(
            [step["alpha"] for step in cfg], trace.alpha[:, place].numpy(), atol=1e-4
        )
        assert [step["chosen"] for step in cfg] == [
            row.nonzero()[:, 0].tolist() for row in trace.chosen[:, place]
        ]
        assert [step["call"] for step in cfg if "b64_json" in step] == [2, 4, 6]
    finals = data[1 + 3 * calls : -1]
    assert [item["index"] for item in finals] == [4, 5, 6]
    assert np.array_equal(
        decoded(list(finals)), images(server.request("/v1/samples", {**given, "format": "npz"}))
    )
    assert same(decoded(list(finals)), pixels(expected))


def test_the_preview_of_a_last_call_is_the_image_and_the_first_is_not(server: Server) -> None:
    events = server.request(
        "/v1/samples", {**GIVEN, "stream": True}
    ).events  # DDIM to t = 0 ends at what was denoised last
    assert [name for name, _ in events] == [
        "start",
        "step",
        "step",
        "step",
        "step",
        "image",
        "done",
    ]
    previews = decoded([data for name, data in events if name == "step"])
    final = decoded([events[-2][1]])[0]
    assert same(previews[-1], final)
    apart = [np.abs(preview.astype(float) - final).mean() for preview in previews]
    assert apart[0] > 1
    assert "alpha" not in events[1][1]


def test_a_stream_without_previews_or_trace_has_no_steps(server: Server) -> None:
    events = server.request(
        "/v1/samples", {**GIVEN, "n": 2, "stream": True, "preview_every": 0}
    ).events
    assert [name for name, _ in events] == ["start", "image", "image", "done"]


# What else there is


def test_the_service_describes_itself(server: Server, model: Model) -> None:
    card = server.request("/v1/models/small").json
    assert server.request("/v1/models").json == {"object": "list", "data": [card]}
    assert card["clusters"] == model.names and card["version"] == model.version
    assert card["shape"] == [1, 8, 8]
    assert card["shares"] == pytest.approx(model.pi.tolist())
    assert card["limits"] == {"n": 64, "steps": 250}
    assert card["defaults"]["steps"] == 4 and card["defaults"]["sampler"] == "ipndm"
    assert "heun" in card["choices"]["sampler"] and "nucleus" in card["choices"]["policy"]


def test_it_says_that_it_lives_and_is_ready(server: Server, model: Model) -> None:
    assert server.request("/healthz").json == {"status": "ok"}
    reply = server.request("/readyz")
    states = {f"expert-0{k}": "ready" for k in range(3)}
    assert reply.status == 200
    assert reply.json == {"status": "ready", "version": model.version, "experts": states}


def test_the_page_and_the_docs_are_there(server: Server) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/openapi.json", "application/json"),
    ):
        reply = server.request(path)
        assert reply.status == 200 and reply.headers["content-type"].startswith(kind)
    assert server.request("/page/index.html").body == server.request("/").body
    for path in ("/", "/page/main.js", "/page/page.css"):
        assert server.request(path).headers["cache-control"] == "no-cache"


def test_the_docs_refer_to_files_by_relative_urls(server: Server) -> None:
    docs = server.request("/docs").body.decode()
    references = re.findall(r'(?:href|src)="([^"]+)"|url: \'([^\']+)\'', docs)
    files = [one or other for one, other in references]
    assert len(files) == 4
    for file in files:
        assert not file.startswith(("/", "http"))
        assert server.request(f"/{file}").status == 200
    assert server.request("/openapi.json").json["servers"] == [{"url": "./"}]


def test_head_answers_as_get_without_a_body(server: Server) -> None:
    for path in ("/", "/docs", "/healthz", "/readyz", "/v1/models", "/page/main.js"):
        got, head = server.request(path), server.request(path, method="HEAD")
        assert head.status == 200 and head.body == b""
        assert head.headers["content-length"] == got.headers["content-length"]
    refused = server.request("/v1/samples", method="HEAD")
    assert refused.status == 405 and refused.headers["allow"] == "POST"


def test_the_api_says_of_every_path_which_errors_it_has(server: Server) -> None:
    described = server.request("/openapi.json").json
    error = {"$ref": "#/components/schemas/ErrorReply"}
    for path in ("/v1/samples", "/v1/images/generations"):
        responses = described["paths"][path]["post"]["responses"]
        assert {str(status) for status in STATUSES} <= set(responses)
        for status in STATUSES:
            assert responses[str(status)]["content"]["application/json"]["schema"] == error
    assert "HTTPValidationError" not in described["components"]["schemas"]


# Errors


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
        ({"seed": 2**63 - 1}, "seed must be in [0, 2^63 - n), got 9223372036854775807"),
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


# In this process: errors that have to be brought about


class Gate:
    """An expert that answers once it is open, with what it is asked about, or with an error."""

    calls = 1

    def __init__(self, k: int) -> None:
        self.name, self.turn = f"expert-{k:02d}", asyncio.Semaphore(1)
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
        self.service = Service(tree, self.metrics, lambda *_: self.gates)
        self.app = build_app(self.service)

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
        await found.service.start()
        try:
            await test(found)
        finally:
            await found.service.stop()

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
