"""The HTTP API: images, streams, and what it says of itself."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import Model, load
from tests.serve.conftest import Reply, Server, Start, pixels, same
from tests.serve.http.app_answers import GIVEN, STATUSES, arrays, decoded, image, images


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    return start_once(small_run, "sample.steps=4")


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


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
    assert card["weights"] == pytest.approx(model.pi.tolist())
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
