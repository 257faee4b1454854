"""The table over training seeds: what is trained, what is taken from a record, and what is written."""

import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

from benchmarks import training_seeds
from benchmarks.table.__main__ import main as make_table
from tests.conftest import SMALL
from train.config import Config

TABLE = "table={n: 20, seeds: 2, batch: 20, trajectories: 4, steps: [2, 4], "
TABLE += "features: [pixels], methods: [one-model, switching]}"


def words(folder: Path, *more: str) -> list[str]:
    given = [*SMALL, TABLE, "table.reference_steps=6", f"run={folder / 'tiny'}"]
    return ["digits", *given, *more, f"--out={folder / 'results'}"]


def test_each_seed_has_a_table_and_the_page_their_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    tables = results / "tiny.json", tmp_path / "tiny-1" / "table" / "tiny-1.json"
    assert make_table(words(tmp_path)) == 0
    times = [tables[0].stat().st_mtime_ns]
    assert training_seeds.main(words(tmp_path, "--seeds", "0", "1")) == 0
    times.append(tables[1].stat().st_mtime_ns)
    assert not (tmp_path / "tiny-0").exists()
    own, other = (json.loads(file.read_text()) for file in tables)
    assert (own["config"]["seed"], other["config"]["seed"]) == (0, 1)
    record = json.loads((results / "training-seeds-tiny.json").read_text())
    for row, by_steps in record["frechet"]["pixels"]["ipndm"].items():
        for steps, found in by_steps.items():
            assert found == [
                [
                    cell["scores"]["pixels"]["frechet"]
                    for cell in each["cells"]
                    if (cell["method"], cell["steps"]) == (row, int(steps))
                ]
                for each in (own, other)
            ]
    rows = record["frechet"]["pixels"]["ipndm"]
    of = {row: [mean(seeds) for seeds in rows[row]["4"]] for row in ("switching", "one-model")}
    page = (results / "training-seeds.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| switching |"))
    assert line.endswith(f"| {mean(of['switching']):.2f} ± {stdev(of['switching']):.2f} |")
    a, b = (x - y for x, y in zip(of["switching"], of["one-model"], strict=True))
    line = next(line for line in page.splitlines() if line.startswith("| switching − one-model |"))
    ours, theirs = (zip(*rows[row]["4"], strict=True) for row in ("switching", "one-model"))
    noise = stdev(mean(x) - mean(y) for x, y in zip(ours, theirs, strict=True))
    spreads = f"± {stdev([a, b]):.2f} / {noise:.2f}"
    assert line.endswith(f"| {mean([a, b]):+.2f} {spreads} ({a:+.2f}, {b:+.2f}) |")
    assert training_seeds.main(words(tmp_path, "--seeds", "1", "0")) == 0  # all is there
    assert [file.stat().st_mtime_ns for file in tables] == times
    assert json.loads((results / "training-seeds-tiny.json").read_text()) == record
    made: list[Path] = []

    def make(config: Config, command: str, folder: Path) -> Path:
        made.append(folder / f"{config.folder.name}.json")
        folder.mkdir(exist_ok=True)
        return shutil.copy(tables[0], made[-1])

    monkeypatch.setattr(training_seeds, "make", make)
    before = tables[0].read_bytes()
    assert training_seeds.main(words(tmp_path, "table.n=30", "--seeds", "1", "0")) == 0
    assert made == [tmp_path / "tiny" / "table" / "tiny.json", tables[1]]
    assert tables[0].read_bytes() == before  # another config's is not written over


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "1", "1"], "--seeds must be two or more different ones, got [1, 1]"),
        (["--seeds", "0", "-1"], "--seeds must be 0 or more, got -1"),
        (["nothing"], "nothing: Key 'nothing' not in 'Config'"),
    ],
)
def test_bad_words_are_refused_by_name(
    tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training_seeds.main(words(tmp_path, *given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
