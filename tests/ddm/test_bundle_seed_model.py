"""A bundle with a seed model for high noise: its file, its time, and networks that do not fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import file_of, read_json, write_artifact, write_json
from ddm.bundle import read_bundle
from ddm.bundle_writing import Parts, write_bundle, write_half
from ddm.errors import ArtifactError
from ddm.seed_model import learned_from
from tests.ddm.bundles import Run


class SeededRun(Run):
    """A run with a seed model that has learned t in [0.4, 1], and experts of t in [0, 0.7]."""

    def __init__(self, folder: Path) -> None:
        self.seed_model = folder / "seed_model" / "seed_model"
        super().__init__(folder)
        for k in range(2):
            self.train(k, config={"t_max": 0.7})
        self.train_seed_model()

    def train_seed_model(self, **changes: Any) -> None:
        own = {"kind": "seed_model", "config": {"t_min": 0.4, "t_max": None}}
        facts = self.facts(**{**own, **changes})
        write_artifact(self.seed_model, {"weight": torch.tensor([7.0, 7.0])}, facts)

    def seeded(self, above: float = 0.6) -> Parts:
        parts = self.parts(self.router)
        return Parts(
            parts.mixture,
            parts.schedule,
            parts.experts,
            parts.router,
            None,
            (self.seed_model, above),
        )

    def refused(self, above: float, message: str) -> None:
        with pytest.raises(ArtifactError, match=re.escape(message)):
            write_bundle(self.bundle, self.seeded(above), "test")


@pytest.fixture
def run(tmp_path: Path) -> SeededRun:
    return SeededRun(tmp_path)


def test_a_bundle_keeps_its_seed_model_and_its_time(run: SeededRun, tmp_path: Path) -> None:
    write_bundle(run.bundle, run.seeded(), "test")
    write_half(run.bundle, tmp_path / "half")
    for folder in (run.bundle, tmp_path / "half"):
        bundle = read_bundle(folder)
        assert bundle.above == 0.6 and bundle.seed_model is not None
        assert bundle.seed_model.tensors["weight"].tolist() == [7, 7]
        assert Parts.of(bundle).seed_model == (folder / "seed-model", 0.6)
    one = read_bundle(run.bundle, only=["expert-01"])
    assert one.seed_model is None and one.above == 0.6


def test_without_a_seed_model_there_is_no_time(run: SeededRun) -> None:
    for k in range(2):
        run.train(k)
    run.write()
    bundle = read_bundle(run.bundle)
    assert (bundle.seed_model, bundle.above) == (None, 1.0)
    assert "above" not in read_json(run.bundle / "manifest.json")


def test_networks_that_have_not_learned_their_times_are_refused_by_file(run: SeededRun) -> None:
    expert, seed = file_of(run.experts[0], ".json"), file_of(run.seed_model, ".json")
    run.refused(0.8, f"{expert} has learned t up to 0.7 alone, and must move images from 0.8 on")
    run.refused(0.3, f"{seed} must have learned all t above 0.3 to be the seed model")
    with pytest.raises(
        ArtifactError, match="has learned t up to 0.7 alone, and must move .* from 1"
    ):
        run.write()
    run.train(1, config={"t_max": "x"})
    run.refused(0.6, "is damaged: config.t_max must be a number, got 'x'")


def test_a_time_of_another_process_is_converted(run: SeededRun) -> None:
    # On rectified flow s/a = t/(1 - t) is that of vp_linear at 0.6 near t = 0.86.
    for t_max, message in ((0.8, "up to 0.8 alone, and must move images from 0.8"), (0.95, None)):
        run.train(0, config={"t_max": t_max}, schedule={"name": "rectified_flow"})
        if message:
            run.refused(0.6, message)
        else:
            write_bundle(run.bundle, run.seeded(), "test")
    # That of rectified flow at 0.9 is vp_linear's near 0.66.
    own = {"config": {"t_min": 0.9}, "schedule": {"name": "rectified_flow"}}
    run.train_seed_model(**own)
    run.refused(0.6, "it has learned t in [0.66")
    facts = run.facts(**own)
    assert learned_from(run.seed_model, facts, {"name": "vp_linear"}) == pytest.approx(0.6605, 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "router"}, "is not a seed model: its kind must be one of seed_model expert"),
        ({"shape": [3, 2, 2]}, "its shape is [3, 2, 2], expected [1, 2, 2]"),
        ({"config": {"t_min": 0.001, "t_max": 0.7}}, "it has learned t in [0.001, 0.7]"),
        (
            {"condition": {"kind": "label", "names": ["a"], "counts": [1], "images": 2}},
            "its condition is label of ['a'], there it is none",
        ),
    ],
)
def test_what_is_no_seed_model_of_the_bundle_is_refused_by_file(
    run: SeededRun, changes: dict[str, Any], message: str
) -> None:
    run.train_seed_model(**changes)
    run.refused(0.6, message)
    assert not run.bundle.exists()


@pytest.mark.parametrize("above", [0.0, 1.5, -1, "x", True, None])
def test_a_time_that_cannot_be_is_refused(run: SeededRun, above: Any) -> None:
    write_bundle(run.bundle, run.seeded(), "test")
    manifest = run.bundle / "manifest.json"
    write_json(manifest, {**read_json(manifest), "above": above})
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged: above must be a number in"):
        read_bundle(run.bundle)


def test_a_time_without_a_seed_model_is_refused(run: SeededRun) -> None:
    for k in range(2):
        run.train(k)
    run.write()
    manifest = run.bundle / "manifest.json"
    write_json(manifest, {**read_json(manifest), "above": 0.5})
    with pytest.raises(ArtifactError, match="above is 0.5, but it has no seed model"):
        read_bundle(run.bundle)
