"""The curve over compute: what is trained once, what for every point, and its record."""

import json
from pathlib import Path

import pytest

from benchmarks import curve
from ddm.artifacts import read_tensors
from tests.conftest import SMALL

TABLE = "table={n: 20, seeds: 2, batch: 20, trajectories: 4, steps: [2, 4], features: [pixels]}"


def words(folder: Path, *more: str) -> list[str]:
    given = [
        *SMALL,
        TABLE,
        "table.reference_steps=6",
        "seed_model.steps=6",
        f"run={folder / 'tiny'}",
    ]
    return ["digits", *given, *more, f"--out={folder / 'results'}"]


def test_the_point_of_the_config_s_own_steps_is_its_own_run(tmp_path: Path) -> None:
    assert curve.main(words(tmp_path, "--steps", "2", "12")) == 0
    own, branches = tmp_path / "tiny", tmp_path / "tiny-curve"
    assert [path.name for path in branches.iterdir()] == ["2"]
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*.safetensors")}
    assert own / "experts" / "00" / "expert.safetensors" in before
    assert curve.main(words(tmp_path, "expert.steps=13", "--steps", "12")) == 0  # now a branch
    again = branches / "12" / "experts" / "00" / "expert.safetensors"
    found, expected = (
        read_tensors(path) for path in (again, own / "experts/00/expert.safetensors")
    )
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_points_share_the_seed_model_and_the_router(tmp_path: Path) -> None:
    assert curve.main(words(tmp_path, "--steps", "4", "2")) == 0
    results = tmp_path / "results"
    record = json.loads((results / "curve-tiny.json").read_text())
    small, large = record["points"]
    assert (small["steps"], large["steps"]) == (2, 4)
    for each in (small, large):
        flop, steps = each["flop"], each["steps"]
        a_step = flop["one-model-time"] / steps
        assert flop["switching"] == flop["one-model"] == pytest.approx(3 * steps * a_step, rel=1e-5)
        assert flop["seed_model"] == pytest.approx(6 * a_step, rel=1e-5)
        assert each["seconds"].keys() == flop.keys() and all(each["seconds"].values())
        for row in curve.METHODS:
            assert [len(each["frechet"]["pixels"][row][n]) for n in ("2", "4")] == [2, 2]
    assert small["frechet"] != large["frechet"]
    runs = tmp_path / "tiny-curve"
    routers = [runs / steps / "router" / "router.safetensors" for steps in ("2", "4")]
    assert len({file.read_bytes() for file in routers}) == 1
    assert not list(runs.glob("*/seed_model"))
    page = (results / "curve.md").read_text()
    assert "| PFLOP | time |" in page
    assert "curve-tiny-pixels.png" in page and (results / "curve-tiny-pixels.png").exists()
    trained = {path: path.stat().st_mtime_ns for path in runs.rglob("expert.safetensors")}
    assert curve.main(words(tmp_path, "--steps", "4", "2")) == 0  # all is there
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert json.loads((results / "curve-tiny.json").read_text()) == record


def test_a_router_of_the_experts_images_and_a_guide_are_each_point_s_own(tmp_path: Path) -> None:
    more = ("router.data=experts", "router.samples=30", "seed_model.above=1.0")
    more += ("sample.autoguidance=2.0",)
    assert curve.main(words(tmp_path, *more, "--steps", "4", "2")) == 0
    runs = tmp_path / "tiny-curve"
    routers = [runs / steps / "router" / "router.safetensors" for steps in ("2", "4")]
    assert len({file.read_bytes() for file in routers}) == 2
    assert not (tmp_path / "tiny" / "router").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["seed_model.steps=0"], "seed_model.steps must be above 0, got 0"),
        (["seed_model.above=0.5"], "seed_model.above must be 1 or null, got 0.5"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_bad_words_are_refused_by_name(
    tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curve.main(words(tmp_path, *given)) == 2
    assert said in capsys.readouterr().err
