"""What the README and the pages of docs name exists: links, files and modules."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.config import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("benchmarks", "configs", "ddm", "docker", "experts", "router", "serve", "tests", "train")


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_files_exist(page: Path) -> None:
    named = re.findall(
        rf"(?<![\w/~])(?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|yaml|json|css|js)", page.read_text()
    )
    for file in named:
        assert (ROOT / file).is_file(), file


def test_modules_exist(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert find_spec(module) is not None, module


def test_stages_are_those_of_the_program() -> None:
    text = (ROOT / "README.md").read_text()
    listed = re.search(r"The stages are\s+`([^`]+)`", text)
    assert listed is not None
    assert set(listed[1].split()) <= set(STAGES)
