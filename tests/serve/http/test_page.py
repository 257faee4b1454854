"""The web page, in headless Chromium, against a server in another process."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright

PAGE = Path(__file__).parents[3] / "serve" / "http" / "page"
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH"),
]

DONE = "#copy:not([hidden])"  # the link appears when the images are finished
Api = Callable[..., Any]


@contextmanager
def served(run: Path, log: Path, *words: str) -> Iterator[str]:
    """Serve a run in a new process; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "serve",
        str(run),
        f"serve.port={port}",
        "serve.device=cpu",
        *words,
    ]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ) as server,
    ):
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()
                try:
                    with urlopen(f"{address}/readyz", timeout=5):
                        break
                except OSError:  # not listening yet, or too busy to respond
                    time.sleep(0.1)
            else:
                pytest.fail(f"not ready after a minute: {log.read_text()}")
            yield address
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def address(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(small_run, tmp_path_factory.mktemp("serve") / "log", "sample.steps=6") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Playwright runs an event loop in this thread, so it must end with this module.
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`new_page(**context)`: a page in a fresh context. Its errors and console messages fail the test.

    Exempt are the messages about refusals of the API.
    """
    contexts, wrong = [], []

    def opened(**settings: Any) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    refusal = re.compile(
        r"error: Failed to load resource: the server responded with a status of 4\d\d"
    )
    assert [text for text in wrong if not refusal.match(text)] == []


@pytest.fixture
def page(new_page: Callable[..., Page]) -> Page:
    return new_page()


@pytest.fixture
def api(address: str) -> Api:
    """`api(**fields)`: the API's response, in JSON."""

    def post(**fields: Any) -> Any:
        body = json.dumps({"format": "b64_json", "trace": True, **fields}).encode()
        request = Request(f"{address}/v1/samples", body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as reply:
                return json.load(reply)
        except HTTPError as error:
            with error:
                return json.load(error)

    return post


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))), dtype=int)


