"""The pages of the laboratory: their tables are those of the numbers, and their text was read
against them.
"""

import importlib
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmarks.lab.__main__ import DOCS, EXPERIMENTS
from benchmarks.lab.markdown import (
    Rendered,
    short_digest,
    text_is_current,
    with_tables,
    write,
)

PAGE = """# Title

<!-- table one -->
old
<!-- end -->

The conclusion.

<!-- table two -->
<!-- end -->
"""


@pytest.fixture(params=EXPERIMENTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_page_shows_its_numbers(name: str) -> None:
    numbers = json.loads((DOCS / f"{name}.json").read_text())
    text = (DOCS / f"{name}.md").read_text()
    rendered = importlib.import_module(f"benchmarks.lab.{name}").render(numbers)
    for figure in rendered.figures.values():
        plt.close(figure)
    assert text == with_tables(text, rendered.tables)
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))
    assert shown == {f"{name}-{figure}.png" for figure in rendered.figures}
    assert all((DOCS / file).is_file() for file in shown)


def test_text_was_read_against_its_numbers(name: str) -> None:
    numbers = json.loads((DOCS / f"{name}.json").read_text())
    text = (DOCS / f"{name}.md").read_text()
    assert text_is_current(text, numbers), (
        f"docs/lab/{name}.json changed: check the text of {name}.md against it, "
        f"then note {short_digest(numbers)} there"
    )


def test_folder_holds_nothing_else() -> None:
    pages = {f"{name}.{ending}" for name in EXPERIMENTS for ending in ("json", "md")}
    others = {path.name for path in DOCS.iterdir()} - pages - {"README.md"}
    assert all(name.endswith(".png") and name.split("-")[0] in EXPERIMENTS for name in others)


def test_only_tables_are_replaced() -> None:
    text = with_tables(PAGE, {"one": "| 1 |", "two": "| 2 |"})
    expected = PAGE.replace("old", "| 1 |").replace("two -->\n", "two -->\n| 2 |\n")
    assert text == expected
    assert with_tables(text, {"one": "| 1 |", "two": "| 2 |"}) == text


@pytest.mark.parametrize("tables", [{"one": ""}, {"one": "", "two": "", "three": ""}])
def test_page_without_the_right_markers_is_refused(tables: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="the page must mark the tables"):
        with_tables(PAGE, tables)


def test_changed_numbers_ask_for_another_reading(tmp_path: Path) -> None:
    numbers = {"slope": 2.0}
    write(tmp_path, "new", numbers, Rendered({"slopes": "| 2 |"}, {}))
    page = tmp_path / "new.md"
    assert page.read_text() == "<!-- table slopes -->\n| 2 |\n<!-- end -->\n"
    note = f"\nTwo.\n\n<!-- text checked against numbers {short_digest(numbers)} -->\n"
    page.write_text(page.read_text() + note)
    assert text_is_current(page.read_text(), numbers)
    write(tmp_path, "new", {"slope": 3.0}, Rendered({"slopes": "| 3 |"}, {}))
    assert page.read_text() == "<!-- table slopes -->\n| 3 |\n<!-- end -->\n" + note
    assert not text_is_current(page.read_text(), {"slope": 3.0})
