"""The command lines of the benchmarks: help, and errors in one line with exit status 2."""

from collections.abc import Callable

import pytest

from benchmarks import (
    agreement,
    clusters,
    conditions,
    image_edits,
    joining,
    relaxation_rate,
    side_by_side,
    survival,
)
from benchmarks.ablations import __main__ as ablations
from benchmarks.lab import __main__ as lab
from benchmarks.load import __main__ as load
from benchmarks.speed import __main__ as speed
from benchmarks.table import __main__ as table

COMMANDS = {
    "ablations": ablations.main,
    "agreement": agreement.main,
    "joining": joining.main,
    "clusters": clusters.main,
    "conditions": conditions.main,
    "image_edits": image_edits.main,
    "lab": lab.main,
    "load": load.main,
    "relaxation_rate": relaxation_rate.main,
    "speed": speed.main,
    "side_by_side": side_by_side.main,
    "survival": survival.main,
    "table": table.main,
}


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown(name: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[name]([word]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: python -m benchmarks.{name} ")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (ablations.main, ["nothing"], "group must be one of chance parameterization"),
        (ablations.main, ["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (ablations.main, ["configs/digits.yaml", "expert.stepz=3"], "expert.stepz"),
        (agreement.main, ["nowhere"], "nowhere"),
        (agreement.main, ["nowhere", "best"], "policy must be one of"),
        (agreement.main, ["nowhere", "steps=3"], "give steps as a word of its own or as --steps"),
        (agreement.main, ["nowhere", "souce=prior"], "souce"),
        (agreement.main, ["nowhere", "--n=0"], "--n must be at least 1, got 0"),
        (clusters.main, ["--images=9"], "--images must be at least --classes, got 9"),
        (conditions.main, ["nowhere"], "nowhere"),
        (image_edits.main, ["nowhere"], "nowhere"),
        (image_edits.main, ["--n=3"], "--n must be at least 12, got 3"),
        (conditions.main, ["nowhere", "condition=3"], "give condition by --guidance"),
        (conditions.main, ["nowhere", "--n=3"], "--n must be at least 20, got 3"),
        (lab.main, ["lawz"], "name must be one of orders few_steps laws"),
        (lab.main, ["--draw"], "unrecognized arguments: --draw"),
        (lab.main, ["laws", "--render", "--out=nowhere"], "--out must hold laws.json"),
        (load.main, ["runs/none", "other"], "give one run"),
        (load.main, ["--clients=many"], "argument --clients: invalid int value: 'many'"),
        (load.main, ["--clients=0"], "--clients must be at least 1, got 0"),
        (relaxation_rate.main, ["nowhere"], "nowhere"),
        (relaxation_rate.main, ["one", "two"], "unrecognized arguments: two"),
        (speed.main, ["netwrok"], "name must be one of network training"),
        (speed.main, ["network", "--seconds=0"], "--seconds must be above 0, got 0"),
        (side_by_side.main, ["--workers=0"], "--workers must be in [1, "),
        (side_by_side.main, ["--folder=benchmarks"], "--folder must not exist yet, got benchmarks"),
        (survival.main, ["--folder=benchmarks"], "--folder must not exist yet, got benchmarks"),
        (table.main, [], "give one config"),
        (table.main, ["configs/digits.yaml", "--page=x.json"], "give one config"),
        (table.main, ["--page=nowhere.json"], "nowhere.json"),
        (table.main, ["configs/nowhere.yaml"], "there is no config"),
    ],
)
def test_bad_words_are_refused_in_one_line(
    main: Callable[[list[str]], int],
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
