"""Gaussian denoisers: transform, moments and mean against scipy, numpy and full covariances."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

import ddm.gaussian
from ddm.gaussian import Gaussians, cosine, moments
from ddm.oracle import GaussianMixture
from ddm.rng import RngStream, normal
from ddm.schedules import Schedule, schedule

SIZES = [(8, 8), (7, 7), (4, 6), (5, 3), (1, 4), (1, 1)]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return normal(seed, RngStream.NOISE, torch.arange(shape[0]), 0, shape[1:]).double()


def gaussians(k: int = 3, shape: tuple[int, ...] = (2, 3, 4), name: str = "vp_linear") -> Gaussians:
    """K Gaussians, each coordinate with a variance of its own; some of them 0."""
    variances = normals(k, *shape, seed=2).square()
    variances[0, ..., 1] = 0
    return Gaussians(normals(k, *shape, seed=1), variances, schedule(name))


def exact(x: Tensor, t: Tensor, mean: Tensor, variance: Tensor, forward: Schedule) -> Tensor:
    """`m + a C (a^2 C + s^2)^-1 (x - a m)` on flat pixels, with the whole covariance `C = basis^T
    diag(v) basis`.
    """
    shape, n = mean.shape, mean.numel()
    basis = np.stack(
        [dctn(unit.reshape(shape), axes=(1, 2), norm="ortho").ravel() for unit in np.eye(n)], axis=1
    )
    m, c = (
        basis.T @ mean.double().numpy().ravel(),
        basis.T @ np.diag(variance.double().numpy().ravel()) @ basis,
    )
    a, s = (float(part) for part in forward(t.double())[:2])
    rest = x.double().numpy().reshape(len(x), n) - a * m
    return torch.from_numpy(
        m + a * rest @ np.linalg.solve(a * a * c + s * s * np.eye(n), c)
    ).reshape(x.shape)


@pytest.mark.parametrize("size", SIZES)
def test_cosine_is_scipys_dct_and_inverts(
    size: tuple[int, int],
) -> None:
    x = normals(2, 3, *size)
    y = cosine(x)
    torch.testing.assert_close(
        y, torch.from_numpy(dctn(x.numpy(), type=2, norm="ortho", axes=(2, 3)))
    )
    torch.testing.assert_close(cosine(y, inverse=True), x)
    torch.testing.assert_close(cosine(x.float()), y.float(), rtol=1e-5, atol=1e-5)


def test_data_that_are_no_images_keep_their_own_coordinates() -> None:
    x = normals(4, 5)
    assert cosine(x).equal(x) and cosine(x, inverse=True).equal(x)


def numpy_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    y = dctn(images.double().numpy(), type=2, norm="ortho", axes=(2, 3))
    return torch.from_numpy(y.mean(0)).float(), torch.from_numpy(y.var(0)).float()


@pytest.mark.parametrize("chunk", [1024, 8, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_moments_are_the_mean_and_variance_of_transformed_images(
    flip: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ddm.gaussian, "_CHUNK", chunk)
    images = (128 + 60 * normals(21, 2, 4, 3)).clamp(0, 255).to(torch.uint8)
    transformed = images.double() / 127.5 - 1
    whole = torch.cat([transformed, transformed.flip(3)]) if flip else transformed
    for given in (images, transformed.float(), transformed):
        for found, expected in zip(moments(given, flip), numpy_moments(whole), strict=True):
            assert found.dtype == torch.float32 and found.shape == images.shape[1:]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_moments_count_every_image_of_every_chunk() -> None:
    images = torch.cat([torch.full((1024, 1, 2, 2), 20), torch.full((300, 1, 2, 2), 220)]).to(
        torch.uint8
    )
    for found, expected in zip(
        moments(images), numpy_moments(images.double() / 127.5 - 1), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_images_have_no_variance_and_never_a_negative_one() -> None:
    image = (128 + 60 * normals(1, 3, 16, 16)).clamp(0, 255).to(torch.uint8)
    mean, variance = moments(image.expand(7, -1, -1, -1))
    assert variance.min() >= 0 and variance.max() < 1e-12
    torch.testing.assert_close(
        cosine(mean[None], inverse=True), image / 127.5 - 1, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow", "edm"])
def test_one_gaussian_is_its_exact_denoiser(name: str) -> None:
    cfg = gaussians(name=name)
    for t in (torch.tensor(value, dtype=torch.float64) for value in (1e-3, 0.2, 0.6, 1.0)):
        x = normals(5, 2, 3, 4, seed=3) * (1 + float(cfg.schedule(t).s))
        for k in range(3):
            weight = torch.zeros(5, 3, dtype=torch.float64)
            weight[:, k] = 1
            expected = exact(x, t, cfg.means[k], cfg.variances[k], cfg.schedule)
            torch.testing.assert_close(cfg.mix(x, t, weight), expected, rtol=1e-6, atol=1e-8)


def test_mix_is_linear_in_weights_of_any_sign() -> None:
    cfg, x, weight = gaussians(), normals(4, 2, 3, 4, seed=3), normals(4, 3, seed=4)
    t = torch.tensor(0.4, dtype=torch.float64)
    parts = [exact(x, t, cfg.means[k], cfg.variances[k], cfg.schedule) for k in range(3)]
    expected = sum(weight[:, k, None, None, None] * parts[k] for k in range(3))
    torch.testing.assert_close(cfg.mix(x, t, weight), expected)
    torch.testing.assert_close(cfg.mix(x, t, 0 * weight), torch.zeros_like(x))


def test_a_time_for_each_gives_each_row_what_that_time_for_all_gives_it() -> None:
    cfg, x, weight = gaussians(), normals(4, 2, 3, 4, seed=3), normals(4, 3, seed=4)
    t = torch.tensor([0.9, 1e-3, 0.4, 1.0], dtype=torch.float64)
    together = cfg.mix(x, t, weight)
    for i in range(4):
        torch.testing.assert_close(
            together[i : i + 1], cfg.mix(x[i : i + 1], t[i], weight[i : i + 1])
        )
    torch.testing.assert_close(cfg.mix(x, t[2].expand(4), weight), cfg.mix(x, t[2], weight))


def test_on_vectors_the_gaussians_are_the_components_of_the_oracle() -> None:
    cfg = gaussians(shape=(5,))
    oracle = GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]), cfg.means, cfg.variances.sqrt(), cfg.schedule
    )
    x, weight = normals(6, 5, seed=3), normals(6, 3, seed=4)
    for t in (
        torch.tensor(0.3, dtype=torch.float64),
        torch.linspace(1e-3, 1, 6, dtype=torch.float64),
    ):
        experts = torch.stack([oracle.expert(k)(x, t) for k in range(3)], dim=1)
        torch.testing.assert_close(cfg.mix(x, t, weight), (weight[:, :, None] * experts).sum(dim=1))


def test_where_no_signal_is_left_the_answer_is_the_mean() -> None:
    cfg, x = gaussians(name="rectified_flow"), 10 * normals(3, 2, 3, 4, seed=3)
    found = cfg.mix(x, torch.ones((), dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found, cosine(cfg.means, inverse=True))


@pytest.mark.parametrize(
    "name", ["vp_linear", "vp_cosine", "rectified_flow", "ve_exponential", "edm"]
)
def test_mix_is_accurate_in_float32_near_the_data(
    name: str,
) -> None:
    shape = (1, 4, 4)
    cfg = Gaussians(torch.full((1, *shape), 0.5), torch.ones(1, *shape), schedule(name))
    cfg.variances[..., 2] = 0
    y, t = normals(3, *shape, seed=3).float(), torch.tensor(1e-5, dtype=torch.float64)
    found = cosine(cfg.mix(cosine(y, inverse=True), t, torch.ones(3, 1)))
    assert found.dtype == torch.float32
    # f is a v / (a^2 v + s^2), and s is 0.041 at most there
    expected = torch.where(cfg.variances > 0, y, torch.full_like(y, 0.5))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_sums_in_float32_are_close_to_those_in_float64() -> None:
    cfg, x, weight = gaussians(name="edm"), normals(4, 2, 3, 4, seed=3), normals(4, 3, seed=4)
    for t in (1e-5, 1e-2, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        noisy = x * (1 + 80 * t)
        found = cfg.mix(noisy.float(), time, weight.float())
        torch.testing.assert_close(
            found.double(), cfg.mix(noisy, time, weight), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow", "edm"])
def test_the_posterior_and_its_rate_are_the_oracles(name: str) -> None:
    forward, pi = schedule(name), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    of = gaussians(3, (2, 3, 4), name)
    flat = of.means.flatten(1), of.variances.flatten(1).sqrt()
    oracle = GaussianMixture(pi, *flat, forward)
    for t in (0.9, 0.5, 0.2):
        time = torch.tensor(t, dtype=torch.float64)
        y = oracle.marginal(5, t, seed=3).double()
        x = cosine(y.reshape(5, 2, 3, 4), inverse=True)
        expected = oracle.posterior(y, time)
        torch.testing.assert_close(of.posterior(x, time, pi), expected)
        torch.testing.assert_close(of.posterior(x, time.expand(5), pi), expected)
        rate = oracle.posterior_rate(y, time)
        torch.testing.assert_close(of.posterior_rate(x, time, pi), rate)
        torch.testing.assert_close(of.posterior_rate(x, time.expand(5), pi), rate)


def test_the_posterior_is_finite_near_the_data_and_float32_in_float32() -> None:
    of = gaussians()
    x = normals(4, 2, 3, 4, seed=7).float()
    for t in (1e-4, 1.0):
        alpha = of.posterior(x, torch.tensor(t), torch.tensor([0.5, 0.25, 0.25]))
        assert alpha.dtype == torch.float32
        torch.testing.assert_close(alpha.sum(1), torch.ones(4))
