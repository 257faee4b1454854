"""The exact posterior and its rate against float64 sums over all images."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import router.targets
from ddm.schedules import SCHEDULES, Coeffs, schedule
from router.targets import exact_posterior, exact_posterior_rate, weights_of_images

TIMES = [1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0]
LINEAR = schedule("vp_linear")


def brute_force(
    x0: Tensor, eps: Tensor, c: Coeffs, points: Tensor, labels: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`alpha`, `dalpha` at one x_t, an image at a time, in float64: the g_i of DESIGN, section 2,
    as they stand there.
    """
    a, s, da, ds = c
    x, dx = a * x0 + s * eps, da * x0 + ds * eps
    residual = x - a * points
    square = residual.square().sum(dim=1)
    g = -(residual * (dx - da * points)).sum(dim=1) / s**2 + square * ds / s**3
    w = torch.exp(-(square - square.min()) / (2 * s**2))
    r = w / w.sum()
    change = r * (g - (r * g).sum())
    return (
        torch.stack([r[labels == cluster].sum() for cluster in range(k)]),
        torch.stack([change[labels == cluster].sum() for cluster in range(k)]),
    )


def check_against_brute_force(images: Tensor, labels: Tensor, name: str = "vp_linear") -> Tensor:
    """Compare both targets at `TIMES`, along paths from images of the set; returns dalpha, brute
    force's.
    """
    k, b = int(labels.max()) + 1, len(TIMES)
    generator = torch.Generator().manual_seed(1)
    x0 = (
        images[torch.randint(len(images), (b,), generator=generator)].float() / 127.5 - 1
    ).contiguous()
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.tensor(TIMES, dtype=torch.float64)
    if name == "rectified_flow":
        t = t.clamp_max(0.99)
    c = schedule(name)(t)
    points = (images.float() / 127.5 - 1).double().flatten(1)
    rows = [
        brute_force(
            x0[i].double().flatten(),
            eps[i].double().flatten(),
            Coeffs(*(v[i] for v in c)),
            points,
            labels,
            k,
        )
        for i in range(b)
    ]
    alpha, dalpha = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    a, s, _, _ = c.broadcast_to(x0)
    posterior = exact_posterior(
        a * x0.double() + s * eps.double(), t, images, labels, schedule(name)
    )
    with_rate, rate = exact_posterior_rate(x0, eps, t, images, labels, schedule(name))
    assert posterior.dtype == with_rate.dtype == rate.dtype == torch.float32
    torch.testing.assert_close(posterior.double(), alpha, rtol=0, atol=1e-4)
    torch.testing.assert_close(with_rate.double(), alpha, rtol=0, atol=1e-4)
    torch.testing.assert_close(rate.double(), dalpha, rtol=1e-6, atol=1e-4)
    return dalpha


