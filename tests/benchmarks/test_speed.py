"""The benchmarks of speed keep their budget and survive what fails. No test asserts a time."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import __main__ as speed
from benchmarks.speed import exact_targets, expert_training, shapes
from benchmarks.speed.diffusers_training import DiffusersStep
from benchmarks.speed.expert_training import Training
from benchmarks.speed.speed_page import page, write_page
from benchmarks.speed.timing import (
    Call,
    Ceiling,
    Figures,
    Record,
    Timing,
    Variant,
    against_ceiling,
    alternate,
    brief,
    flop_of,
)
from ddm.schedules import schedule
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from experts.unet import UNetConfig
from router.targets import exact_posterior_rate
from train.fit import fit


def one() -> Figures:
    return {"images/s": 1234.5678, "shown": "a|b"}


def fail() -> Figures:
    raise RuntimeError("no kernel in /opt/somewhere/lib.so\nmore")


def endless() -> Figures:
    while True:
        time.sleep(0.01)


def record(tmp_path: Path, seconds: float = 100) -> Record:
    made = Record(tmp_path / "speed-cpu.json", "cpu", seconds, "python -m benchmarks.speed network")
    made.start("network", "About networks.")
    return made


def rows(tmp_path: Path) -> list[dict[str, object]]:
    facts = json.loads((tmp_path / "speed-cpu.json").read_text())
    return facts["network"]["rows"]  # type: ignore[no-any-return]


def test_an_error_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    made = record(tmp_path)
    made.measure("network", Variant("bad", fail))
    assert rows(tmp_path)[0]["error"] == "RuntimeError: no kernel in lib.so"  # written at once
    made.measure("network", Variant("good", one))
    assert rows(tmp_path)[1]["figures"] == {"images/s": 1235.0, "shown": "a|b"}


def test_a_row_beyond_the_budget_is_stopped(tmp_path: Path) -> None:
    made = record(tmp_path)
    made.measure("network", Variant("first", one, needs_s=0))
    made.seconds = time.monotonic() - made.began + 0.2
    made.measure("network", Variant("endless", endless, needs_s=-60))
    first, endless_row = rows(tmp_path)
    assert "figures" in first
    assert str(endless_row["not_measured"]).startswith("it did not end within")


def test_a_row_that_the_budget_does_not_reach_is_not_begun(tmp_path: Path) -> None:
    made = record(tmp_path, seconds=0)
    made.measure("network", Variant("last", one, needs_s=0.1))
    assert rows(tmp_path)[0]["not_measured"] == "0 s needed, 0 left"


def test_other_subjects_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    record(tmp_path).measure("network", Variant("good", one))
    later = Record(tmp_path / "speed-cpu.json", "cpu", 10, "again")
    later.start("targets", "About targets.")
    later.measure("targets", Variant("bad", fail))
    facts = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert list(facts) == ["network", "targets"]
    assert "figures" in facts["network"]["rows"][0]


def test_an_earlier_run_of_a_subject_is_appended_to_the_history(tmp_path: Path) -> None:
    for _ in range(3):
        record(tmp_path).measure("network", Variant("good", one))
    record(tmp_path)  # measures nothing, so that the next one has nothing to keep
    record(tmp_path).measure("network", Variant("bad", fail))
    runs = json.loads((tmp_path / "speed-cpu-history.json").read_text())["runs"]
    assert [run["subject"] for run in runs] == ["network"] * 3
    assert all(run["rows"][0]["figures"]["images/s"] == 1235 for run in runs)
    assert all({"date", "commit", "machine", "command"} <= run.keys() for run in runs)


def test_the_page_is_written_from_the_records(tmp_path: Path) -> None:
    made = record(tmp_path)
    made.measure("network", Variant("good", one))
    made.measure("network", Variant("bad", fail))
    write_page(tmp_path)
    text = (tmp_path / "speed.md").read_text()
    assert text == page(tmp_path)
    assert "## network on a CPU\n\nAbout networks." in text
    assert "| good | 1,235 | a/b |" in text
    assert "- bad failed: RuntimeError: no kernel in lib.so" in text


def test_the_rows_of_lowest_rank_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def row(name: str, rank: int) -> Variant:
        return Variant(name, lambda: called.append(name) or {}, rank)  # type: ignore[func-returns-value]

    monkeypatch.setattr(exact_targets, "variants", lambda _: [row("late", 1), row("first", 0)])
    monkeypatch.setattr(shapes, "variants", lambda _: [row("later", 1), row("second", 0)])
    assert speed.main(["targets", "shapes", "--device=cpu", f"--out={tmp_path}"]) == 0
    assert called == ["first", "second", "late", "later"]


def test_a_subject_that_cannot_be_imported_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "SUBJECTS", {"nothing": "nothing", "shapes": "shapes"})
    monkeypatch.setattr(shapes, "variants", lambda _: [Variant("good", one)])
    assert speed.main(["--device=cpu", f"--out={tmp_path}"]) == 0
    facts = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert "No module named" in facts["nothing"]["rows"][0]["error"]
    assert "figures" in facts["shapes"]["rows"][0]


def test_sides_alternate_and_a_failing_one_is_left_out() -> None:
    called: list[str] = []
    sides = {"a": lambda: called.append("a"), "bad": fail, "b": lambda: called.append("b")}
    timing = alternate(sides, "cpu", rounds=2, round_s=0)
    assert called == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert timing.errors == {"bad": "RuntimeError: no kernel in lib.so"}
    assert len(timing.ratio("a", "b")) == 2
    with pytest.raises(RuntimeError, match="no kernel"):
        alternate({"bad": fail}, "cpu")


def test_speed_and_share_follow_from_the_seconds() -> None:
    timing = alternate({"a": int, "b": int, "ceiling": int}, "cpu", rounds=3, round_s=0)
    timing.seconds = {"a": [1, 2, 3], "b": [2, 4, 12], "ceiling": [4, 8, 12]}
    ceiling = Ceiling("float32", "cpu")
    assert timing.rates(["a"], 6, "images/s") == {"a images/s": 3, "a ± %": 50}
    assert timing.compared("a", "b") == {"a / b": 2, "a / b range": "2 to 4"}
    shares = against_ceiling(timing, ["a"], ceiling.flop / 8, ceiling)
    assert shares["a share of ceiling"] == pytest.approx(4 / 8)
    assert shares["float32 ceiling TFLOP/s"] == pytest.approx(2 * 2048**3 / 8 / 1e12)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.layer(x)


def test_operations_are_those_of_one_image() -> None:
    x, t = torch.randn(3, 5), torch.zeros(3)
    assert flop_of(Linear(), x, t, backward=False) == 2 * 5 * 7
    assert flop_of(Linear(), x, t, backward=True) == 2 * 2 * 5 * 7  # and the weight's gradient


def test_errors_name_no_folder_of_the_machine() -> None:
    assert brief(OSError("~/x/y.py is not ./z")) == "OSError: y.py is not z"


def test_the_bare_loop_is_the_loop_of_fit(tmp_path: Path) -> None:
    unet = UNetConfig(channels=4, multipliers=[1], blocks=1, attention=[], dropout=0.1)
    config = ExpertConfig(unet=unet, steps=3, batch=2, warmup_steps=2, learning_rate=0.01)
    training = Training(config, "cpu", images=8)
    fitted = training.learning(ExpertLearning)
    fit(fitted, 3, config, tmp_path, "cpu", lambda step, loss: None)
    bare = training.step()
    for _ in range(3):
        bare()
    for average, weight in zip(bare.averages, fitted.parameters(), strict=True):
        torch.testing.assert_close(average, weight)


def test_the_independent_targets_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 3
    x0 = torch.randn(5, 1, 4, 4, generator=generator)
    eps = torch.randn(5, 1, 4, 4, generator=generator)
    t = torch.linspace(0.1, 1, 5)
    process = schedule("vp_linear")
    found = exact_posterior_rate(x0, eps, t, images, labels, process)
    expected = exact_targets.independent(x0, eps, t, images, labels, process)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def one_round(sides: Mapping[str, Call], device: str, **_: float) -> Timing:
    return alternate(sides, device, rounds=1, round_s=0)


def test_a_training_is_measured_without_a_part_and_with_more_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_training, "alternate", one_round)
    unet = UNetConfig(channels=4, multipliers=[1], blocks=1, attention=[], dropout=0.0)
    training = Training(ExpertConfig(unet=unet, steps=100, batch=2), "cpu", images=8)
    without = expert_training._without(training)
    assert list(without) == ["whole step ms", "average %", "counter-based noise %", "data %"]
    added = expert_training._reports_and_checkpoints(training)
    assert list(added) == ["step ms", "a report ms", "a checkpoint ms"]


def test_without_diffusers_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ImportError, match="diffusers is not installed"):
        DiffusersStep(32, images, 2, False, "cpu")
