"""Edits and variations, by the public client of OpenAI's API and by hand."""

import base64
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import ExifTags, Image

from ddm.errors import ConfigError
from serve import Model, load
from serve.http.uploads import fitted, read_image
from tests.serve.conftest import Server, Start

STEPS = 4


@pytest.fixture(scope="module")
def server(small_run: Path, start_once: Start) -> Server:
    return start_once(small_run, f"sample.steps={STEPS}", "serve.limits.upload_bytes=100000")


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.fixture(scope="module")
def image(model: Model) -> np.ndarray[Any, Any]:
    return ((model.sample(1, seed=8, steps=9)[0, 0].numpy() + 1) * 127.5).round().astype(np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def half_transparent(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The left half transparent: it is to be sampled."""
    alpha = np.full_like(pixels, 255)
    alpha[:, : pixels.shape[1] // 2] = 0
    return np.stack([pixels, pixels, pixels, alpha], axis=2)


def decoded(answer: Any) -> list[np.ndarray[Any, Any]]:
    files = [base64.b64decode(each.b64_json) for each in answer.data]
    return [np.array(Image.open(io.BytesIO(file))) for file in files]


def close(found: np.ndarray[Any, Any], expected: torch.Tensor) -> bool:
    wanted = (expected[0].double().numpy() + 1) * 127.5
    return bool(np.abs(found.astype(float) - wanted).max() <= 1)


def test_an_edit_samples_the_transparent_pixels_and_keeps_the_others(
    client: openai.OpenAI, model: Model, image: np.ndarray[Any, Any]
) -> None:
    extra = {"seed": 3, "resamplings": 2}
    whole = half_transparent(image)
    by_mask = client.images.edit(
        image=("a.png", png(image)), mask=("m.png", png(whole)), prompt="", n=2, extra_body=extra
    )
    mask = torch.zeros(image.shape)
    mask[:, : image.shape[1] // 2] = 1
    start = torch.from_numpy(image).float()[None] / 127.5 - 1
    expected = model.sample(2, seed=3, steps=STEPS, image=start, mask=mask, resamplings=2)
    for found, wanted in zip(decoded(by_mask), expected, strict=True):
        assert close(found, wanted)
        half = image.shape[1] // 2
        assert (found[:, half:] == image[:, half:]).all() and (found != image).any()


def test_a_variation_starts_from_the_image(
    client: openai.OpenAI, model: Model, image: np.ndarray[Any, Any]
) -> None:
    start = torch.from_numpy(image).float()[None] / 127.5 - 1
    for strength in (None, 0.3):
        extra = {"seed": 3} | ({} if strength is None else {"strength": strength})
        with pytest.warns(DeprecationWarning, match="deprecated"):  # the client prefers edits
            answer = client.images.create_variation(image=("a.png", png(image)), extra_body=extra)
        expected = model.sample(1, seed=3, steps=STEPS, image=start, strength=strength)
        assert close(decoded(answer)[0], expected[0])


def test_photos_are_cut_to_their_middle_and_averaged(image: np.ndarray[Any, Any]) -> None:
    photo = np.repeat(np.repeat(image, 9, 0), 9, 1)
    wide = np.pad(photo, ((0, 0), (40, 40)))
    for pixels in (photo, wide, np.stack([photo] * 3, axis=2)):
        found, alpha = fitted(read_image(png(pixels), "image"), [1, *image.shape])
        assert alpha is None
        assert np.abs((found[0].numpy() + 1) * 127.5 - image).max() < 1.01


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(ExifTags.Base.XResolution, 2, b"a"), (ExifTags.Base.ResolutionUnit, 4, b"\0\0\1\0")],
)
def test_metadata_of_a_wrong_type_is_refused(tag: int, kind: int, value: bytes) -> None:
    entries = [(ExifTags.Base.Orientation, 3, 1, b"\6"), (tag, kind, 1, value)]
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "JPEG", exif=exif)
    with pytest.raises(ConfigError, match="image must be a PNG, JPEG or WebP image .*, got"):
        read_image(file.getvalue(), "image")


def test_sixteen_bits_are_scaled_to_eight(image: np.ndarray[Any, Any]) -> None:
    found, _ = fitted(read_image(png(image.astype(np.uint16) * 257), "image"), [1, *image.shape])
    assert close(image, found)


@pytest.mark.parametrize(("width", "fits"), [(8, True), (16, True), (9, False), (80, False)])
def test_a_mask_has_the_proportions_of_its_image(
    server: Server, image: np.ndarray[Any, Any], width: int, fits: bool
) -> None:
    mask = half_transparent(np.zeros((width if fits else 40, width), np.uint8))
    found = {"image": png(image), "mask": png(mask)}
    body = {name: base64.b64encode(file).decode() for name, file in found.items()}
    reply = server.request("/v1/samples", {**body, "n": 1})
    assert reply.status == (200 if fits else 422)
    said = f"mask must have the proportions of the image, 8x8, got '{width}x40'"
    assert fits or reply.error["message"] == said


def test_the_size_of_an_image_that_is_too_large_is_said() -> None:
    with pytest.raises(ConfigError, match=r"of at most 16777216 pixels, got \(5000, 4000\)"):
        read_image(png(np.zeros((4000, 5000), np.uint8)), "image")


def test_an_edit_may_be_streamed(client: openai.OpenAI, image: np.ndarray[Any, Any]) -> None:
    events = client.images.edit(
        image=("a.png", png(image)), prompt="", stream=True, partial_images=1
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed" and "image_edit.partial_image" in kinds


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": b"GIF89a"}, "image must be a PNG, JPEG or WebP image"),
        ({"strength": "2"}, "strength must be a number in (0, 1], got"),
        ({"n": "many"}, "n must be a whole number"),
        ({"wait": "1"}, "'wait' is not a field of this request"),
        ({"clusters": "[1"}, "clusters must be text or JSON"),
        ({"mask": None}, "mask must be an image with transparent pixels"),
    ],
)
def test_a_bad_edit_is_refused_by_its_field(
    client: openai.OpenAI, image: np.ndarray[Any, Any], fields: dict[str, Any], said: str
) -> None:
    file = png(image)
    files = {"image": ("a.png", fields.get("image") or file)}
    if "mask" in fields:
        files["mask"] = ("m.png", file)
    extra = {name: value for name, value in fields.items() if name not in ("image", "mask")}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.images.edit(**files, prompt="", extra_body=extra)
    assert said in str(refused.value)


def test_bodies_that_are_no_form_are_refused(server: Server) -> None:
    for body, kind in ((b"{}", "application/json"), (b"x", "multipart/form-data; boundary=y")):
        reply = server.request("/v1/images/edits", body, {"content-type": kind})
        assert (reply.status, reply.error["type"]) == (422, "invalid_value")
    reply = server.request("/v1/images/variations", b"x" * 100_001, {"content-type": "a/b"})
    assert reply.status == 413