def noise_images(n: int = 60, side: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 images of independent pixels, with every second one all but the one before it; 3
    clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, side, side), generator=generator)
    nudge = torch.randint(-2, 3, (n // 2, 1, side, side), generator=generator)
    images[1::2] = (images[::2] + nudge).clamp(0, 255)
    return images.to(torch.uint8), torch.arange(n) % 3


def smooth_images(n: int = 300) -> tuple[Tensor, Tensor]:
    """uint8 `[n, 3, 32, 32]`: blurred noise of many strengths, a few much alike."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(n, 3, 4, 4, generator=generator) * torch.rand(
        n, 1, 1, 1, generator=generator
    )
    images = torch.nn.functional.interpolate(
        coarse, size=(32, 32), mode="bilinear", align_corners=False
    )
    return (images * 60 + 128).clamp(0, 255).to(torch.uint8), torch.randint(
        4, (n,), generator=generator
    )


def point_clusters() -> tuple[Tensor, Tensor]:
    """Twelve float points of 3 coordinates in 3 clusters, near enough to be confused at most times."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(12, 3, generator=generator).clamp(-1, 1), torch.arange(12) % 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_targets_equal_brute_force_on_noise_with_near_twins(name: str) -> None:
    images, labels = noise_images()
    assert check_against_brute_force(images, labels, name).abs().max() > 1


def test_both_targets_equal_brute_force_on_the_digits() -> None:
    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round()).to(torch.uint8)[:, None]
    assert check_against_brute_force(images, torch.from_numpy(digits.target) // 2).abs().max() > 0.1


def test_both_targets_equal_brute_force_on_smooth_images_of_3072_numbers() -> None:
    assert check_against_brute_force(*smooth_images()).abs().max() > 0.5


def products_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.targets, "_slow_float64", lambda _: True)


@pytest.mark.data
@pytest.mark.parametrize("apart", [False, True])
def test_both_targets_equal_brute_force_on_real_images(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        products_apart(monkeypatch)
    folder = (
        Path(os.environ.get("DDM_DATA", Path(__file__).parents[2] / "data")) / "cifar-10-batches-py"
    )
    if not folder.is_dir():
        pytest.skip(
            f"CIFAR-10 is not in {folder.parent}: set DDM_DATA to the folder that holds cifar-10-batches-py"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy, about how CIFAR-10's pickles name their types
        batch = pickle.loads((folder / "data_batch_1").read_bytes(), encoding="bytes")
    images = torch.tensor(batch[b"data"][:2000]).reshape(-1, 3, 32, 32)
    labels = torch.tensor(batch[b"labels"][:2000])
    assert check_against_brute_force(images, labels).abs().max() > 0.5


def test_the_rate_is_the_finite_difference_of_the_posterior() -> None:
    points, labels = point_clusters()
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8], dtype=torch.float64)
    x0 = points[torch.randint(len(points), (len(t),), generator=generator)].double()
    eps = torch.randn(len(t), 3, generator=generator, dtype=torch.float64)

    def along(t: Tensor) -> Tensor:
        a, s, _, _ = LINEAR(t).broadcast_to(x0)
        return exact_posterior(a * x0 + s * eps, t, points, labels, LINEAR).double()

    h = 4e-3  # of fourth order, because the answers are float32
    by_difference = (8 * (along(t + h) - along(t - h)) - along(t + 2 * h) + along(t - 2 * h)) / (
        12 * h
    )
    alpha, rate = exact_posterior_rate(x0, eps, t, points, labels, LINEAR)
    assert rate.abs().amax(dim=1).min() > 0.01 and rate.abs().max() > 0.5
    torch.testing.assert_close(rate.double(), by_difference, rtol=1e-3, atol=5e-4)
    torch.testing.assert_close(alpha.double(), along(t))


def test_the_mean_rate_is_the_total_derivative() -> None:
    """`E[dalpha | x_t] = d_t alpha + grad alpha . v`: what a network fitted to the rate learns has
    to be integrated.
    """
    data = torch.tensor([-0.9, -0.5, -0.2, 0.1, 0.4, 0.8], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 2, 1])

    def weights(x: Tensor, t: Tensor) -> Tensor:
        a, s, _, _ = LINEAR(t)
        return torch.softmax(-((x - a * data) ** 2) / (2 * s**2), dim=0)

    def posterior(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([weights(x, t)[labels == k].sum() for k in range(3)])

    for x, t in ((0.3, 0.2), (-0.4, 0.3), (0.05, 0.45), (1.1, 0.6)):
        x_t, time = torch.tensor(x, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
        a, s, da, ds = LINEAR(time)
        r = weights(x_t, time)
        eps = (
            x_t - a * data
        ) / s  # given x_t, x0 is data[i] with probability r[i], and this is its noise
        v = (r * (da * data + ds * eps)).sum()
        _, rate = exact_posterior_rate(
            data[:, None], eps[:, None], time, data[:, None], labels, LINEAR
        )
        mean = r @ rate.double()
        h = 1e-5
        total = (posterior(x_t + h * v, time + h) - posterior(x_t - h * v, time - h)) / (2 * h)
        torch.testing.assert_close(mean, total, rtol=1e-5, atol=1e-6)
        assert (
            rate.double() - mean
        ).abs().max() > 0.02 and total.abs().max() > 0.01  # it took an average


def paths(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps and t of a few paths on which nothing is certain."""
    t = torch.tensor([1e-3, 0.02, 0.3, 0.6, 0.9])
    x0 = images[: 2 * len(t) : 2].float() / 127.5 - 1
    return x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)), t


def test_the_size_of_the_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = noise_images()
    x0, eps, t = paths(images)
    whole = (
        exact_posterior(x0 + eps, t, images, labels, LINEAR),
        *exact_posterior_rate(x0, eps, t, images, labels, LINEAR),
    )
    for chunk in (1, 7):
        monkeypatch.setattr(router.targets, "_chunk", lambda _, chunk=chunk: chunk)
        parts = (
            exact_posterior(x0 + eps, t, images, labels, LINEAR),
            *exact_posterior_rate(x0, eps, t, images, labels, LINEAR),
        )
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert whole[2].abs().max() > 0.5


def test_an_empty_cluster_gets_no_alpha() -> None:
    images, labels = noise_images()
    x0, eps, t = paths(images)
    alpha, rate = exact_posterior_rate(x0, eps, t, images, labels, LINEAR, k=5)
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(len(t)), rtol=0, atol=1e-6)
    torch.testing.assert_close(rate.sum(dim=1), torch.zeros(len(t)), rtol=0, atol=1e-5)
    assert alpha.min() >= 0 and rate.abs().max() > 0.5
    for empty in (alpha, rate, exact_posterior(x0, t, images, labels, LINEAR, k=5)):
        torch.testing.assert_close(empty[:, 3:], torch.zeros(len(t), 2), rtol=0, atol=0)


def test_under_pure_noise_alpha_is_pi() -> None:
    """Against a closed form: under pure noise (a = 0) the posterior is the clusters' shares, and
    does not move with x.
    """
    images, _ = noise_images()
    labels = (torch.arange(60) >= 15).long() + (torch.arange(60) >= 45).long()  # 15, 30, 15 images
    x = 5 * torch.randn(4, 1, 4, 4)
    alpha = exact_posterior(x, torch.tensor(1.0), images, labels, schedule("rectified_flow"))
    torch.testing.assert_close(alpha, torch.tensor([0.25, 0.5, 0.25]).expand(4, -1))


def test_an_image_of_twice_the_weight_counts_as_two() -> None:
    images, labels = noise_images()
    k = int(labels.max()) + 1
    t = torch.tensor(TIMES)
    x0 = images[: len(t)].float() / 127.5 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    pi = torch.bincount(labels).double()
    pi[0] *= 2
    weights = weights_of_images(pi / pi.sum(), labels)
    first = labels == 0
    twice = torch.cat([images, images[first]]), torch.cat([labels, labels[first]])
    found = exact_posterior_rate(x0, eps, t, images, labels, LINEAR, k, weights)
    expected = exact_posterior_rate(x0, eps, t, *twice, LINEAR, k)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    a, s, _, _ = LINEAR(t).broadcast_to(x0)
    x = a * x0 + s * eps
    torch.testing.assert_close(
        exact_posterior(x, t, images, labels, LINEAR, k, weights),
        exact_posterior(x, t, *twice, LINEAR, k),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weights_that_count_images_need_no_factor() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    assert weights_of_images(torch.tensor([1, 2, 3]) / 6, labels) is None
    weights = weights_of_images(torch.tensor([0.5, 0.25, 0.25]), labels)
    assert weights is not None and weights[labels].sum() == pytest.approx(1)


def test_far_from_all_data_the_nearest_image_wins() -> None:
    """Every w_i is below the smallest float64 there; their shares are not."""
    points = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.5, 1.0]])
    x, t = torch.tensor([[-30.0, -30.0], [40.0, -40.0]]), torch.tensor([0.05, 0.2])
    a, s, _, _ = LINEAR(t.double()).broadcast_to(x)
    square = (x.double()[:, None] - a[:, :, None] * points.double()).square().sum(dim=2)
    assert (square / (2 * s**2)).min() > 745
    expected = torch.softmax(-square / (2 * s**2), dim=1)
    alpha = exact_posterior(x, t, points, torch.arange(3), LINEAR)
    torch.testing.assert_close(alpha.double(), expected, rtol=0, atol=1e-4)


def test_bytes_and_the_numbers_they_stand_for_give_the_same() -> None:
    images, labels = noise_images()
    x0, eps, t = paths(images)
    numbers = images.float() / 127.5 - 1
    of_bytes = exact_posterior_rate(x0, eps, t, images, labels, LINEAR)
    of_numbers = exact_posterior_rate(x0, eps, t, numbers, labels, LINEAR)
    for found, expected in zip(of_numbers, of_bytes, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    expected = exact_posterior(x0 + eps, t, images, labels, LINEAR)
    torch.testing.assert_close(
        exact_posterior(x0 + eps, t, numbers, labels, LINEAR), expected, rtol=0, atol=1e-5
    )
    assert ((expected > 0.01) & (expected < 0.99)).any()


def test_one_time_for_all_gives_what_the_same_time_for_each_gives() -> None:
    images, labels = noise_images()
    x0, eps, _ = paths(images)
    one, each = torch.tensor(0.5), torch.full((len(x0),), 0.5)
    torch.testing.assert_close(
        exact_posterior(x0 + eps, one, images, labels, LINEAR),
        exact_posterior(x0 + eps, each, images, labels, LINEAR),
    )
    for found, expected in zip(
        exact_posterior_rate(x0, eps, one, images, labels, LINEAR),
        exact_posterior_rate(x0, eps, each, images, labels, LINEAR),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_products_taken_apart_equal_brute_force_on_near_twins(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    products_apart(monkeypatch)
    check_against_brute_force(*noise_images(), name)


def test_products_taken_apart_equal_brute_force_on_3072_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products_apart(monkeypatch)
    assert check_against_brute_force(*smooth_images()).abs().max() > 0.5


def test_products_taken_apart_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-9, though the sums are float32: none of them is rounded, even under autocast."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (40, 1700), dtype=torch.uint8, generator=generator)
    images[0], images[1] = 0, 255
    queries = torch.randn(9, 1700, dtype=torch.float64, generator=generator)
    queries[0], queries[1, 1:], queries[2] = 0.0, 1e-6, 1e6
    square, dots = router.targets._multiplier(queries, images)(images)
    products_apart(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        split_square, split_dots = router.targets._multiplier(queries, images)(images)
    torch.testing.assert_close(split_square, square, rtol=1e-14, atol=0)
    largest = queries.abs().amax(dim=1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(split_dots / largest, dots / largest, rtol=0, atol=2e-8)


def test_autocast_to_bf16_around_the_call_changes_nothing() -> None:
    images, labels = noise_images()
    x0, eps, t = paths(images)
    plain = (
        exact_posterior(x0 + eps, t, images, labels, LINEAR),
        *exact_posterior_rate(x0, eps, t, images, labels, LINEAR),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
        cast = (
            exact_posterior(x0 + eps, t, images, labels, LINEAR),
            *exact_posterior_rate(x0, eps, t, images, labels, LINEAR),
        )
    for found, expected in zip(cast, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_targets_are_finite_in_float32_everywhere(
    name: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(30, 1, 4, 4, generator=generator) * 2 - 1, torch.arange(30) % 3
    t = torch.logspace(-5, 0, 12)
    x0, eps = images[:12], torch.randn(12, 1, 4, 4, generator=generator)
    c = schedule(name)(t).broadcast_to(x0)
    alpha, dalpha = exact_posterior_rate(x0, eps, t, images, labels, schedule(name))
    at_x = exact_posterior(c.a * x0 + c.s * eps, t, images, labels, schedule(name))
    for part, total in ((alpha, 1.0), (at_x, 1.0), (dalpha, 0.0)):
        assert part.isfinite().all()
        assert (part.sum(dim=1) - total).abs().max() <= 1e-5 * max(1.0, float(part.abs().max()))
