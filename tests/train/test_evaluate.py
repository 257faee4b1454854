import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddm.artifacts import read_tensors
from ddm.measures import trajectory_error
from ddm.partition import Partition
from serve import load
from train.config import Config
from train.draws import Draw, Draws, Method
from train.evaluate import evaluate
from train.features import feature_network, held_out
from train.record import Evaluation


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    """`|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` by another way: the symmetric root of S1 first."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def test_the_recorded_distance_is_that_of_the_drawn_pictures(small_run: Path, small: Callable[..., Config]) -> None:
    config = small(small_run)
    whole = Partition.read(small_run / "partition").all(small_run / "partition")
    network = feature_network(config.evaluate.features, config.evaluate.inception_weights, whole, config.seed, "cpu")
    real = network(whole["images"], lambda _: None).features.double().numpy()
    record = Evaluation.read(small_run / "evaluate" / "record.json")
    cell = next(cell for cell in record.cells if (cell.method, cell.steps) == ("balanced", 4))
    drawn = read_tensors(small_run / "evaluate" / "draws" / "balanced-4.safetensors")["images"]
    features = network(drawn, lambda _: None).features.double().numpy()
    assert cell.frechet == pytest.approx(_frechet(real, features), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("MoG-a", {"source": "posterior", "policy": "stochastic", "control": "none"}),
        ("balanced", {"source": "combined", "policy": "balanced", "control": "none"}),
        ("controlled", {"source": "combined", "policy": "balanced", "control": "gaussian"}),
    ],
)
def test_the_recorded_trajectory_error_is_that_to_the_full_mixture(
    small_run: Path, method: str, settings: dict[str, str]
) -> None:
    model = load(small_run)
    reference = model.sample(4, steps=8, source="posterior", policy="full")
    drawn = model.sample(20, steps=4, **settings)[:4]  # type: ignore[call-overload]
    record = Evaluation.read(small_run / "evaluate" / "record.json")
    cell = next(cell for cell in record.cells if (cell.method, cell.steps) == (method, 4))
    assert cell.trajectory_error == pytest.approx(trajectory_error(drawn, reference), rel=1e-3)


def test_all_methods_are_in_the_table_with_their_calls(small_run: Path) -> None:
    record = Evaluation.read(small_run / "evaluate" / "record.json")
    calls = {(cell.method, cell.steps): cell.calls for cell in record.cells}
    names = ("DDIM", "Naive", "MoG-a", "MoG-da", "balanced", "controlled", "top-1")
    single = {(name, n): n for name in names for n in (2, 4)}
    assert calls == {**single, ("full", 2): 6, ("full", 4): 12}
    assert record.pictures_seen["DDIM"] == record.pictures_seen["full"] == 3 * 12 * 12  # the same compute


def test_the_report_needs_no_other_file(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert not re.findall(r"(?:src|href)='(?!data:)", page)
    assert page.count("data:image/png;base64,") == 9
    methods = ("DDIM", "Naive", "MoG-a", "MoG-da", "balanced", "controlled", "top-1", "full")
    for name in (*methods, "a small classifier trained on half"):
        assert name in page


def test_a_draw_that_is_there_is_not_drawn_again(small_run: Path, small: Callable[..., Config], tmp_path: Path) -> None:
    config = small(small_run)
    version = load(small_run).version
    draws = Draws(tmp_path, config.sample, "cpu", 20)
    short = Draw(Method("a", str(small_run), version, "prior", "fixed"), 2, 5, 1)
    draws.make([short], [1], 1)
    written = (tmp_path / "a-2.safetensors").stat().st_mtime_ns
    draws.make([short, Draw(short.method, 3, 5, 1)], [1, 1], 1)
    assert (tmp_path / "a-2.safetensors").stat().st_mtime_ns == written
    assert (tmp_path / "a-3.safetensors").exists()
    draws.make([Draw(short.method, 2, 6, 1)], [1], 1)
    assert len(draws.read(Draw(short.method, 2, 6, 1)).images) == 6


def test_a_draw_takes_the_sampler_of_the_config_and_the_control_of_its_row(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    config, model = small(small_run, "sample.sampler=unipc", "sample.order=2", "sample.grid=quadratic"), load(small_run)
    draws = Draws(tmp_path, config.sample, "cpu", 20)
    for control in ("none", "gaussian"):
        draw = Draw(Method(control, str(small_run), model.version, "posterior", "balanced", control), 5, 4, 4)
        draws.make([draw], [1], 1)
        drawn = {"source": "posterior", "policy": "balanced", "control": control, "steps": 5}
        expected = model.sample(4, sampler="unipc", order=2, grid="quadratic", **drawn)  # type: ignore[call-overload]
        torch.testing.assert_close(draws.read(draw).ends, expected)


def test_the_classifier_tells_digits_apart_that_it_never_saw(small: Callable[..., Config]) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target)
    config = small("nowhere")
    network = feature_network(
        config.evaluate.features,
        config.evaluate.inception_weights,
        {"images": images, "labels": labels, "cluster": labels},
        0,
        "cpu",
    )
    logits = network(images, lambda _: None).logits
    assert logits is not None
    unseen = held_out(len(images), 0)
    assert (logits[unseen].argmax(dim=1) == labels[unseen]).float().mean() > 0.95


def test_any_torchscript_network_can_judge(
    small_run: Path, small: Callable[..., Config], tmp_path: Path, means: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    evaluation = evaluate(small(copy, f"evaluate.features={means}"), None)
    assert evaluation.features == "means"
    assert all(cell.inception_score is None and cell.confidence is None for cell in evaluation.cells)
    assert all(np.isfinite(cell.frechet) for cell in evaluation.cells)
    assert json.loads((copy / "evaluate" / "record.json").read_text())["features"] == "means"


def test_inception_gives_features_and_logits_from_the_users_weights(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as untrained, torch.random.fork_rng():
        torch.manual_seed(0)
        untrained.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, tmp_path / "inception.pth")
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "inception.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    config = small("nowhere", "evaluate.features=inception", f"evaluate.inception_weights={tmp_path / 'inception.pth'}")
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    judge = feature_network(
        config.evaluate.features,
        config.evaluate.inception_weights,
        {"images": images, "cluster": torch.zeros(2)},
        0,
        "cpu",
    )
    judged = judge(images, lambda _: None)
    assert judge.name == "Inception v3 (2015)"
    assert judged.logits is not None
    assert torch.allclose(judged.logits, judged.features @ network.fc.weight.T, rtol=1e-3, atol=1e-4)
