"""The feature networks that `evaluate.features` names, and what samples are compared with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train.evaluation.measure
from ddm.artifacts import read_tensors, sha256
from ddm.errors import ConfigError
from ddm.partition import Partition
from tests.train.conftest import frechet, gaussian, means_of
from train.config import Config
from train.evaluation.classifier import held_out
from train.evaluation.feature_network import FeatureNetwork
from train.evaluation.features import feature_networks
from train.evaluation.measure import Measurement
from train.evaluation.results import Cell, Evaluation

ScriptFile = Callable[..., Path]


def measured(config: Config) -> Evaluation:
    return Measurement(config, {}, config.evaluate, "evaluate").make()


def one(record: Evaluation, method: str = "balanced", steps: int = 4) -> Cell:
    return next(cell for cell in record.cells if (cell.method, cell.steps) == (method, steps))


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run, with its samples."""
    return shutil.copytree(small_run, tmp_path / "run")


def real(folder: Path) -> torch.Tensor:
    return Partition.read(folder / "partition").all(folder / "partition")["images"]


def sampled(folder: Path, method: str = "balanced", steps: int = 4) -> torch.Tensor:
    return read_tensors(
        folder / "evaluate" / "samples" / f"{method}-ipndm-{steps}-seed0.safetensors"
    )["images"]


def test_the_classifier_tells_unseen_digits_apart() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target)
    (network,) = feature_networks(
        ["classifier"], None, {"images": images, "labels": labels, "cluster": labels}, 0, "cpu"
    )
    logits = network(images, lambda _: None).logits
    assert logits is not None
    unseen = held_out(len(images), 0)
    assert (logits[unseen].argmax(dim=1) == labels[unseen]).float().mean() > 0.95


