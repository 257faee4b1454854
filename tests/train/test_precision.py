"""`expert.precision=auto`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddm.artifacts import read_facts, read_json, write_json
from ddm.errors import ArtifactError, ConfigError
from train import precision
from train.config import Config
from train.precision import with_precision
from train.stages.expert import train_experts
from train.stages.monolith import monolith_configs

AUTO = "expert.precision=auto"


@pytest.fixture
def cut(small_run: Path, tmp_path: Path) -> Path:
    """A run that has a partition alone."""
    shutil.copytree(small_run / "partition", tmp_path / "run" / "partition")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({"32-true": 13.0, "bf16-mixed": 10.0}, "bf16-mixed"),
        ({"32-true": 11.0, "bf16-mixed": 10.0}, "32-true"),  # not by so much that it is no chance
        ({"32-true": 1.0, "bf16-mixed": 10.0}, "32-true"),
    ],
)
def test_auto_is_what_was_faster_at_first_and_stays_so(
    cut: Path,
    small: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ms: dict[str, float],
    chosen: str,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(precision, "_milliseconds", lambda _: ms)
    config = small(cut, AUTO, "expert.steps=2", "expert.index=0", "expert.checkpoint_every=1")
    train_experts(config)
    assert f"expert.precision=auto is {chosen} here" in caplog.text
    assert read_json(cut / "experts" / "precision.json") == {"precision": chosen, "ms": ms}
    assert read_facts(cut / "experts" / "00" / "expert")["config"]["precision"] == chosen
    monkeypatch.setattr(precision, "_milliseconds", lambda _: pytest.fail("measured again"))
    train_experts(config)
    assert "expert     up to date: 1 of 1" in caplog.text
    (monolith,) = monolith_configs(config, config.evaluate).values()
    assert monolith.expert.precision == chosen


def test_of_two_that_measure_at_once_the_first_one_s_choice_is_both_s(
    cut: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cut / "experts" / "precision.json"

    def measured(_: Config) -> dict[str, float]:
        write_json(path, {"precision": "bf16-mixed", "ms": {}})  # by the other, meanwhile
        return {"32-true": 1.0, "bf16-mixed": 10.0}

    monkeypatch.setattr(precision, "_milliseconds", measured)
    assert with_precision(small(cut, AUTO)).expert.precision == "bf16-mixed"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kept", [{}, {"precision": "auto"}, {"precision": ["32-true"]}])
def test_a_choice_that_is_damaged_is_refused_by_file(
    cut: Path, small: Callable[..., Config], kept: dict[str, object]
) -> None:
    write_json(cut / "experts" / "precision.json", kept)
    with pytest.raises(ArtifactError, match=r"precision.json is damaged: precision must be one of"):
        with_precision(small(cut, AUTO))


def test_both_precisions_are_measured(cut: Path, small: Callable[..., Config]) -> None:
    found = with_precision(small(cut, AUTO)).expert.precision
    ms = read_json(cut / "experts" / "precision.json")["ms"]
    assert found in ms and set(ms) == {"32-true", "bf16-mixed"} and min(ms.values()) > 0


def test_a_router_s_precision_is_named(small: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router.precision must be one of 32-true bf16-mixed"):
        small(tmp_path, "router.precision=auto")
