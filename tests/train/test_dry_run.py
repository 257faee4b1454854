"""`--dry-run`: the plan of a run, and what it refuses before anything is written."""

import re
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.conftest import SMALL
from train import dry_run
from train.__main__ import main

Usage = namedtuple("Usage", "total used free")


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The rows of the printed plan by stage, in columns."""
    table = capsys.readouterr().out.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", table[0])]
    ends = [*starts[1:], 1000]
    cells = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in table]
    return {row[0]: row[1:] for row in cells}


def test_every_stage_is_planned_and_nothing_written(
    tmp_path: Path, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, f"run={tmp_path / 'run'}", "seed_model.steps=7", "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    plan = lines(capsys)
    stages = [
        "partition",
        "seed_model",
        "expert",
        "router",
        "bundle",
        "monolith",
        "sample",
        "evaluate",
        "all",
    ]
    assert [stage for stage in plan if stage in stages] == stages
    assert plan["partition"][0] == "240 images in 3 clusters, 0 held out"
    assert plan["seed_model"][0] == "7 steps"
    assert plan["expert"][0] == "3 of 3, 1 at a time, 12 steps each"
    assert plan["monolith"][0] == "36 steps"
    with safe_open(small_run / "experts" / "00" / "expert.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith("moments")]  # noqa: SIM118
        sizes = {name: file.get_tensor(name).numel() for name in names}
    count = sum(size for name, size in sizes.items() if name.startswith("network"))
    assert plan["expert"][1] == f"{count / 1e6:.2f}M"
    assert all(plan[stage][3] for stage in ("seed_model", "expert", "router", "evaluate", "all"))


def test_what_is_made_takes_no_time(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["partition", "expert", "router"]
    assert main([*SMALL, f"run={small_run}", *words, "--dry-run"]) == 0
    plan = lines(capsys)
    assert plan["expert"][0] == "0 of 3, 1 at a time, 12 steps each"
    assert plan["router"][0] == "made"
    assert plan["all"][3] == ""
    assert main([*SMALL, f"run={small_run}", "expert.steps=20", *words, "--dry-run"]) == 0
    plan = lines(capsys)
    assert plan["expert"][0] == "3 of 3, 1 at a time, 8 steps each" and plan["expert"][3]


def test_an_expert_that_there_is_not_is_named(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, f"run={small_run}", "expert", "expert.index=3", "--dry-run"]) == 2
    assert "expert.index must be in [0, 2], got 3" in capsys.readouterr().err


def test_k_means_is_not_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["partition.by=kmeans", "partition.holdout=0.1", "partition", "expert"]
    assert main([*SMALL, f"run={tmp_path / 'run'}", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "216 images in 3 clusters, 24 held out" in shown
    assert "Clusters have 72 to 72 images to learn from, if k-means cuts them evenly" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data={name: cifar10, root: nowhere}"], "nowhere"),
        (["expert.batch=85"], r"cluster 1 \(4 \+ 5 \+ 6\) has \d+ images .*expert.batch=85: give"),
        (["expert.unet.multipliers=[1,2,2,2,2]"], "expert.unet.multipliers"),
        (
            ["partition.holdout=0.97", "data.limit=100"],
            "partition.holdout must leave every cluster",
        ),
        (["evaluate.features=[nowhere.pt]"], "evaluate.features must hold"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*SMALL, f"run={tmp_path / 'run'}", *words, "--dry-run"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    assert main([*SMALL, f"run={tmp_path / 'run'}", "partition", "expert", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"needs about [\d.]+ MB of disk, .* has 1 B free: give run=FOLDER", error)