def test_the_classifier_does_not_depend_on_the_clusters(
    copy: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[FeatureNetwork] = []
    make = train.evaluation.measure.feature_networks

    def watched(*args: object) -> list[FeatureNetwork]:
        networks.extend(make(*args))  # type: ignore[arg-type]
        return networks[-1:]

    monkeypatch.setattr(train.evaluation.measure, "feature_networks", watched)
    words = (
        "evaluate.methods=[Naive, one-model]",
        "evaluate.steps=[1, 2]",
        "evaluate.reference_steps=3",
        "evaluate.features=[classifier]",
    )
    three = measured(small(copy, *words))
    whole = measured(small(copy / "monolith", "partition.k=1", *words))
    assert (len(three.cells), len(whole.cells)) == (2, 2)
    images = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    (features, logits), (others, _) = (network(images, lambda _: None) for network in networks)
    assert features.equal(others)
    assert logits is not None and logits.std() > 0.1
    assert three.features == whole.features
    assert three.features["classifier"].real_confidence is not None


def test_any_torchscript_network_gives_features(
    copy: Path, small: Callable[..., Config], means: Path
) -> None:
    record = measured(small(copy, f"evaluate.features=[{means}]"))
    assert list(record.features) == ["means"]
    facts = record.features["means"]
    assert (facts.what, facts.file) == ("the TorchScript network means", sha256(means))
    assert (facts.reference, facts.reference_file) == ("the 240 images of the run", None)
    for cell in record.cells:
        score = cell.scores["means"]
        assert (
            score.inception_score is None
            and score.confidence is None
            and score.class_frequencies is None
        )
        assert np.isfinite(
            [score.frechet, score.kid, score.precision, score.recall, score.coverage]
        ).all()
    expected = frechet(gaussian(means_of(real(copy))), gaussian(means_of(sampled(copy))))
    assert one(record).scores["means"].frechet == pytest.approx(expected, rel=1e-4)
    assert list(json.loads((copy / "evaluate" / "record.json").read_text())["features"]) == [
        "means"
    ]


def test_several_networks_score_each_as_it_would_alone(
    copy: Path, small: Callable[..., Config], means: Path, small_run: Path
) -> None:
    before = Evaluation.read(small_run / "evaluate" / "record.json")  # by the classifier alone
    record = measured(small(copy, f"evaluate.features=[classifier, {means}]"))
    assert list(record.features) == ["classifier", "means"]
    assert record.features["classifier"] == before.features["classifier"]
    for cell in record.cells:
        assert (
            cell.scores["classifier"] == one(before, cell.method, cell.steps).scores["classifier"]
        )
    expected = frechet(gaussian(means_of(real(copy))), gaussian(means_of(sampled(copy))))
    assert one(record).scores["means"].frechet == pytest.approx(expected, rel=1e-4)


def test_a_folder_means_the_torchscript_files_in_it(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    for name, side in (("fine", 2), ("coarse", 8)):
        script_file(tmp_path / "networks" / f"{name}.pt", side)
    (tmp_path / "networks" / "notes.txt").write_text("not a network")
    record = measured(small(copy, f"evaluate.features=[{tmp_path / 'networks'}]"))
    assert list(record.features) == ["coarse", "fine"]
    for name, side in (("fine", 2), ("coarse", 8)):
        expected = frechet(
            gaussian(means_of(real(copy), side)), gaussian(means_of(sampled(copy), side))
        )
        assert one(record).scores[name].frechet == pytest.approx(expected, rel=1e-4)


def test_a_folder_without_a_network_is_refused(
    copy: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = small(copy, f"evaluate.features=[{tmp_path / 'empty'}]")
    with pytest.raises(
        ConfigError,
        match=r"evaluate.features must hold at least one network: .*, got \['.*empty'\]",
    ):
        measured(config)
    for words in ([], [str(tmp_path / "empty"), "classifier"]):
        config.evaluate.features = words
        if words:
            config.evaluate.check_files("evaluate")  # the other one is enough
        else:
            with pytest.raises(
                ConfigError, match="evaluate.features must hold at least one network"
            ):
                config.evaluate.check_files("evaluate")


def test_networks_of_one_name_and_a_reference_that_none_has_are_refused(
    small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(str(script_file(tmp_path / folder / "net.pt")))
    evaluate = small(tmp_path).evaluate
    evaluate.features = files
    with pytest.raises(ConfigError, match="evaluate.features must hold networks of different name"):
        evaluate.check_files("evaluate")
    evaluate.features, evaluate.reference = [files[0], "pixels"], "faces"
    with pytest.raises(ConfigError, match=r"evaluate.reference must be null, or name .*'faces'"):
        evaluate.check_files("evaluate")
    evaluate.features = ["pixels"]
    evaluate.check_files("evaluate")


def test_distances_are_to_the_statistics_beside_a_network_or_to_the_run_s_images(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    plain, told = script_file(tmp_path / "plain.pt"), script_file(tmp_path / "told.pt")
    others = torch.randint(0, 256, (500, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    mean, covariance = gaussian(means_of(others))
    statistics = tmp_path / "noise.told.npz"
    np.savez(statistics, mu=mean, sigma=covariance)
    record = measured(
        small(copy, f"evaluate.features=[{plain}, {told}]", "evaluate.reference=noise")
    )
    found, near, far = (
        gaussian(means_of(sampled(copy))),
        gaussian(means_of(real(copy))),
        (mean, covariance),
    )
    scores = one(record).scores
    assert scores["told"].frechet == pytest.approx(frechet(far, found), rel=1e-4)
    assert scores["plain"].frechet == pytest.approx(frechet(near, found), rel=1e-4)
    assert scores["told"].frechet != pytest.approx(scores["plain"].frechet, rel=0.1)
    assert record.features["told"].reference == "noise.told.npz"
    assert record.features["told"].reference_file == sha256(statistics)
    assert record.features["plain"].reference == "the 240 images of the run"
    assert record.features["plain"].reference_file is None


def test_changed_statistics_are_noticed(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    network, statistics = script_file(tmp_path / "own.pt"), tmp_path / "some.own.npz"
    config = small(
        copy,
        f"evaluate.features=[{network}]",
        "evaluate.reference=some",
        "evaluate.methods=[Naive]",
    )
    found = []
    for shift in (0.0, 1.0):
        np.savez(statistics, mu=np.full(12, shift), sigma=np.eye(12))
        found.append(one(measured(config), "Naive").scores["own"].frechet)
    mean, covariance = gaussian(means_of(sampled(copy, "Naive")))
    expected = [
        frechet((np.full(12, shift), np.eye(12)), (mean, covariance)) for shift in (0.0, 1.0)
    ]
    assert found == pytest.approx(expected, rel=1e-4)


def test_wrong_statistics_are_refused_by_file(
    copy: Path, small: Callable[..., Config], tmp_path: Path, script_file: ScriptFile
) -> None:
    network = script_file(tmp_path / "own.pt")
    config = small(copy, f"evaluate.features=[{network}]", "evaluate.reference=some")
    np.savez(tmp_path / "some.own.npz", mean=np.zeros(12))
    with pytest.raises(ConfigError, match=r"some.own.npz must be an .npz with mu and sigma"):
        measured(config)
    (tmp_path / "some.own.npz").write_bytes(b"not numpy")
    with pytest.raises(ConfigError, match=r"some.own.npz must be an .npz with mu and sigma"):
        measured(config)


def test_inception_gives_features_and_logits_from_the_users_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as untrained, torch.random.fork_rng():
        torch.manual_seed(0)
        untrained.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, tmp_path / "inception.pth")
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], str(tmp_path / "inception.pth")
        )
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    labelled = {"images": images, "cluster": torch.zeros(2)}
    (inception,) = feature_networks(
        ["inception"], str(tmp_path / "inception.pth"), labelled, 0, "cpu"
    )
    found = inception(images, lambda _: None)
    assert (inception.name, inception.what, inception.file) == (
        "inception",
        "Inception v3 (2015)",
        tmp_path / "inception.pth",
    )
    assert found.logits is not None
    assert torch.allclose(found.logits, found.features @ network.fc.weight.T, rtol=1e-3, atol=1e-4)


def test_a_classifier_of_one_class_is_refused_before_sampling(
    copy: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(copy, "evaluate.seeds=2")  # samples that are not there yet
    measurement = Measurement(config, {}, config.evaluate, "evaluate")
    whole = measurement._images()
    one_class = {**whole, "labels": torch.full_like(whole["labels"], 3)}
    monkeypatch.setattr(measurement, "_images", lambda: one_class)
    before = sorted((copy / "evaluate" / "samples").iterdir())
    with pytest.raises(
        ConfigError, match="evaluate.features must hold pixels, inception or a TorchScript file"
    ):
        measurement.make()
    assert sorted((copy / "evaluate" / "samples").iterdir()) == before
