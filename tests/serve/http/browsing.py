"""The web page in headless Chromium: what its tests have in common."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Error, Page, Route

from benchmarks.load.child import free_port

PAGE = Path(__file__).parents[3] / "serve" / "http" / "page"
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
DONE = "#actions:not([hidden])"  # they appear when the images are finished
Api = Callable[..., Any]


@contextmanager
def served(run: Path, log: Path, *words: str) -> Iterator[str]:
    """Serve a run in a new process; gives the address."""
    address = f"http://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
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
            ends = time.monotonic() + 180
            while True:
                assert server.poll() is None, log.read_text()
                try:
                    with urlopen(f"{address}/readyz", timeout=5):
                        break
                except OSError:  # not listening yet, or too busy to respond
                    assert time.monotonic() < ends, log.read_text()
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()


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
    click_sample(page)
    page.wait_for_selector(DONE)


def click_sample(page: Page) -> None:
    """Click, and forget that earlier samples are done: the page does so when the first event comes."""
    page.locator("#actions").evaluate("node => { node.hidden = true }")
    page.get_by_role("button", name="Sample", exact=True).click()


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
