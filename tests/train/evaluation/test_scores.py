"""The scores of samples, against independent computations and the script outside."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddm.measures import neighbours
from train.data import DataConfig
from train.evaluation.feature_network import NetworkFeatures, script_network
from train.evaluation.scores import Scores, read_reference

SHARED = Path(__file__).resolve().parents[4] / "shared"  # beside the checkout


def features(n: int, seed: int) -> Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def polynomial_kid(real: np.ndarray, samples: np.ndarray) -> float:
    """The unbiased squared MMD with the kernel (x.y / d + 1)^3 (arXiv 1801.01401, section 4)."""
    n, m, d = len(real), len(samples), real.shape[1]
    xx, yy, xy = (
        (a @ b.T / d + 1) ** 3 for a, b in ((real, real), (samples, samples), (real, samples))
    )
    return float(
        (xx.sum() - np.trace(xx)) / n / (n - 1)
        + (yy.sum() - np.trace(yy)) / m / (m - 1)
        - 2 * xy.mean()
    )


def test_the_kernel_distance_is_that_of_all_pairs() -> None:
    real, samples = features(400, 0), 0.8 * features(300, 1) + 0.3
    found = Scores(real)(NetworkFeatures(samples, None)).kid
    expected = polynomial_kid(real.double().numpy(), samples.double().numpy())
    assert found == pytest.approx(expected, rel=1e-9)
    assert abs(Scores(real)(NetworkFeatures(features(400, 2), None)).kid) < 0.1 * found


def test_a_score_depends_on_the_images_alone() -> None:
    real, samples, logits = features(100, 0), features(60, 1), 3 * features(60, 2)
    scores = Scores(real)
    first = scores(NetworkFeatures(samples, logits))
    torch.manual_seed(5)
    scores(NetworkFeatures(features(80, 3), None))
    state = torch.get_rng_state()
    assert (
        scores(NetworkFeatures(samples, logits))
        == first
        == Scores(real)(NetworkFeatures(samples, logits))
    )
    assert torch.get_rng_state().equal(state)


def test_neighbours_compare_as_many_real_images_as_samples() -> None:
    real, samples = features(200, 0), 0.9 * features(50, 1)
    score = Scores(real)(NetworkFeatures(samples, None))
    assert (score.precision, score.recall, score.coverage) == neighbours(real[:50], samples)
    assert neighbours(real[:50], samples) != neighbours(real, samples)
    many = Scores(samples)(NetworkFeatures(real, None))
    assert (many.precision, many.recall, many.coverage) == neighbours(samples, real[:50])


def test_logits_give_inception_score_confidence_and_class_frequencies() -> None:
    logits = 4 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    score = Scores(features(100, 0))(NetworkFeatures(features(100, 1), logits))
    p = logits.double().softmax(dim=1)
    assert score.confidence == pytest.approx(float(p.max(dim=1).values.mean()), rel=1e-5)
    counts = np.bincount(p.argmax(dim=1).numpy(), minlength=5)
    assert score.class_frequencies == pytest.approx(list(counts / 100), rel=1e-6)
    whole = float((p * (p.log() - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    assert score.inception_score == pytest.approx(whole, rel=0.1)  # it is the mean over halves
    plain = Scores(features(100, 0))(NetworkFeatures(features(100, 1), None))
    assert (plain.inception_score, plain.confidence, plain.class_frequencies) == (None, None, None)
    assert (plain.frechet, plain.kid, plain.coverage) == (score.frechet, score.kid, score.coverage)


@pytest.mark.data
@pytest.mark.parametrize(
    ("network", "count"), [("cifar10_shufflenet", 300)]
)  # the larger one takes minutes here
def test_the_distance_is_that_of_the_script_outside(
    real_data: Path, tmp_path: Path, network: str, count: int
) -> None:
    script, folder = SHARED / "tools" / "frechet.py", SHARED / "data" / "features"
    module, reference = folder / f"{network}.pt", folder / f"cifar10_train.{network}.npz"
    missing = [str(path) for path in (script, module, reference) if not path.is_file()]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    images = DataConfig(name="cifar10", root=str(real_data), limit=count).build().images
    noise = 25 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise).round().clamp(0, 255).to(torch.uint8)
    np.savez(tmp_path / "noisy.npz", images=noisy.permute(0, 2, 3, 1).numpy())
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(script),
            str(tmp_path / "noisy.npz"),
            str(module),
            str(reference),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    distance, number = done.stdout.split()
    assert number == f"n={count}"
    scored = script_network("evaluate.features", str(module), "cpu")
    real = scored(images, lambda _: None).features
    found = Scores(real, read_reference(reference))(scored(noisy, lambda _: None)).frechet
    assert found == pytest.approx(float(distance), rel=0.005)
    assert Scores(real)(scored(noisy, lambda _: None)).frechet != pytest.approx(
        float(distance), rel=0.005
    )
