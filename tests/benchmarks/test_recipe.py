"""The recipe's rows: as many steps as fit, what is measured of them, and resuming."""

import json
from pathlib import Path

import pytest

from benchmarks import recipe
from tests.conftest import SMALL

TABLE = "table={n: 20, batch: 20, trajectories: 4, features: [pixels]}"


def words(folder: Path, *groups: str) -> list[str]:
    more = [*SMALL, TABLE, "partition.holdout=0.1", f"run={folder / 'tiny'}"]
    return ["digits", *groups, *more, "--seconds=0.5", f"--out={folder / 'results'}"]


def test_variants_are_trained_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_TIMED_S", 0.1)
    monkeypatch.setattr(recipe, "cores", lambda: 0)  # in this process
    assert recipe.main(words(tmp_path, "chance")) == 0
    record = json.loads((tmp_path / "results" / "recipe-tiny.json").read_text())
    (base,), (other,) = record["groups"][""], record["groups"]["chance"]
    assert base["loss"] != other["loss"]
    for row in (base, other):
        assert row["steps"] >= 1
        assert row["GFLOP/s"] > 0
        assert len(row["frechet"]["pixels"]) == 2
    assert "| seed=1 |" in (tmp_path / "results" / "recipe.md").read_text()
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("expert.safetensors")}
    assert len(trained) == 2
    assert recipe.main(words(tmp_path, "mirrored")) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    again = json.loads((tmp_path / "results" / "recipe-tiny.json").read_text())["groups"]
    assert list(again) == ["", "chance", "mirrored"]
    assert again[""] == record["groups"][""]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nosuch"], "the first word must be a config, got 'nosuch'"),
        (["digits", "nosuch"], "group must be one of chance shape "),
        (["digits", "--seconds=0"], "--seconds must be above 0, got 0.0"),
        (["digits", "partition.holdout=0.0"], "partition.holdout must be above 0"),
    ],
)
def test_bad_words_are_refused_by_name(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe.main(given) == 2
    assert said in capsys.readouterr().err
