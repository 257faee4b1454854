"""The rows of the table: what each name means, and which experts it evaluates."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddm.artifacts import sha256
from train.config import BundleConfig, Config
from train.evaluation.measure import Measurement
from train.evaluation.methods import methods
from train.evaluation.rows import METHODS, ONE_MODEL
from train.evaluation.rows import ROWS as KNOWN
from train.evaluation.samples import SampleSet
from train.stages.monolith import monolith_configs, train_monoliths
from train.stages.run import run

PLAIN = {"control_variate": "none", "temperature": 2.0, "clusters": {}}
ROWS: dict[str, dict[str, Any]] = {
    "one-model": {"source": "prior", "policy": "full", "temperature": 1.0},
    "one-model-time": {"source": "prior", "policy": "full", "temperature": 1.0},
    "Naive": {"source": "prior", "policy": "fixed", "temperature": 1.0},
    "MoG-a": {"source": "posterior", "policy": "stochastic", "temperature": 1.0},
    "MoG-da": {"source": "combined", "policy": "stochastic", "temperature": 1.0},
    "switching": {"source": "posterior", "policy": "switching", "temperature": 1.0},
    "switching-gaussian": {"source": "gaussian", "policy": "switching", "temperature": 1.0},
    "balanced": {"source": "analytic", "policy": "balanced"},
    "balanced-cv": {"source": "analytic", "policy": "balanced", "control_variate": "gaussian"},
    "adaptive": {"source": "analytic", "policy": "adaptive", "control_variate": "gaussian"},
    "top-1": {"source": "analytic", "policy": "top_k", "top_k": 1},
    "top-2": {"source": "analytic", "policy": "top_k", "top_k": 2},
    "nucleus": {"source": "analytic", "policy": "nucleus", "nucleus_p": 0.9},
    "full": {"source": "analytic", "policy": "full"},
}


def test_rows_that_are_not_the_paper_s_take_alpha_from_the_config(
    small_run: Path, small: Callable[..., Config]
) -> None:
    words = (
        "sample.source=analytic",
        "sample.control_variate=gaussian",
        "sample.policy=full",
        "sample.temperature=2",
    )
    config, monolith = (
        small(small_run, *words),
        small(small_run / "monolith", "partition.k=1", *words),
    )
    ones = dict.fromkeys(ONE_MODEL, monolith)
    rows = {row.name: row for row in methods(config, ones, METHODS, 3)}
    assert list(rows) == list(ROWS) == list(METHODS)
    for name, settings in ROWS.items():
        assert rows[name].settings == {**PLAIN, **settings}, name
        cfg = small_run / "monolith" if name in ONE_MODEL else small_run
        assert rows[name].run == str(cfg)
        assert rows[name].version == sha256(cfg / "bundle" / "manifest.json")


def test_every_row_has_its_own_colour_and_meaning() -> None:
    rows = KNOWN.values()
    assert len({row.colour for row in rows}) == len({row.meaning for row in rows}) == len(rows)
    routed = {name for name, row in KNOWN.items() if row.routed_one}
    assert {
        "MoG-a",
        "MoG-da",
        "switching",
        "switching-gaussian",
        "balanced",
        "balanced-cv",
        "top-1",
    } <= routed
    assert not routed & {*ONE_MODEL, "Naive", "adaptive", "top-2", "nucleus", "full"}


def test_rows_keep_their_order_and_one_model_needs_to_be_trained(
    small_run: Path, small: Callable[..., Config]
) -> None:
    config = small(small_run)
    asked = ["full", "one-model", "nucleus"]
    assert [row.name for row in methods(config, {}, asked, 3)] == ["full", "nucleus"]
    ones = {"one-model": small(small_run / "monolith")}
    assert [row.name for row in methods(config, ones, asked, 3)] == asked
    alone = methods(config, {}, asked, 1)
    assert [(row.name, row.settings["policy"], row.settings["source"]) for row in alone] == [
        ("one-model", "full", "prior")
    ]


def test_no_monolith_is_trained_if_no_row_needs_one(
    small_run: Path, small: Callable[..., Config], tmp_path: Path, means: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "monolith")
    words = (f"evaluate.features=[{means}]", "evaluate.methods=[one-model, Naive]")
    run(small(copy, *words, "evaluate.monolith_steps=0"), ["evaluate"])
    assert not (copy / "monolith").exists()
    assert "Naive" in (copy / "report.html").read_text()
    for others in (["Naive"], ["full", "top-1"]):
        config = small(copy, f"evaluate.methods=[{','.join(others)}]")
        assert train_monoliths(config, config.evaluate) == {}
    assert not (copy / "monolith").exists()


def test_a_monolith_has_its_own_steps_or_as_many_as_all_experts(
    small_run: Path, small: Callable[..., Config]
) -> None:
    for words, steps in ((), 36), (("evaluate.monolith_steps=7",), 7):
        config = small(small_run, *words)
        (monolith,) = monolith_configs(config, config.evaluate).values()
        assert (monolith.expert.steps, monolith.partition.k) == (steps, 1)
        assert monolith.folder == small_run / "monolith"


def test_a_monolith_is_bundled_of_its_own_expert(
    small_run: Path, small: Callable[..., Config]
) -> None:
    words = ("bundle.names=[a,b,c]", "bundle.weights=[1,2,3]", "bundle.half=true")
    config = small(small_run, *words, f"bundle.experts=[{small_run}]")
    (monolith,) = monolith_configs(config, config.evaluate).values()
    assert monolith.bundle == BundleConfig(half=True)


def test_the_model_of_equal_time_has_the_steps_of_one_expert(
    small_run: Path, small: Callable[..., Config]
) -> None:
    config = small(small_run, "evaluate.methods=[switching, one-model-time]")
    wanted = monolith_configs(config, config.evaluate)
    assert list(wanted) == ["one-model-time"]
    assert wanted["one-model-time"].expert.steps == config.expert.steps
    assert wanted["one-model-time"].folder == small_run / "monolith-time"


def chosen_by_hand(samples: SampleSet, mass: float) -> np.ndarray:
    """The fewest experts of largest alpha that carry that mass, `[N, 8, K]`, a row at a time."""
    alpha = samples.alpha.double().numpy()
    chosen = np.zeros(alpha.shape, bool)
    for place in np.ndindex(alpha.shape[:2]):
        carried = 0.0
        for k in np.argsort(-alpha[place]):
            if carried < mass - 1e-6:
                chosen[(*place, k)] = True
                carried += alpha[(*place, k)]
    return chosen


def test_adaptive_top_2_and_nucleus_evaluate_as_many_experts_as_they_should(
    small_run: Path, small: Callable[..., Config], tmp_path: Path, means: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    words = (
        "evaluate.methods=[adaptive, top-2, nucleus]",
        f"evaluate.features=[{means}]",
        "evaluate.n=20",
    )
    config = small(copy, *words, "evaluate.steps=[4, 10]", "evaluate.reference_steps=11")
    measurement = Measurement(config, None, config.evaluate, "evaluate")
    record = measurement.make()
    samples = {
        (spec.method.name, spec.steps): measurement.samples(spec) for spec in measurement.specs
    }
    nfe = {(cell.method, cell.steps): cell.nfe for cell in record.cells}
    for steps in (4, 10):
        assert nfe["top-2", steps] == 2 * steps
        assert steps < nfe["adaptive", steps] <= 1.5 * steps
        nucleus = samples["nucleus", steps]
        by_hand = chosen_by_hand(nucleus, 0.9)
        assert np.array_equal(nucleus.chosen.numpy().astype(bool), by_hand)
        assert steps < nfe["nucleus", steps] <= 3 * steps
        assert nfe["nucleus", steps] == pytest.approx(
            by_hand.sum(axis=(0, 2)).mean(), rel=0.3
        )  # of 8 of the 20
