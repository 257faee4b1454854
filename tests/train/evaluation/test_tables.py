"""What a table shows: the best beyond the spread, both feature spaces, empty cells."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.table.results_page import difference, main_table
from ddm.errors import ConfigError
from serve.model.params import SampleConfig
from train.config import Config
from train.evaluation.measure import Measurement, evaluate
from train.evaluation.report import shown_method
from train.evaluation.results import Cell, Evaluation, Features, Score, Spread, clear_best
from train.evaluation.rows import METHODS
from train.evaluation.tables import floor_line, print_tables


def score(frechet: float) -> Score:
    return Score(frechet, 0.0, 1.0, 1.0, 1.0, None, None, None)


def table(distances: dict[tuple[str, int], list[float]]) -> Evaluation:
    """Distances by method and steps, one per seed, the same in both feature spaces but doubled."""
    cells = [
        Cell(
            method,
            "s",
            steps,
            seed,
            steps * (5.0 if method == "full" else 1.0),
            None,
            {"classifier": score(found), "pixels": score(2 * found)},
        )
        for (method, steps), values in distances.items()
        for seed, found in enumerate(values)
    ]
    spaces = {
        name: Features(f"{name} in words", None, "the images", None, None, None, floor)
        for name, floor in (("classifier", [0.1, 0.3]), ("pixels", []))
    }
    names = dict.fromkeys(method for method, _ in distances)
    seeds = len(next(iter(distances.values())))
    return Evaluation(
        {}, dict.fromkeys(names, ""), {}, spaces, {"s": {}}, 20, seeds, "32-true", cells, {}
    )


@pytest.mark.parametrize(
    ("a", "b", "best"),
    [
        ((1.0, 0.1), (2.0, 0.1), "a"),
        ((2.0, 0.1), (1.0, 0.1), "b"),
        ((1.0, 0.5), (2.0, 0.5), None),  # the intervals meet
        ((1.0, 0.5), (2.0, 0.4), "a"),
        ((1.0, None), (2.0, None), None),  # one seed
    ],
)
def test_only_what_is_best_beyond_the_spread_is_marked(
    a: tuple[float, float | None], b: tuple[float, float | None], best: str | None
) -> None:
    column = {"a": Spread(*a), "b": Spread(*b), "c": None}
    assert clear_best(column) == best
    negative = {name: value and value._replace(mean=-value.mean) for name, value in column.items()}
    assert clear_best(negative, -1) == best


def test_feature_spaces_are_side_by_side_with_the_floor_below() -> None:
    found = table({("Naive", 5): [1.0, 1.2], ("full", 5): [3.0, 3.2], ("Naive", 10): [0.5, 0.7]})
    lines = main_table(found, "s").splitlines()
    assert lines[0] == ("|  | NFE per step | classifier: 5 steps | 10 | pixels: 5 steps | 10 |")
    assert lines[2] == (
        "| Naive | 1 | **1.10 ± 0.14** | **0.60 ± 0.14** | **2.20 ± 0.28** | **1.20 ± 0.28** |"
    )
    assert lines[3] == "| full | 5 | 3.10 ± 0.14 | – | 6.20 ± 0.28 | – |"
    assert "- classifier: classifier in words; 20 real images have 0.20 ± 0.14." in lines
    assert "- pixels: pixels in words." in lines  # of a record without a floor
    assert "- **full**: all experts at each step, weighted by alpha." in lines
    assert difference(found, "Naive", "full", 10, "pixels", "s") is None
    assert difference(found, "Naive", "full", 5, "pixels", "s") == pytest.approx((-4.0, 0.0))


def test_the_terminal_shows_both_feature_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    found = table({("Naive", 5): [1.0, 1.2], ("full", 5): [3.0, 3.2], ("Naive", 10): [0.5, 0.7]})
    print_tables(replace(found, fits={}))
    text = capsys.readouterr().out
    for words in ("distance by classifier", "1.10 ± 0.14", "distance by pixels", "2.20 ± 0.28"):
        assert words in text
    assert floor_line(found, "classifier") in text
    assert "± the standard deviation" in text


def test_a_row_may_have_fewer_step_counts(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    words = (
        "evaluate.features=[pixels]",
        "evaluate.methods=[Naive, MoG-a, full]",
        "evaluate.steps=[2, 4, 25]",
        "evaluate.reference_steps=26",
    )
    config = small(copy, *words, "evaluate.steps_up_to={full: 4, Naive: 1}")
    found = Measurement(config, None, config.evaluate, "evaluate").make()
    assert {(cell.method, cell.steps) for cell in found.cells} == {
        *(("MoG-a", n) for n in (2, 4, 25)),
        *(("full", n) for n in (2, 4)),
        *(("Naive", n) for n in (2, 4)),  # two at least
    }
    assert found.methods_at(25) == ["MoG-a"]
    (copy / "report.html").unlink()
    assert evaluate(config, None) == Evaluation.of(asdict(found))
    assert "–" in (copy / "report.html").read_text()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{best: 4}", "evaluate.steps_up_to must be one of one-model one-model-time Naive"),
        ("{full: 0}", r"evaluate.steps_up_to.full must be in \[1, 1000\], got 0"),
    ],
)
def test_bad_step_counts_of_a_row_are_refused_by_name(
    small: Callable[..., Config], tmp_path: Path, value: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        small(tmp_path, f"evaluate.steps_up_to={value}")


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ({}, "switching"),
        ({"source": "gaussian"}, "switching-gaussian"),
        ({"policy": "balanced"}, "balanced-cv"),
        ({"policy": "balanced", "control_variate": "none"}, "balanced"),
        ({"policy": "nucleus"}, "one-model"),
    ],
)
def test_samples_shown_are_those_of_the_run_s_own_settings(
    sample: dict[str, str], shown: str
) -> None:
    evaluation = SimpleNamespace(
        config={"sample": asdict(SampleConfig(**sample))},  # type: ignore[arg-type]
        steps=[5, 10, 25],
        methods_at=lambda _: [name for name in METHODS if name != "nucleus"],
    )
    assert shown_method(evaluation) == shown  # type: ignore[arg-type]
