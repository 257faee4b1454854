import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddm.editing import Given, keep, noised, resampled, slerp
from ddm.grids import time_grid
from ddm.rng import RngStream, normal
from ddm.samplers import SAMPLERS, drive, sampler
from ddm.schedules import schedule
from tests.ddm.sampler_problems import ENDS_WITHOUT_SIGNAL, STOCHASTIC

VP = schedule("vp_linear")
RHO = 0.9  # of the two pixels of an image
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The denoiser of images of two pixels from N(0, COVARIANCE)."""
    c = VP(t)
    gain = c.a * COVARIANCE @ torch.linalg.inv(c.a**2 * COVARIANCE + c.s**2 * torch.eye(2))
    return (x.flatten(1) @ gain.T).reshape(x.shape)


def inpainted(name: str, steps: int, repeats: int, known: float, n: int = 4000) -> Tensor:
    """The second pixel where the first is known, n times."""
    image = torch.tensor([known, 77.0], dtype=torch.float64).reshape(1, 1, 1, 2).expand(n, 1, 1, 2)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 2).expand(n, 1, 1, 2)
    given = Given(image, mask)
    method, times = resampled(sampler(name), time_grid("cosine", steps, VP), repeats)

    def noise(step: int) -> Tensor:
        return normal(0, RngStream.STEP, torch.arange(n), step, (1, 1, 2)).double()

    eps = normal(0, RngStream.START, torch.arange(n), 0, (1, 1, 2)).double()
    start = noised(given, eps, VP(times[0]), whole=False)
    trajectory = method.trajectory(start, VP, times, noise)
    x, calls = drive(trajectory, lambda x, t: keep(given, exact(x, t)))
    assert calls == steps * repeats
    assert torch.allclose(x[..., 0], torch.tensor(known, dtype=torch.float64), atol=1e-6)
    return x[..., 1].flatten()


@pytest.mark.parametrize("name", ["ddim", "ipndm", "ddpm"])
def test_resampling_brings_inpainting_to_the_conditional_law(name: str) -> None:
    known = 1.5
    errors = []
    for repeats in (1, 4, 16):
        found = inpainted(name, 12, repeats, known)
        mean_error = abs(float(found.mean()) - RHO * known)
        std_error = abs(float(found.std()) - math.sqrt(1 - RHO**2))
        errors.append(mean_error + std_error)
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[0] > 0.3 and errors[2] < 0.2, errors


def test_a_kept_pixel_stays_on_the_way_of_its_own_noise() -> None:
    image = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    given = Given(image, torch.zeros(3, 1, 4, 4, dtype=torch.float64))
    eps = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    times = time_grid("cosine", 7, VP, t_min=0.01, t_max=0.8)
    for name in ("ddim", "dpmpp_2m", "unipc", "ipndm"):
        seen: list[tuple[Tensor, Tensor]] = []

        def denoise(x: Tensor, t: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> Tensor:
            seen.append((x, t))
            return keep(given, x.sin())

        start = noised(given, eps, VP(times[0]), whole=True)
        drive(sampler(name).trajectory(start, VP, times, lambda n: eps), denoise)
        assert len(seen) == 7
        for x, t in seen:
            c = VP(t)
            torch.testing.assert_close(x, c.a * image + c.s * eps)


def test_a_soft_mask_blends() -> None:
    image, denoised = torch.full((1, 2, 1, 1), -1.0), torch.ones(1, 2, 1, 1)
    assert keep(Given(image, torch.full((1, 1, 1, 1), 0.25)), denoised).flatten().tolist() == [
        -0.5,
        -0.5,
    ]
    assert keep(Given(image), denoised) is denoised


def test_what_is_hidden_is_noise_alone_unless_it_is_wanted() -> None:
    image, eps = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    given = Given(image, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    c = schedule("ve_exponential")(torch.ones(()))
    assert noised(given, eps, c, whole=False).flatten().tolist() == [1, 0]
    assert noised(given, eps, c, whole=True).flatten().tolist() == [1, 1]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", ["vp_linear", "rectified_flow", "edm"])
def test_every_sampler_can_repeat_its_steps(name: str, process: str) -> None:
    """One point of data: where the denoiser knows it, every repetition ends there."""
    path = schedule(process)
    if sampler(name).lacks(path, torch.linspace(1, 0, 6)[:-1].double()):
        assert process in ENDS_WITHOUT_SIGNAL or process == "edm"
        return
    times = time_grid("edm" if process == "edm" else "quadratic", 5, path)
    method, visits = resampled(sampler(name), times, 3)
    drawn: list[int] = []

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return normal(0, RngStream.STEP, torch.arange(2), step, (2,)).double()

    point = torch.tensor([0.4, -0.7], dtype=torch.float64)
    start = path(times[0]).s * noise(1000)
    x, _ = drive(
        method.trajectory(start, path, visits, noise), lambda x, t: point.expand_as(x).clone()
    )
    assert [float(t) for t in visits[:4]] == [float(times[n]) for n in (0, 0, 0, 1)]
    assert len(set(drawn)) == len(drawn), "a noise is used twice"
    assert len(drawn) - 1 >= (5 * 2 if name not in STOCHASTIC else 5 * 2 + 4 * 3)
    # Euler's method alone is not exact for a constant denoised image.
    torch.testing.assert_close(
        x, point.expand_as(x), rtol=0, atol=0.05 if name == "euler" else 1e-7
    )


def test_one_repeat_is_the_sampler_itself() -> None:
    method, times = resampled(sampler("unipc"), time_grid("cosine", 5, VP), 1)
    assert method == sampler("unipc") or method.step.func is sampler("unipc").step.func
    assert torch.equal(torch.stack(times), time_grid("cosine", 5, VP))


def test_the_great_circle_keeps_the_length_of_noise() -> None:
    noises = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    first, last = torch.nn.functional.normalize(noises.flatten(1)).reshape(noises.shape) * 14
    way = slerp(first, last, torch.linspace(0, 1, 5))
    torch.testing.assert_close(way[0], first)
    torch.testing.assert_close(way[-1], last)
    torch.testing.assert_close(way.flatten(1).norm(dim=1), torch.full((5,), 14.0).double())
    cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairwise(way)]
    torch.testing.assert_close(torch.stack(cosines), cosines[0].expand(4))
    assert torch.equal(slerp(first, first, torch.tensor([0.3]))[0], first)
