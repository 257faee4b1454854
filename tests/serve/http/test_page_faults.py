"""The web page, in headless Chromium: refusals, links that do not fit, and streams that end early."""

import base64
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.serve.http.browsing import (
    DONE,
    Api,
    behind_prefix,
    click_sample,
    fill,
    needs_chromium,
    pixels,
    same,
    sample,
    served,
    shown,
    strip,
)

pytestmark = needs_chromium

PHONE = {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True}


def answer(page: Page, events: str) -> None:
    """Let requests for samples be answered by a `start` of one image in 4 steps, a comment, and these events."""
    start = {
        "seed": 1,
        "version": "0",
        "n": 1,
        "first_index": 0,
        "steps": 4,
        "nfe_per_image": 4,
        "experts": ["a", "b"],
        "shape": [1, 8, 8],
    }
    body = f"event: start\ndata: {json.dumps(start)}\n\n: keep-alive\n\n{events}"
    page.route(
        "**/v1/samples", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )


def test_link_to_another_version_warns(page: Page, address: str) -> None:
    page.goto(f"{address}/?n=1&seed=1&version=0123456789ab")
    page.wait_for_selector(DONE)
    assert "version 0123456789ab" in page.inner_text("#note")
    sample(page)
    assert page.inner_text("#note") == ""


@pytest.mark.parametrize(
    ("image", "at", "heading", "time"),
    [("-5", "-3", "Image 1:", "Step 1 of 6"), ("99", "99", "Image 2:", "Finished"), ("x", "1.9", "Image 1:", "Step 2 of 6")],
)  # fmt: skip
def test_link_with_a_bad_selection_shows_the_nearest_one(
    page: Page, address: str, image: str, at: str, heading: str, time: str
) -> None:
    page.goto(f"{address}/?n=2&seed=1&image={image}&at={at}")
    page.wait_for_selector(DONE)
    assert page.inner_text("#which").startswith(heading)
    assert page.inner_text("#when").startswith(time)


@pytest.mark.parametrize("field", ["n", "t_min"])
def test_a_phone_shows_the_error_beside_its_field(
    new_page: Callable[..., Page], address: str, field: str
) -> None:
    page = new_page(**PHONE)
    page.goto(address)
    page.get_by_text("More settings").click()
    fill(page, **{field: 99999})
    page.locator("#form").evaluate("form => form.requestSubmit()")
    expect(page.get_by_role("alert")).to_contain_text(f"{field} must")
    expect(page.get_by_role("alert")).to_be_in_viewport(ratio=1)
    expect(page.locator(f"[name={field}]")).to_be_in_viewport(ratio=1)
    if folder := os.environ.get("DDM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"phone-{field}.png")


def test_a_phone_shows_an_error_of_no_field(new_page: Callable[..., Page], address: str) -> None:
    page = new_page(**PHONE)
    page.goto(address)
    page.get_by_text("More settings").click()
    answer(
        page, 'event: error\ndata: {"error": {"message": "expert 2 is away", "param": null}}\n\n'
    )
    page.locator("#form").evaluate("form => form.requestSubmit()")
    expect(page.get_by_role("alert")).to_have_text("expert 2 is away")
    expect(page.get_by_role("alert")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("steps", 9999), ("seed", "seven"), ("seed", -1), ("t_min", 1)]
)
def test_refused_value_shows_the_api_error_and_focuses_its_field(
    page: Page, address: str, api: Api, field: str, value: Any
) -> None:
    page.goto(address)
    sample(page, n=1, seed=1)
    before = page.url
    page.get_by_text("More settings").click()
    fill(page, **{field: value})
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text(api(**{field: value})["error"]["message"])
    expect(page.locator(f"[name={field}]")).to_be_focused()
    assert page.locator(f"[name={field}]").get_attribute("aria-invalid") == "true"
    assert (
        page.url == before and page.locator(".tile").count() == 1
    )  # the earlier samples and their link stay
    sample(page, **{field: {"n": 2, "steps": 3, "seed": 5, "t_min": 0}[field]})
    assert (
        page.get_by_role("alert").inner_text() == "" and page.locator("[aria-invalid]").count() == 0
    )


def test_link_with_an_unknown_choice_shows_the_api_error(
    page: Page, address: str, api: Api
) -> None:
    page.goto(f"{address}/?seed=1&policy=magic")
    expect(page.get_by_role("alert")).to_have_text(api(policy="magic")["error"]["message"])
    field = page.locator("[name=policy]")
    expect(field).to_be_focused()
    assert field.get_attribute("aria-describedby") == "alert hint"
    sample(page, policy="full")
    assert field.get_attribute("aria-describedby") == "hint"


