"""What images are judged by: the networks that `evaluate.features` names, and the real images they are held against."""

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
from train.evaluation.features import FeatureNetwork, feature_networks, held_out
from train.evaluation.measure import Measurement
from train.evaluation.results import Cell, Evaluation

Judge = Callable[..., Path]


def measured(config: Config) -> Evaluation:
    return Measurement(config, None, config.evaluate, "evaluate").make()


def one(record: Evaluation, method: str = "balanced", steps: int = 4) -> Cell:
    return next(cell for cell in record.cells if (cell.method, cell.steps) == (method, steps))


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run, with its draws."""
    return shutil.copytree(small_run, tmp_path / "run")


def real(folder: Path) -> torch.Tensor:
    return Partition.read(folder / "partition").all(folder / "partition")["images"]


def drawn(folder: Path, method: str = "balanced", steps: int = 4) -> torch.Tensor:
    return read_tensors(
        folder / "evaluate" / "draws" / f"{method}-dpmpp_2m-{steps}-seed0.safetensors"
    )["images"]


def test_the_classifier_tells_digits_apart_that_it_never_saw() -> None:
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


def test_the_classifier_is_the_same_however_the_images_were_cut(
    copy: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[FeatureNetwork] = []
    make = train.evaluation.measure.feature_networks

    def watched(*args: object) -> list[FeatureNetwork]:
        judges.extend(make(*args))  # type: ignore[arg-type]
        return judges[-1:]

    monkeypatch.setattr(train.evaluation.measure, "feature_networks", watched)
    words = (
        "evaluate.methods=[Naive, DDIM]",
        "evaluate.steps=[1, 2]",
        "evaluate.reference_steps=3",
    )
    three = measured(small(copy, *words))
    whole = measured(small(copy / "monolith", "partition.k=1", *words))
    assert (len(three.cells), len(whole.cells)) == (2, 2)
    images = torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    (features, logits), (others, _) = (
        (judged.features, judged.logits)
        for judged in (judge(images, lambda _: None) for judge in judges)
    )
    assert features.equal(others)
    assert logits is not None and logits.std() > 0.1
    assert three.features == whole.features
    assert three.features["classifier"].real_confidence is not None


def test_any_torchscript_network_can_judge(
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
    expected = frechet(gaussian(means_of(real(copy))), gaussian(means_of(drawn(copy))))
    assert one(record).scores["means"].frechet == pytest.approx(expected, rel=1e-4)
    assert list(json.loads((copy / "evaluate" / "record.json").read_text())["features"]) == [
        "means"
    ]


def test_several_networks_judge_the_same_images_each_as_it_would_alone(
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
    expected = frechet(gaussian(means_of(real(copy))), gaussian(means_of(drawn(copy))))
    assert one(record).scores["means"].frechet == pytest.approx(expected, rel=1e-4)


def test_a_folder_stands_for_the_torchscript_files_in_it(
    copy: Path, small: Callable[..., Config], tmp_path: Path, judge: Judge
) -> None:
    for name, side in (("fine", 2), ("coarse", 8)):
        judge(tmp_path / "judges" / f"{name}.pt", side)
    (tmp_path / "judges" / "notes.txt").write_text("no network")
    record = measured(small(copy, f"evaluate.features=[{tmp_path / 'judges'}]"))
    assert list(record.features) == ["coarse", "fine"]
    for name, side in (("fine", 2), ("coarse", 8)):
        expected = frechet(
            gaussian(means_of(real(copy), side)), gaussian(means_of(drawn(copy), side))
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
            config.evaluate.check_files("evaluate")  # another one judges
        else:
            with pytest.raises(
                ConfigError, match="evaluate.features must hold at least one network"
            ):
                config.evaluate.check_files("evaluate")


def test_distances_are_to_the_statistics_beside_a_network_where_there_are_any_and_else_to_the_run_s_images(
    copy: Path, small: Callable[..., Config], tmp_path: Path, judge: Judge
) -> None:
    plain, told = judge(tmp_path / "plain.pt"), judge(tmp_path / "told.pt")
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
        gaussian(means_of(drawn(copy))),
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
    copy: Path, small: Callable[..., Config], tmp_path: Path, judge: Judge
) -> None:
    network, statistics = judge(tmp_path / "judge.pt"), tmp_path / "some.judge.npz"
    config = small(
        copy,
        f"evaluate.features=[{network}]",
        "evaluate.reference=some",
        "evaluate.methods=[Naive]",
    )
    found = []
    for shift in (0.0, 1.0):
        np.savez(statistics, mu=np.full(12, shift), sigma=np.eye(12))
        found.append(one(measured(config), "Naive").scores["judge"].frechet)
    mean, covariance = gaussian(means_of(drawn(copy, "Naive")))
    expected = [
        frechet((np.full(12, shift), np.eye(12)), (mean, covariance)) for shift in (0.0, 1.0)
    ]
    assert found == pytest.approx(expected, rel=1e-4)


def test_statistics_that_hold_something_else_are_refused_by_their_file(
    copy: Path, small: Callable[..., Config], tmp_path: Path, judge: Judge
) -> None:
    network = judge(tmp_path / "judge.pt")
    config = small(copy, f"evaluate.features=[{network}]", "evaluate.reference=some")
    np.savez(tmp_path / "some.judge.npz", mean=np.zeros(12))
    with pytest.raises(ConfigError, match=r"some.judge.npz must be an .npz with mu and sigma"):
        measured(config)
    (tmp_path / "some.judge.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"some.judge.npz must be an .npz with mu and sigma"):
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
    (judge,) = feature_networks(["inception"], str(tmp_path / "inception.pth"), labelled, 0, "cpu")
    judged = judge(images, lambda _: None)
    assert (judge.name, judge.what, judge.file) == (
        "inception",
        "Inception v3 (2015)",
        tmp_path / "inception.pth",
    )
    assert judged.logits is not None
    assert torch.allclose(
        judged.logits, judged.features @ network.fc.weight.T, rtol=1e-3, atol=1e-4
    )
