"""The web page, in headless Chromium: files that it saves, images that it starts from, the next images."""

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.serve.http.browsing import (
    DONE,
    Api,
    needs_chromium,
    pixels,
    same,
    sample,
    shown,
)

pytestmark = needs_chromium


def start_image(folder: Path, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    image.resize(size, Image.Resampling.NEAREST).convert(mode).save(folder / "start.png")
    return folder / "start.png"


def choose(page: Page, file: Path) -> None:
    """As a user does: once the form is there."""
    page.wait_for_selector("#form:not([hidden])")
    page.get_by_label("Start from an image").set_input_files(file)


def images(reply: Any) -> list[np.ndarray]:
    return [pixels(image["b64_json"]) for image in reply["data"]]


def test_next_images_continue_the_seed(page: Page, address: str, api: Api) -> None:
    page.goto(address)
    sample(page, n=3, seed=5)
    for first in (3, 6):
        page.get_by_role("button", name="Next images").click()
        page.wait_for_url(f"**first_index={first}*")
        page.wait_for_selector(DONE)
        assert same(shown(page), images(api(n=3, seed=5, first_index=first)))
        assert page.inner_text("#which").startswith(f"Image {first + 1}:")
    page.goto(page.url)  # the link shows the same
    page.wait_for_selector(DONE)
    assert same(shown(page), images(api(n=3, seed=5, first_index=6)))
    page.get_by_role("button", name="New seed").click()
    page.wait_for_url(lambda url: "seed=5&" not in url)  # the earlier images are done, too
    page.wait_for_selector(DONE)
    assert "first_index" not in page.url


def test_one_image_and_all_can_be_saved(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_text("More settings").click()
    sample(page, n=3, seed=5, first_index=2)
    page.locator(".tile").nth(1).click()
    with page.expect_download() as found:
        page.get_by_role("link", name="Download").click()
    assert found.value.suggested_filename == "small-5-3.png"
    assert np.array_equal(np.asarray(Image.open(found.value.path())), shown(page)[1])
    with page.expect_download() as found:
        page.get_by_role("button", name="Download all").click()
    assert found.value.suggested_filename == "small-5.zip"
    with zipfile.ZipFile(found.value.path()) as file:
        assert file.testzip() is None
        assert file.namelist() == [f"small-5-{index}.png" for index in (2, 3, 4)]
        saved = [np.asarray(Image.open(io.BytesIO(file.read(name)))) for name in file.namelist()]
    assert np.array_equal(saved, shown(page))


@pytest.mark.parametrize("size", [(8, 8), (80, 40)])
def test_samples_start_from_a_chosen_image(
    page: Page, address: str, api: Api, tmp_path: Path, size: tuple[int, int]
) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")
    assert page.get_by_label("Strength").is_hidden()
    choose(page, start_image(tmp_path, size))
    expect(page.locator("#given")).to_be_visible()
    given = page.locator("#given").get_attribute("src") or ""
    assert pixels(given.split(",")[1]).shape[:2] == (8, 8)
    sample(page, n=2, seed=5, strength=0.3)
    asked = api(n=2, seed=5, strength=0.3, image=given.split(",")[1])
    assert same(shown(page), images(asked))
    assert page.locator("#copy").is_hidden() and "?" not in page.url  # no link can hold the image
    page.get_by_role("button", name="Remove").click()
    sample(page)
    expect(page.locator("#copy")).to_be_visible()
    assert same(shown(page), images(api(n=2, seed=5))) and "strength" not in page.url


def test_an_image_can_be_dropped(page: Page, address: str, tmp_path: Path) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")
    data = base64.b64encode(start_image(tmp_path).read_bytes()).decode()
    transfer = page.evaluate_handle(
        """data => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
          transfer.items.add(new File([bytes], "start.png", { type: "image/png" }));
          return transfer;
        }""",
        data,
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("dropping")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#given")).to_be_visible()
    expect(page.locator("body")).not_to_have_class("dropping")


def test_what_is_no_image_is_refused(page: Page, address: str, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    page.goto(address)
    choose(page, tmp_path / "notes.png")
    expect(page.get_by_role("alert")).to_contain_text("notes.png is not an image")
    expect(page.get_by_label("Start from an image")).to_be_focused()
    sample(page, n=1)


def test_transparent_pixels_are_sampled(page: Page, address: str, tmp_path: Path) -> None:
    whole = np.asarray(Image.open(start_image(tmp_path, mode="RGBA"))).copy()
    whole[:, :4, 3] = 0
    Image.fromarray(whole).save(tmp_path / "half.png")
    page.goto(address)
    choose(page, tmp_path / "half.png")
    expect(page.locator("#given")).to_be_visible()
    sample(page, n=1, seed=1)
    (found,) = shown(page)
    assert np.abs(found[:, 4:] - whole[:, 4:, 0]).max() <= 1
    assert np.abs(found[:, :4] - whole[:, :4, 0]).max() > 1


def test_the_api_takes_an_image_in_base64(api: Api, tmp_path: Path) -> None:
    image = base64.b64encode(start_image(tmp_path).read_bytes()).decode()
    near, far = (images(api(seed=1, image=image, strength=s))[0] for s in (0.01, 1.0))
    start = np.asarray(Image.open(tmp_path / "start.png"), dtype=int)
    assert np.abs(near - start).mean() < np.abs(far - start).mean()
    for fields, named in (
        ({"image": "no base64!"}, "image must be a file in base64"),
        ({"image": base64.b64encode(b"text").decode()}, "image must be a PNG, JPEG or WebP"),
        ({"strength": 0.5}, "strength must be left out without an image"),
        ({"image": image, "mask": image}, "mask must be an image with transparent pixels"),
        ({"image": image, "strength": 2.0}, "strength must"),
    ):
        assert named in api(**fields)["error"]["message"], json.dumps(fields)