def test_deselecting_every_cluster_is_refused(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_text("More settings").click()
    for box in page.locator("[name=clusters]").all():
        box.uncheck()
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("clusters must")
    expect(page.locator("[name=clusters]").first).to_be_focused()


def test_stop_cancels_the_request_on_the_server(page: Page, address: str) -> None:
    def pending() -> float:
        with urlopen(f"{address}/metrics", timeout=10) as reply:
            return float(
                re.search(
                    r"^ddm_pending_cost(?:{.*})? (\S+)$", reply.read().decode(), re.MULTILINE
                )[1]
            )

    page.goto(address)
    fill(page, n=64, steps=1000, seed=1, policy="full")  # long enough to be stopped
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_selector(".tile img:not([hidden])")
    assert pending() > 0
    overflows = (
        "all => all.filter(node => node.scrollWidth > node.clientWidth).map(node => node.id)"
    )
    assert page.locator("button:visible").evaluate_all(overflows) == []
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#sample")).to_be_focused()
    assert page.locator("#stop").is_hidden() and page.get_by_role("alert").inner_text() == ""
    until = time.monotonic() + 10
    while pending() and time.monotonic() < until:
        time.sleep(0.05)
    assert pending() == 0
    sample(page, n=2, steps=3)  # the page can be used again
    assert page.locator(".tile").count() == 2


def test_new_seed_replaces_the_request_in_progress(page: Page, address: str, api: Api) -> None:
    page.goto(address)
    fill(page, n=64, steps=1000, seed=1, policy="full")  # it is still in progress
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_selector(".tile img:not([hidden])")
    fill(page, n=2, steps=3, policy="switching")
    page.get_by_role("button", name="New seed").click()
    page.wait_for_selector(DONE)
    seed = int(page.locator("#seed").input_value())
    assert seed != 1 and same(
        shown(page), [pixels(p["b64_json"]) for p in api(n=2, steps=3, seed=seed)["data"]]
    )


def test_a_refused_request_ends_the_one_that_it_replaced(page: Page, address: str) -> None:
    page.goto(address)
    fill(page, n=64, steps=1000, seed=1, policy="full")  # it is still in progress
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_selector(".tile img:not([hidden])")
    fill(page, steps=99999)
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("steps must be")
    expect(page.locator("#status")).to_have_text("Not finished.")


def test_a_token_that_no_header_can_carry_is_asked_for_again(
    new_page: Callable[..., Page], small_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("open-sesame\n")
    with served(small_run, tmp_path / "log", f"serve.token_file={tmp_path / 'token'}") as address:
        page = new_page()
        page.goto(address)
        page.get_by_label("Token").fill("open\u2026")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("A token has characters of ASCII alone.")
        page.get_by_label("Token").fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#form")).to_be_visible()


@pytest.mark.parametrize("policy", ["stochastic", "fixed"])
def test_steps_that_the_server_skipped_have_no_experts(
    page: Page, address: str, policy: str
) -> None:
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    png = base64.b64encode(image.getvalue()).decode()
    events = [
        ("step", {"index": 0, "step": 1, "call": 1, "t": 1.0, "alpha": [0.3, 0.7], "chosen": [0], "b64_json": png}),
        ("step", {"index": 0, "step": 4, "call": 4, "t": 0.25, "alpha": [0.9, 0.1], "chosen": [1], "b64_json": png}),
        ("image", {"index": 0, "b64_json": png}),
        ("done", {"nfe": 4, "degraded": []}),
    ]  # fmt: skip
    answer(page, "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events))
    page.goto(f"{address}/?seed=1&policy={policy}")
    page.wait_for_selector(DONE)
    assert "4 NFE per image (all experts: 8)" in page.inner_text("#status")
    assert strip(page, 0) == [{0}, set(), set(), {1}]
    assert page.inner_text("#which") == ("Image 1: b" if policy == "fixed" else "Image 1: a")
    page.locator("#at").fill("2")
    assert page.inner_text("#when") == "Step 3 of 4, t = 0.25.\nDenoised by unknown experts."
    assert page.inner_text("#which") == "Image 1: a"  # the most likely one


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (
            'event: error\ndata: {"error": {"message": "expert 2 is away", "param": null}}\n\n',
            "expert 2 is away",
        ),
        ("", "the response ended before the images were finished"),
    ],
)
def test_failed_stream_shows_its_error(page: Page, address: str, tail: str, message: str) -> None:
    answer(page, tail)
    page.goto(f"{address}/?seed=1")
    expect(page.get_by_role("alert")).to_have_text(message)
    assert page.inner_text("#status") == "Not finished." and page.locator("#stop").is_hidden()


def test_token_opens_the_page_and_stays_out_of_links(
    new_page: Callable[..., Page], small_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("open-sesame\n")
    with served(small_run, tmp_path / "log", f"serve.token_file={tmp_path / 'token'}") as address:
        page = new_page()
        prefix, outside = behind_prefix(page, address)
        page.goto(f"{prefix}/?n=2&seed=1&steps=3")
        expect(page.get_by_label("Token")).to_be_focused()
        assert page.locator("#form").is_hidden()
        page.keyboard.type("a guess")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server refused this token.")
        page.get_by_label("Token").fill("open-sesame")
        page.get_by_role("button", name="Open").click()
        page.wait_for_selector(DONE)  # the link is sampled
        assert page.locator(".tile").count() == 2 and page.locator("#gate").is_hidden()
        assert "sesame" not in page.url and page.evaluate("localStorage.length") == 0
        page.reload()
        page.wait_for_selector(DONE)  # this tab keeps the token
        page.evaluate("sessionStorage.clear()")
        click_sample(page)
        page.get_by_label("Token").fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#gate")).to_be_hidden()
        page.wait_for_selector(DONE)
        assert outside == []
