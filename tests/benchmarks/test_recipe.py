"""The recipe's rows: as many steps as fit, what is measured of them, and resuming."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import recipe
from tests.conftest import SMALL
from train.config import default_config

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
    (base,), others = record["groups"][""], record["groups"]["chance"]
    assert len({row["loss"] for row in (base, *others)}) == 3
    assert len({row["steps"] for row in (base, *others)}) == 1  # the same work, the same steps
    for row in (base, *others):
        assert row["steps"] >= 1
        assert row["GFLOP/s"] > 0
        assert len(row["frechet"]["pixels"]) == 2
    assert "| seed=1 |" in (tmp_path / "results" / "recipe.md").read_text()
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("expert.safetensors")}
    assert len(trained) == 3
    assert recipe.main(words(tmp_path, "mirrored")) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    again = json.loads((tmp_path / "results" / "recipe-tiny.json").read_text())["groups"]
    assert list(again) == ["", "chance", "mirrored"]
    assert again[""] == record["groups"][""]


@pytest.mark.usefixtures("forked_workers")
def test_a_network_is_trained_once_for_all_rows_that_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_TIMED_S", 0.1)
    monkeypatch.setattr(recipe, "cores", lambda: 2)
    assert recipe.main(words(tmp_path, "decay")) == 0
    groups = json.loads((tmp_path / "results" / "recipe-tiny.json").read_text())["groups"]
    (base,), (same, *others) = groups[""], groups["decay"]
    assert same["words"] == ["expert.cooldown=0.0"]  # as it is
    assert same | {"name": "", "words": []} == base | {"name": "", "words": []}
    assert len(list((tmp_path / "tiny-recipe").glob("*/seconds.json"))) == 1 + len(others)


def test_a_training_that_was_interrupted_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_TIMED_S", 0.1)
    given = [*SMALL, f"run={tmp_path / 'tiny'}"]
    config, took = recipe.trained(default_config(), given, 0.5)
    config.folder.with_name("seconds.json").unlink()
    for part in ("bundle", "experts/00/expert.json", "experts/00/expert.safetensors"):
        path = config.folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (config.folder / "experts/00/resume.ckpt").exists()
    assert recipe.trained(default_config(), given, 0.5)[1] > took / 10


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
