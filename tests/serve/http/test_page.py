"""The web page, in headless Chromium, against a server in another process."""

import json
import re
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.serve.http.browsing import (
    DONE,
    PAGE,
    Api,
    behind_prefix,
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
    first.evaluate("""() => {
        window.said = []
        const copy = document.querySelector("#copy")
        new MutationObserver(() => window.said.push(copy.textContent))
            .observe(copy, {childList: true, characterData: true, subtree: true})
    }""")  # it says so for two seconds
    first.get_by_role("button", name="Copy link").click()
    first.wait_for_function("window.said.includes('Copied')")
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


def test_page_loads_nothing_from_other_hosts(page: Page, address: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/?n=2&seed=1")
    page.wait_for_selector(DONE)
    assert len(asked) > 4 and all(url.startswith((f"{address}/", "data:")) for url in asked)
    text = page.content()
    assert "default-src 'none'" in text
    assert not re.search(r"\son\w+=|javascript:|<style|<script(?! type=\"module\" src)", text)


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


def test_a_class_is_asked_for_where_the_bundle_has_a_vocabulary(
    page: Page, address: str, small_labels_run: Path, tmp_path: Path
) -> None:
    page.goto(address)
    page.wait_for_selector("#form:not([hidden])")
    for hidden in ("#class", "#attributes", "[name=guidance]"):
        assert page.locator(hidden).is_hidden()
    words = ("sample.steps=4", "sample.guidance_interval=[0, 0.6]")
    with served(small_labels_run, tmp_path / "log", *words) as told:
        page.goto(told)
        page.wait_for_selector("#form:not([hidden])")
        assert page.locator("[name=guidance]").is_hidden()  # of nothing
        page.get_by_label("Class").select_option("7")
        sample(page, n=2, seed=3, guidance=2)
        body = {"n": 2, "seed": 3, "condition": "7", "guidance": 2, "format": "b64_json"}

        def asked(body: dict[str, Any]) -> list[Any]:
            head = {"Content-Type": "application/json"}
            call = Request(f"{told}/v1/samples", json.dumps(body).encode(), head)
            with urlopen(call, timeout=60) as reply:
                return [pixels(image["b64_json"]) for image in json.load(reply)["data"]]

        assert same(shown(page), asked(body))
        assert " 8 NFE per image" not in page.inner_text(
            "#status"
        )  # above 0.6 there is no guidance
        assert "condition=7" in page.url and "guidance=2" in page.url
        before = shown(page)
        page.goto(page.url)  # the link shows the same again
        page.wait_for_selector(DONE)
        assert same(shown(page), before) and page.get_by_label("Class").input_value() == "7"
        fill(page, guidance_interval="")  # which is not the server's default
        page.get_by_role("button", name="Sample", exact=True).click()
        page.wait_for_url("**guidance_interval=0%2C+1**")
        page.wait_for_selector(DONE)
        assert same(shown(page), asked({**body, "guidance_interval": [0, 1]}))
        assert " 8 NFE per image" in page.inner_text("#status")
        assert page.locator(
            "[name=control_variate]"
        ).is_hidden()  # the policy follows one expert's path
        fill(page, guidance=1)
        assert page.locator("[name=guidance_interval]").is_hidden()
