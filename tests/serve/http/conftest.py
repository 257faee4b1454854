"""Fixtures for tests of the web page, in headless Chromium, against a server in another process."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve.http.browsing import CHROMIUM, Api, served

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def address(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("serve") / "log"
    limits = ("serve.limits.steps=1000", "serve.limits.pending=1000000")  # requests to be stopped
    with served(small_run, log, "sample.steps=6", *limits) as found:
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
