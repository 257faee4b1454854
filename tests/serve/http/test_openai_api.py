"""The public client of OpenAI's API, unchanged, against a server that asks for a token."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ImagesResponse
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent
from PIL import Image

from serve import Model, load
from tests.serve.conftest import JSON, Server, Start, pixels, same

TOKEN = "sesame"
EXTRA = {"seed": 3, "steps": 6}


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(f"{TOKEN}\n")
    words = [
        f"serve.token_file={file}",
        "serve.limits.pending=16000",
        "serve.max_batch=4",
        "sample.steps=4",
    ]
    return start_once(small_run, *words)


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as found:
        yield found


def decoded(b64: str | None, form: str = "PNG") -> np.ndarray[Any, Any]:
    assert b64 is not None
    with Image.open(io.BytesIO(base64.b64decode(b64))) as file:
        assert file.format == form
        return np.array(file.convert("L"))[:, :, None]


def images(answer: ImagesResponse, form: str = "PNG") -> np.ndarray[Any, Any]:
    assert answer.data is not None
    return np.stack([decoded(image.b64_json, form) for image in answer.data])


def test_it_gets_the_images_of_load_and_sample(client: openai.OpenAI, model: Model) -> None:
    answer = client.images.generate(
        prompt="", n=3, model="small", response_format="b64_json", extra_body=EXTRA
    )
    assert same(images(answer), pixels(model.sample(3, **EXTRA)))
    assert answer.output_format == "png" and answer.size == "8x8" and answer.background == "opaque"
    assert (
        answer.usage is not None
        and answer.usage.output_tokens == answer.usage.total_tokens == 3 * 6
    )
    assert answer.created > 1_700_000_000


def test_what_it_leaves_out_is_one_image_of_the_services_own_settings(
    client: openai.OpenAI, model: Model
) -> None:
    raw = client.images.with_raw_response.generate(prompt="")
    seed = int(raw.headers["ddm-seed"])
    assert raw.headers["ddm-version"] == model.version and raw.headers["ddm-nfe"] == "4"
    assert same(images(raw.parse()), pixels(model.sample(1, seed=seed, steps=4)))


def test_its_prompt_names_a_cluster(client: openai.OpenAI, model: Model) -> None:
    for name in model.names:
        found = images(client.images.generate(prompt=name, n=4, extra_body=EXTRA))
        assert same(found, pixels(model.sample(4, clusters={name: 1.0}, **EXTRA)))


def test_another_prompt_is_refused_with_the_clusters_there_are(
    client: openai.OpenAI, model: Model
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(
            prompt="a cat\n\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
        )
    assert caught.value.param == "prompt" and caught.value.code == "invalid_value"
    assert all(repr(name) in caught.value.message for name in model.names)
    assert "got 'a cat\\n\\U0001f600'" in caught.value.message
    with pytest.raises(
        openai.UnprocessableEntityError, match="prompt must be empty where clusters are given"
    ):
        client.images.generate(prompt=model.names[0], extra_body={"clusters": model.names[1:]})


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_it_gets_files_of_the_kind_that_it_asks_for(
    client: openai.OpenAI, model: Model, form: Any
) -> None:
    answer = client.images.generate(prompt="", output_format=form, size="auto", extra_body=EXTRA)
    found = images(answer, form.upper())
    assert answer.output_format == form
    expected = pixels(model.sample(1, **EXTRA))
    if form == "jpeg":
        assert np.abs(found.astype(float) - expected).mean() < 15
    else:
        assert same(found, expected)


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_output_compression_is_the_quality_of_the_file(
    client: openai.OpenAI, model: Model, form: Any
) -> None:
    exact = pixels(model.sample(1, **EXTRA)).astype(float)

    def error(quality: int) -> float:
        answer = client.images.generate(
            prompt="", output_format=form, output_compression=quality, extra_body=EXTRA
        )
        return float(np.abs(images(answer, form.upper()) - exact).mean())

    assert error(100) < error(5)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"output_compression": 50}, "have a webp or jpeg format, got 50"),
        ({"background": "transparent"}, "be one of auto opaque, got 'transparent'"),
        ({"quality": "hd"}, "be one of auto standard, got 'hd'"),
        ({"partial_images": 2}, "be 0 unless stream is true, got 2"),
        ({"style": "vivid"}, None),
    ],
)
def test_options_without_effect_are_refused_by_name(
    client: openai.OpenAI, given: dict[str, Any], rule: str | None
) -> None:
    (name,) = given
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.images.generate(prompt="", extra_body=EXTRA, **given)
    assert refused.value.param == name
    assert rule is None or f"{name} must {rule}" in refused.value.message


def test_options_with_one_meaning_are_taken(client: openai.OpenAI, model: Model) -> None:
    answer = client.images.generate(
        prompt="",
        background="opaque",
        quality="standard",
        moderation="low",
        user="someone",
        extra_body=EXTRA,
    )
    assert same(images(answer), pixels(model.sample(1, **EXTRA)))


def test_it_hears_of_partial_images_in_its_own_events(client: openai.OpenAI, model: Model) -> None:
    plain = images(client.images.generate(prompt="", extra_body=EXTRA))[0]
    with client.images.generate(
        prompt="", stream=True, partial_images=2, extra_body=EXTRA
    ) as stream:
        assert stream.response.headers["ddm-seed"] == "3"
        assert stream.response.headers["ddm-version"] == model.version
        *partial, last = stream
    assert [type(event) for event in partial] == [ImageGenPartialImageEvent] * 2
    assert isinstance(last, ImageGenCompletedEvent)
    for event in (*partial, last):  # every field of the client's types is there, and of its type
        assert type(event).model_validate(
            event.to_dict(), strict=True, extra="forbid", context=None
        )
    assert [
        event.partial_image_index
        for event in partial
        if event.type == "image_generation.partial_image"
    ] == [0, 1]
    assert np.array_equal(decoded(last.b64_json), plain)
    apart = [np.abs(decoded(event.b64_json).astype(float) - plain).mean() for event in partial]
    assert all(value > 0.5 for value in apart)
    assert last.usage.output_tokens == 6


def test_it_hears_of_every_image_of_a_stream(client: openai.OpenAI, model: Model) -> None:
    with client.images.generate(prompt="", n=3, stream=True, extra_body=EXTRA) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    assert same(
        np.stack([decoded(event.b64_json) for event in events]), pixels(model.sample(3, **EXTRA))
    )


def test_it_lists_and_retrieves_the_model(client: openai.OpenAI, model: Model) -> None:
    (only,) = client.models.list()
    assert only.id == "small" and only.owned_by == "ddm" and only.object == "model"
    assert client.models.retrieve("small") == only
    assert only.to_dict()["clusters"] == model.names


def test_errors_are_its_own_exceptions(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(
        openai.NotFoundError, match="model must be 'small', got 'dall-e-3'"
    ) as missing:
        client.images.generate(prompt="", model="dall-e-3")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    for given in (
        {"n": 0},
        {"n": 65},
        {"size": "1024x1024"},
        {"response_format": "url"},
        {"extra_body": {"steps": 0}},
    ):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.images.generate(prompt="", **given)  # type: ignore[call-overload]
        assert refused.value.param == next(iter(given.get("extra_body", given)))
    with pytest.raises(
        openai.UnprocessableEntityError, match="size must be auto or 8x8, got '1024x1024'"
    ):
        client.images.generate(prompt="", size="1024x1024")
    with pytest.raises(openai.BadRequestError):
        client.post("/images/generations", cast_to=object, content=b"{", options={"headers": JSON})
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"),
    ):
        other.models.list()


def test_too_much_at_once_is_its_rate_limit_error(client: openai.OpenAI, server: Server) -> None:
    connection = server.connect()
    body = b'{"n": 64, "steps": 250, "stream": true, "trace": true}'
    connection.request("POST", "/v1/samples", body, {**JSON, "authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    try:
        assert any(line == b"event: step\n" for line in answer)  # it is under way
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="", extra_body={"steps": 1})
        assert caught.value.code == "busy"
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        answer.close()
        connection.close()