def shown(page: Page) -> list[np.ndarray]:
    sources = page.locator("#gallery img").evaluate_all("all => all.map(image => image.src)")
    return [pixels(source.removeprefix("data:image/png;base64,")) for source in sources]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Equal to one level: the rest of the batch may change the last bits of an image."""
    return len(ours) == len(theirs) and all(
        np.abs(a - b).max() <= 1 for a, b in zip(ours, theirs, strict=True)
    )


def strip(page: Page, index: int) -> list[set[int]]:
    """The experts used at each step of an image, from the geometry of its strip."""
    paths = page.locator(".tile").nth(index).locator("svg path")
    cells = [(int(step), int(row)) for d in paths.evaluate_all("all => all.map(path => path.getAttribute('d'))")
             for step, row in re.findall(r"M(\d+) (\d+)h", d)]  # fmt: skip
    return [{k for at, k in cells if at == step} for step in range(max(at for at, _ in cells) + 1)]


def fill(page: Page, **fields: Any) -> None:
    for name, value in fields.items():
        field = page.locator(f"[name={name}]")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(str(value))
        else:
            field.fill(str(value))


def sample(page: Page, **fields: Any) -> None:
    fill(page, **fields)
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_selector(DONE)


def upper_edge(page: Page, band: int) -> np.ndarray:
    """The upper edge of a band of the chart: x in pixels and the value, `[points, 2]`."""
    path = page.locator("#chart .band").nth(band).get_attribute("d") or ""
    points = np.asarray([point.split() for point in path.strip("MZ").split("L")], dtype=float)
    upper = points[: len(points) // 2]
    return np.stack([upper[:, 0], (upper[:, 1] - 6) / 150], axis=1)


def test_images_match_the_api_and_show_the_most_likely_expert(
    page: Page, address: str, api: Api
) -> None:
    page.goto(address)
    sample(page, n=5, seed=7, steps=6, sampler="heun", policy="stochastic", source="analytic")
    response = api(n=5, seed=7, steps=6, sampler="heun", policy="stochastic", source="analytic")
    assert same(shown(page), [pixels(image["b64_json"]) for image in response["data"]])
    likeliest = np.asarray(response["trace"]["alpha"])[-1].argmax(axis=1)
    assert len(set(likeliest)) > 1
    assert page.locator(".tile .name").all_inner_texts() == [
        response["trace"]["experts"][k] for k in likeliest
    ]
    assert "3 experts" in page.inner_text("#model")
    assert response["version"][:12] in page.inner_text("#model")


@pytest.mark.parametrize("policy", ["balanced", "top_k", "full", "fixed"])
def test_strip_shows_the_experts_of_each_step(
    page: Page, address: str, api: Api, policy: str
) -> None:
    page.goto(address)
    fill(page, policy=policy)
    assert page.locator("[name=top_k]").is_visible() == (policy == "top_k")
    more = {"top_k": 2} if policy == "top_k" else {}
    sample(page, n=3, seed=1, **more)
    trace = api(n=3, seed=1, policy=policy, **more)["trace"]
    for i in range(3):
        assert strip(page, i) == [set(np.flatnonzero(step[i])) for step in trace["chosen"]]
    if policy == "fixed":  # the tile keeps the sampled expert, whatever alpha is
        assert page.locator(".tile .name").all_inner_texts() == [
            trace["experts"][np.argmax(row)] for row in trace["chosen"][0]
        ]


def test_chart_and_table_match_the_trace_of_the_selected_image(
    page: Page, address: str, api: Api
) -> None:
    page.goto(address)
    sample(page, n=3, seed=5, policy="stochastic")
    page.locator(".tile").nth(2).click()
    page.get_by_text("Show as a table").click()
    trace = api(n=3, seed=5, policy="stochastic")["trace"]
    expect(page.locator("#table tr")).to_have_count(7)
    chosen, alpha = np.asarray(trace["chosen"])[:, 2], np.asarray(trace["alpha"])[:, 2]
    marks = page.locator("#chart .marks").evaluate_all(
        "all => all.map(path => path.getAttribute('d').split('M').length - 1)"
    )
    assert marks == chosen.sum(axis=0).tolist()
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#table tr").all()[1:]]
    assert np.allclose([[float(cell) for cell in row[3:]] for row in rows], alpha, atol=6e-4)
    assert np.allclose([float(row[1]) for row in rows], trace["t"], atol=6e-4)
    assert [row[2] for row in rows] == [trace["experts"][np.argmax(row)] for row in chosen]
    assert page.locator("#chart").inner_text().split("alpha")[1].count("×") == 3
    assert np.allclose(upper_edge(page, band=1)[:, 1], alpha[:, 0], atol=2e-3)


@pytest.mark.parametrize(("source", "held"), [("posterior", True), ("derivative", False)])
def test_chart_holds_alpha_where_the_expert_is_kept(
    page: Page, address: str, api: Api, source: str, held: bool
) -> None:
    page.goto(address)
    settings = {"n": 1, "seed": 5, "policy": "switching", "switch_rate": 4, "source": source}
    page.get_by_text("More settings").click()
    sample(page, **settings)
    alpha = np.asarray(api(**settings)["trace"]["alpha"])[:, 0, 0]
    assert len(set(alpha)) > 1
    x, upper = upper_edge(page, band=1).T
    if held:  # at each later step first the old value, then the new
        assert np.array_equal(x[1::2], x[2::2]) and len(set(x)) == len(alpha)
        assert np.allclose(upper[1::2], alpha[:-1], atol=2e-3)
        upper = upper[::2]
    assert np.allclose(upper, alpha, atol=2e-3)


def test_heun_counts_steps_and_nfe_apart(page: Page, address: str, api: Api) -> None:
    page.goto(address)
    sample(page, n=2, seed=7, steps=6, sampler="heun", policy="stochastic")
    # Two evaluations per step, except in the last one, which ends at t = 0.
    assert "6 steps, 11 NFE per image (all experts: 33)" in page.inner_text("#status")
    assert page.inner_text("#when").startswith("Finished after 6 steps.")
    assert page.locator("#at").get_attribute("max") == "6"
    progress = page.locator("#progress").evaluate("bar => [bar.value, bar.max]")
    assert progress == [12, 12]  # steps of two images
    trace = api(n=2, seed=7, steps=6, sampler="heun", policy="stochastic")["trace"]
    first_of_step = slice(None, None, 2)
    chosen = np.asarray(trace["chosen"])[first_of_step]
    for i in range(2):
        assert strip(page, i) == [set(np.flatnonzero(row)) for row in chosen[:, i]]
    page.get_by_text("Show as a table").click()
    expect(page.locator("#table tr")).to_have_count(7)
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#table tr").all()[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert np.allclose([float(row[1]) for row in rows], trace["t"][first_of_step], atol=6e-4)
    alpha = np.asarray(trace["alpha"])[first_of_step, 0]
    assert np.allclose([[float(cell) for cell in row[3:]] for row in rows], alpha, atol=6e-4)


def test_slider_shows_the_preview_of_that_step(page: Page, address: str) -> None:
    page.goto(address)
    sample(page, n=2, seed=3)
    body = json.dumps(
        {"n": 2, "seed": 3, "stream": True, "trace": True, "preview_every": 1}
    ).encode()
    with urlopen(
        Request(f"{address}/v1/samples", body, {"Content-Type": "application/json"}), timeout=60
    ) as reply:
        events = [
            json.loads(line[6:])
            for line in reply.read().decode().splitlines()
            if line.startswith("data: ")
        ]
    steps = sorted((e["index"], e["b64_json"]) for e in events if e.get("call") == 3)
    page.locator("#at").fill("2")
    assert same(shown(page), [pixels(b64) for _, b64 in steps])
    assert "Step 3 of 6" in page.inner_text("#when")
    assert page.locator("#at").get_attribute("aria-valuetext") == "step 3 of 6, t = 0.43"
    page.get_by_role("button", name="Play").click()  # plays to the end, then can be played again
    expect(page.locator("#at")).to_have_attribute("aria-valuetext", "finished")
    expect(page.locator("#play")).to_have_text("Play")


def test_link_reproduces_the_samples_and_the_selection(
    new_page: Callable[..., Page], address: str
) -> None:
    first = new_page(permissions=["clipboard-read", "clipboard-write"])
    first.goto(address)
    first.get_by_text("More settings").click()
    first.locator("[name=clusters]").first.uncheck()
    sample(
        first, n=4, steps=5, policy="stochastic", grid="quadratic"
    )  # the server chooses the seed
    assert all(0 not in step for i in range(4) for step in strip(first, i))
    first.locator(".tile").nth(2).click()
    first.locator("#at").fill("3")
    first.get_by_role("button", name="Copy link").click()
    expect(first.locator("#copy")).to_have_text("Copied")
    link = first.evaluate("navigator.clipboard.readText()")
    assert link == first.url

    second = new_page()
    second.goto(link)
    second.wait_for_selector(DONE)
    assert same(shown(second), shown(first))
    for what in ("#which", "#when", "#alphas"):
        assert second.inner_text(what) == first.inner_text(what)
    assert [strip(second, i) for i in range(4)] == [strip(first, i) for i in range(4)]
    assert second.inner_text("#note") == ""
    second.wait_for_timeout(300)
    assert second.url == link


def test_63_bit_seed_keeps_its_digits(page: Page, address: str, api: Api) -> None:
    seed = 2**63 - 101
    page.goto(f"{address}/?n=1&seed={seed}")
    page.wait_for_selector(DONE)
    assert same(shown(page), [pixels(api(seed=seed)["data"][0]["b64_json"])])
    expect(page).to_have_url(re.compile(f"seed={seed}&"))


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


def test_every_choice_is_explained(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")
    for name in ("policy", "source"):
        choices = page.locator(f"[name={name}] option").all_inner_texts()
        assert len(choices) > 4
        for choice in choices:
            fill(page, **{name: choice})
            assert f"{choice}: " in page.inner_text("#hint")


def test_keyboard_reaches_everything(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")

    def on(selector: str) -> bool:
        return page.evaluate("selector => document.activeElement.matches(selector)", selector)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if on(selector):
                return
        pytest.fail(f"Tab does not reach {selector}")

    tab_to("[name=n]")
    page.keyboard.type("6")
    tab_to("[name=seed]")
    page.keyboard.type("4")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    tab_to("#at")
    page.keyboard.press("Home")
    assert "Step 1 of 6" in page.inner_text("#when")
    page.keyboard.press("End")
    tab_to(".tile")
    assert page.locator(".tile[tabindex='0']").count() == 1
    for key, which in (
        ("ArrowRight", 2),
        ("End", 6),
        ("ArrowRight", 6),
        ("ArrowLeft", 5),
        ("Home", 1),
        ("ArrowLeft", 1),
    ):
        page.keyboard.press(key)
        assert on(f".tile[aria-selected=true][data-index='{which - 1}']")
        assert page.inner_text("#which").startswith(f"Image {which}:")
    page.set_viewport_size({"width": 360, "height": 740})
    columns = page.locator(".tile").evaluate_all(
        "all => all.filter(tile => tile.offsetTop === all[0].offsetTop).length"
    )
    assert 1 < columns < 6
    page.keyboard.press("ArrowDown")
    assert on(f".tile[data-index='{columns}']")
    tab_to("#numbers summary")


@pytest.mark.parametrize("query", ["", "?n=9&seed=1", "?n=3&seed=1&policy=full&at=2"])
def test_page_fits_a_phone(new_page: Callable[..., Page], address: str, query: str) -> None:
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.goto(f"{address}/{query}")
    page.wait_for_selector(DONE if query else "#form:not([hidden])")
    for details in page.locator("details:visible").all():
        details.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    targets = page.locator(
        ":is(button, select, summary, a, .tile, .tick, input:not([type=checkbox])):visible"
    )
    small = targets.evaluate_all(
        "all => all.filter(node => node.getBoundingClientRect().height < 44).map(node => node.outerHTML)"
    )
    assert small == []


PHONE = {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True}


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


def test_page_loads_nothing_from_other_hosts(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/?n=2&seed=1")
    page.wait_for_selector(DONE)
    assert len(asked) > 4 and all(url.startswith((f"{address}/", "data:")) for url in asked)
    text = page.content()
    assert "default-src 'none'" in text
    assert not re.search(r"\son\w+=|javascript:|<style|<script(?! type=\"module\" src)", text)


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
    fill(page, n=64, steps=250, seed=1, policy="full")  # long enough to be stopped
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
    fill(page, n=64, steps=250, seed=1, policy="full")  # it is still in progress
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_selector(".tile img:not([hidden])")
    fill(page, n=2, steps=3, policy="switching")
    page.get_by_role("button", name="New seed").click()
    page.wait_for_selector(DONE)
    seed = int(page.locator("#seed").input_value())
    assert seed != 1 and same(
        shown(page), [pixels(p["b64_json"]) for p in api(n=2, steps=3, seed=seed)["data"]]
    )


def answer(page: Page, events: str) -> None:
    """Let requests for samples be answered by a `start` of one image in 4 steps, a comment, and these events."""
    start = {
        "seed": 1,
        "version": "0",
        "n": 1,
        "steps": 4,
        "nfe_per_image": 4,
        "experts": ["a", "b"],
        "shape": [1, 8, 8],
    }
    body = f"event: start\ndata: {json.dumps(start)}\n\n: keep-alive\n\n{events}"
    page.route(
        "**/v1/samples", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )


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


def behind_prefix(page: Page, address: str) -> tuple[str, list[str]]:
    """Put a proxy before a server that strips a path prefix.

    Returns the address behind the proxy, and a list that collects the URLs requested outside the prefix.
    """
    prefix, outside = f"{address}/models/digits", []

    def forward(route: Route) -> None:
        url = route.request.url
        if url.startswith(f"{prefix}/"):
            with suppress(Error):  # the page is gone: it was reloaded or closed
                route.fulfill(response=route.fetch(url=address + url.removeprefix(prefix)))
        else:
            outside.append(url)
            route.abort()

    page.route(f"{address}/**", forward)
    return prefix, outside


def test_page_works_behind_a_path_prefix(page: Page, address: str, api: Api) -> None:
    prefix, outside = behind_prefix(page, address)
    page.goto(f"{prefix}/")
    sample(page, n=2, seed=4)
    assert same(shown(page), [pixels(image["b64_json"]) for image in api(n=2, seed=4)["data"]])
    assert page.url.startswith(f"{prefix}/?seed=4&n=2")
    assert page.locator("header a").evaluate("link => link.href") == f"{prefix}/docs"
    assert outside == []


def test_modules_import_existing_files_without_cycles() -> None:
    imports = {
        path.name: re.findall(r'^import .* from "\./(.+)";$', path.read_text(), re.MULTILINE)
        for path in PAGE.glob("*.js")
    }
    order = list(TopologicalSorter(imports).static_order())
    assert set(order) == set(imports) and order[-1] == "main.js"
    for name, found in imports.items():
        statements = re.findall(r"^import |\bimport\(", (PAGE / name).read_text(), re.MULTILINE)
        assert len(statements) == len(found)


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
        page.get_by_role("button", name="Sample", exact=True).click()
        page.get_by_label("Token").fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#gate")).to_be_hidden()
        page.wait_for_selector(DONE)
        assert outside == []


def test_a_class_is_asked_for_where_the_bundle_has_a_vocabulary(
    page: Page, address: str, small_labels_run: Path, tmp_path: Path
) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")
    for hidden in ("#class", "#attributes", "[name=guidance]"):
        assert page.locator(hidden).is_hidden()
    with served(small_labels_run, tmp_path / "log", "sample.steps=4") as told:
        page.goto(told)
        page.wait_for_selector("#form:not([hidden])")
        assert page.locator("[name=guidance]").is_hidden()  # of nothing
        page.get_by_label("Class").select_option("7")
        sample(page, n=2, seed=3, guidance=2)
        body = {"n": 2, "seed": 3, "condition": "7", "guidance": 2, "format": "b64_json"}
        asked = Request(
            f"{told}/v1/samples", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(asked, timeout=60) as reply:
            data = json.load(reply)["data"]
        assert same(shown(page), [pixels(image["b64_json"]) for image in data])
        assert "8 NFE per image" in page.inner_text("#status")
        assert "condition=7" in page.url and "guidance=2" in page.url
        before = shown(page)
        page.goto(page.url)  # the link shows the same again
        page.wait_for_selector(DONE)
        assert same(shown(page), before) and page.get_by_label("Class").input_value() == "7"
