"""Every figure in docs/results has its record, and every record fits the files beside it and the
configs in the tree.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import curve, recipe, training_seeds
from benchmarks.ablations import ablations_page
from benchmarks.speed import speed_page
from benchmarks.table.measurements import made_by
from benchmarks.table.results_page import overview, page
from ddm.artifacts import digest, sha256
from train.config import config_file, load_config

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def complaints(folder: Path) -> list[str]:
    """What is wrong with a folder of results."""
    found = []
    speeds = {f"{stem}{end}.json" for stem in speed_page.MACHINES for end in ("", "-history")}
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in speeds]
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    no_tables = ("ablations-", "curve-", "recipe-", "training-seeds-")
    tables = {name: record for name, record in records.items() if not name.startswith(no_tables)}
    with_files = {name: record for name, record in records.items() if "files" in record}
    files = set().union(*(record["files"] for record in with_files.values()))
    pages = {f"{name}.md" for name in tables} | {
        "README.md",
        "ablations.md",
        "curve.md",
        "recipe.md",
        "speed.md",
        "training-seeds.md",
    }
    for path in sorted(folder.iterdir()):
        known = files | pages | speeds | {f"{name}.json" for name in records}
        if path.name not in known:
            found.append(f"{path.name} has no record")
    for name, record in with_files.items():
        for file, expected in record["files"].items():
            if not (folder / file).exists() or sha256(folder / file) != expected:
                found.append(f"{file} is not the one of {name}.json")
    for name, record in tables.items():
        if (folder / f"{name}.md").read_text() != page(record, name):
            found.append(f"{name}.md does not say what {name}.json does")
    for name, record in records.items():
        config, *others = shlex.split(record["command"])[3:]
        words = [word for word in others if "=" in word and not word.startswith("--")]
        if digest(record["config"]) != record["config_hash"]:
            found.append(f"the config in {name}.json does not have the hash there")
        same = made_by(record, load_config(config_file(Path(config).stem), words))
        if not same and not record.get("earlier"):
            found.append(f"{name}.json was made by another {config} than the one in the tree")
    measured = any(name.startswith("ablations-") for name in records)
    if measured and (folder / "ablations.md").read_text() != ablations_page.page(folder):
        found.append("ablations.md does not say what its records do")
    pages_of = {"recipe.md": recipe, "curve.md": curve, "training-seeds.md": training_seeds}
    for written, module in ((folder / file, module) for file, module in pages_of.items()):
        if written.exists() and written.read_text() != module.page(folder):
            found.append(f"{written.name} does not say what its records do")
    written = folder / "speed.md"
    if written.exists() and written.read_text() != speed_page.page(folder):
        found.append("speed.md does not say what its records do")
    return found


def test_every_figure_has_its_record() -> None:
    assert complaints(RESULTS) == []


def test_the_readme_shows_what_the_tables_say() -> None:
    assert overview(RESULTS) in (ROOT / "README.md").read_text()


def test_no_record_holds_a_path_of_a_machine() -> None:
    for path in RESULTS.glob("*.json"):
        assert not re.search(r'"/|[^.]\./|\.\./|~/', path.read_text()), path


def _first_number(path: Path) -> None:
    text = path.read_text()
    place = next(re.finditer(r"\| \d+\.\d", text)).end()
    path.write_text(text[: place - 1] + str((int(text[place - 1]) + 1) % 10) + text[place:])


def _record(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def changed(path: Path) -> None:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return changed


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("digits.md", _first_number, "digits.md does not say what digits.json does"),
        (
            "digits.json",
            _record(lambda r: r["cells"][0]["scores"]["classifier"].update(frechet=0.01)),
            "digits.md does not",
        ),
        (
            "digits.json",
            _record(lambda r: r["config"].update({"expert.steps": 7})),
            "the config in digits.json",
        ),
        (
            "digits.json",
            _record(lambda r: r.update(config_hash="0")),
            "the config in digits.json",
        ),
        (
            "ablations-digits.json",
            _record(lambda r: (r.pop("earlier", ""), r["config"].update({"router.steps": 7}))),
            "ablations-digits.json was made by another",
        ),
        (
            "digits-images.png",
            lambda path: path.write_bytes(path.read_bytes() + b"0"),
            "digits-images.png is not",
        ),
        ("digits-real.png", lambda path: path.unlink(), "digits-real.png is not the one"),
        ("more.png", lambda path: path.write_bytes(b"0"), "more.png has no record"),
        ("better.md", lambda path: path.write_text("| FID | 1.0 |"), "better.md has no record"),
    ],
)
def test_mismatch_with_a_record_is_found(
    file: str, change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    others = shutil.ignore_patterns("c*", "f*", "r*", "s*", "t*")  # all but digits and ablations
    copy = Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=others))
    change(copy / file)
    assert any(complaint.startswith(said) for complaint in complaints(copy))
