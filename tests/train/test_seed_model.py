"""The seed model: a network that all experts, and the models beside them, start from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddm.artifacts import read_facts, read_tensors
from ddm.errors import ArtifactError, ConfigError, DdmError
from train.config import Config
from train.evaluation.measure import Measurement
from train.stages.bundle import make_bundle
from train.stages.expert import train_experts
from train.stages.monolith import train_monoliths
from train.stages.router import train_router
from train.stages.seed_model import train_seed_model

SEED = "seed_model.steps=6"
STILL = ("expert.steps=1", "expert.learning_rate=1e-30")  # an expert of these stays where it starts


@pytest.fixture
def cut(small_run: Path, tmp_path: Path) -> Path:
    """A run that has a partition alone."""
    shutil.copytree(small_run / "partition", tmp_path / "run" / "partition")
    return tmp_path / "run"


def weights(stem: Path) -> dict[str, torch.Tensor]:
    tensors = read_tensors(stem.with_suffix(".safetensors"))
    return {name: tensor for name, tensor in tensors.items() if "gaussian" not in name}


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-6)


def test_experts_and_both_single_models_start_from_the_seed_model(
    cut: Path, small: Callable[..., Config]
) -> None:
    rows = "evaluate.methods=[one-model, one-model-time, Naive]"
    config = small(cut, SEED, *STILL, rows)
    train_seed_model(config)
    train_experts(config)
    found = train_monoliths(config, config.evaluate)
    seed = cut / "seed_model" / "seed_model"
    for run in (config, *found.values()):
        assert_same(run.folder / "experts" / "00" / "expert", seed)
        facts = read_facts(run.folder / "experts" / "00" / "expert")
        assert facts["init"] == {"sha256": read_facts(seed)["sha256"], "images_seen": 6 * 12}
    train_router(config)
    make_bundle(config)
    seen = Measurement(config, found, config.evaluate, "evaluate").make().images_seen
    # The seed model is counted once for each model: 6 steps of 12, and 3 experts of one step.
    assert seen == {"one-model": 72 + 36, "one-model-time": 72 + 12, "Naive": 72 + 36}


def test_a_seed_model_is_trained_once_and_experts_of_another_are_not_overwritten(
    cut: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = small(cut, SEED, *STILL)
    train_seed_model(config)
    train_experts(config)
    caplog.set_level("INFO")
    train_seed_model(config)
    assert "seed_model up to date" in caplog.text
    (cut / "config.yaml").unlink()
    shutil.rmtree(cut / "seed_model")
    other = small(cut, "seed_model.steps=7", *STILL)
    with pytest.raises(ArtifactError, match=r"seed_model.json is missing: run the stage"):
        train_experts(other)
    train_seed_model(other)
    with pytest.raises(ArtifactError, match="was made by another config or from other images"):
        train_experts(other)


def test_a_seed_model_of_noisy_images_alone_learns_at_no_other_times(
    cut: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experts.expert_module import ExpertLearning

    asked: list[float] = []
    usual = ExpertLearning.at

    def spy(self: ExpertLearning, level: torch.Tensor) -> torch.Tensor:
        times = usual(self, level)
        asked.extend(times.tolist())
        return times

    monkeypatch.setattr(ExpertLearning, "at", spy)
    train_seed_model(small(cut, SEED, "seed_model.t_min=0.6"))
    tensors = read_tensors(cut / "seed_model" / "seed_model.safetensors")
    assert not any(
        "gaussian" in name for name in tensors
    )  # a mean image leaves with an expert alone
    assert len(asked) == 6 * 12 and min(asked) >= 0.6


def test_a_seed_model_of_other_images_needs_their_shape(
    cut: Path, small: Callable[..., Config], real_data: Path
) -> None:
    config = small(cut, SEED, "seed_model.data={name: digits, limit: 30}")
    train_seed_model(config)
    (cut / "config.yaml").unlink()
    shutil.rmtree(cut / "seed_model")
    data = f"seed_model.data={{name: cifar10, limit: 10, root: {real_data}}}"
    with pytest.raises(ConfigError, match=r"seed_model.data must be images of \[1, 8, 8\], got"):
        train_seed_model(small(cut, SEED, data))


def test_an_expert_starts_from_any_artifact_of_its_network_and_from_no_other(
    cut: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    from_run = small_run / "experts" / "02" / "expert"
    config = small(cut, f"expert.init={from_run}.safetensors", "expert.index=1", *STILL)
    train_experts(config)
    assert_same(cut / "experts" / "01" / "expert", from_run)
    for k, path in ((0, small_run / "experts" / "02"), (2, small_run / "monolith")):
        train_experts(small(cut, f"expert.init={path}", f"expert.index={k}", *STILL))
        start = next(path.rglob("expert.json")).with_suffix("")
        assert_same(cut / "experts" / f"{k:02d}" / "expert", start)
        facts = read_facts(cut / "experts" / f"{k:02d}" / "expert")
        assert facts["init"]["sha256"] == read_facts(start)["sha256"]
    for words, key in (
        (["expert.unet.channels=12"], "unet"),
        (["schedule={name: rectified_flow}"], "schedule"),
        (["expert.parameterization=raw"], "parameterization"),
    ):
        fresh = shutil.copytree(cut / "partition", cut.parent / key / "partition").parent
        wrong = small(fresh, f"expert.init={from_run}", "expert.index=0", *STILL, *words)
        with pytest.raises(DdmError, match=f"expert.init must be an artifact with the same {key}"):
            train_experts(wrong)
    with pytest.raises(ArtifactError, match=r"nowhere.json is missing"):
        train_experts(small(cut, "expert.init=nowhere", "expert.index=0", *STILL))
    with pytest.raises(ConfigError, match=r"seed_model.steps must be 0 where expert.init names"):
        train_seed_model(small(cut, SEED, f"expert.init={from_run}"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed_model.steps=-1", "seed_model.steps must be at least 0, got -1"),
        ("seed_model.t_min=1", r"seed_model.t_min must be in \(0, 1\), or null, got 1.0"),
        ("seed_model.data={name: digits, limit: 0}", "data.limit must be at least 1"),
    ],
)
def test_a_seed_model_that_cannot_be_is_refused_by_key(
    small: Callable[..., Config], tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, word)
