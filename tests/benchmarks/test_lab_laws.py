"""The exact laws of the laboratory, against Monte Carlo, quadrature and each other."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from benchmarks.lab import densities, laws, processes, score_errors
from benchmarks.lab.laws import (
    METHODS,
    Law,
    Tabled,
    affine,
    exact_denoiser,
    gaussian,
    kl,
    outcome,
    w2_square,
    walker,
)
from ddm.grids import time_grid
from ddm.samplers import drive, sampler
from ddm.schedules import TwoPhase

ONE = torch.ones(1, dtype=torch.float64)


@pytest.fixture(scope="module")
def sixteen() -> dict[tuple[str, int], tuple[float, float]]:
    """KL in 16 dimensions, from N(0, 1) and from the true x_1."""
    wanted = {
        (name, T)
        for name in ("ddpm as proven", "ddim", "ddim as proven", "accelerated_sde")
        for T in (1600, 6400)
    }
    wanted |= {(name, 800) for name in ("ddim", "ddim as proven", "accelerated_ode")}
    found = {}
    for name, T in wanted:
        result = outcome(METHODS[name], gaussian(16, seed=1), T)
        found[name, T] = (float(result.kl.sum()), float(result.kl_from_true.sum()))
    return found


@pytest.mark.parametrize(
    ("name", "least"),
    [("ddpm as proven", 1.6), ("ddim", 1.4), ("ddim as proven", 1.4), ("accelerated_sde", 3.3)],
)
def test_kl_falls_with_the_proven_slope(sixteen, name, least):
    slope = math.log(sixteen[name, 1600][0] / sixteen[name, 6400][0]) / math.log(4)
    assert least <= slope <= (4 if name == "accelerated_sde" else 2)


def test_accelerated_ode_leads_ddim_as_proven_by_1000_and_ddim_by_less(sixteen):
    ours = sixteen["accelerated_ode", 800][0]
    assert sixteen["ddim as proven", 800][0] > 1000 * ours
    assert 10 * ours < sixteen["ddim", 800][0] < 100 * ours


@pytest.mark.parametrize("name", list(METHODS))
def test_law_matches_simulation(name):
    T, n = 20, 200_000
    schedule = TwoPhase(T, c0=2, c1=2)
    times = time_grid("own", T, schedule, t_min=1 / T)
    data = Law(torch.tensor([0.7, -1.0]), torch.tensor([0.3, 1.2]) ** 2)
    data = Law(*(part.double() for part in data))
    method, tabled, start = (
        METHODS[name],
        Tabled(schedule, times),
        Law(0 * data.mean, 1 + 0 * data.mean),
    )
    law = affine(method.trajectory, exact_denoiser(data, tabled), tabled, times, method.draws, 2)(
        start
    )
    generator = torch.Generator().manual_seed(0)

    def noise(_):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    x, _ = drive(
        method.trajectory(noise(0), schedule, times, noise), exact_denoiser(data, schedule)
    )
    assert torch.allclose(x.mean(0), law.mean, atol=6 * float(law.variance.max() / n) ** 0.5)
    assert torch.allclose(x.var(0), law.variance, rtol=6 * (2 / n) ** 0.5)


@pytest.mark.parametrize("apart", [1e-7, 1e-3, 0.02, 0.05, 1.5])
def test_kl_is_its_integral_for_close_laws(apart):
    p, q = Law(0.3 * ONE, 0.5 * ONE), Law((0.3 + apart) * ONE, 0.5 * (1 + apart) * ONE)
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log_r = (
        torch.log(p.variance / q.variance) / 2
        + (x - p.mean) ** 2 / (2 * p.variance)
        - (x - q.mean) ** 2 / (2 * q.variance)
    )
    log_p = -((x - p.mean) ** 2) / (2 * p.variance) - torch.log(2 * math.pi * p.variance) / 2
    assert float(kl(p, q)) == pytest.approx(densities.kl_of(log_p, log_r, x), rel=1e-6)


def test_w2_of_gaussians_on_a_line():
    assert float(w2_square(Law(ONE, 4 * ONE), Law(3 * ONE, 9 * ONE))) == pytest.approx(2**2 + 1**2)


@pytest.mark.parametrize("name", list(densities.SAMPLERS))
def test_density_on_a_gaussian_is_the_exact_law(name):
    rows = {row["sampler"]: row for row in densities.check(0.1, 50)}
    assert rows[name]["kl"] == pytest.approx(rows[name]["exact"], rel=1e-6)


def test_density_of_ddpm_on_a_mixture_matches_simulation():
    T, n = 30, 200_000
    data, times = densities._setting(0.2, T)
    y, log_r = densities.evolved("ddpm as proven", data, times)
    q = (densities.log_density(data, times[-1])(y) + log_r).exp()
    generator = torch.Generator().manual_seed(0)

    def noise(_):
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    x, _ = drive(walker("ddpm as proven")(noise(0), data.schedule, times, noise), data.denoise)
    for power in (1, 2, 4):
        sampled = x**power
        assert float(torch.trapezoid(q * y**power, y)) == pytest.approx(
            float(sampled.mean()), abs=5 * float(sampled.std()) / n**0.5
        )


def test_denoised_and_its_slope_are_those_of_the_oracle():
    data, times = densities._setting(0.2, 30)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    exact = data.denoise(x[:, None], times[15])[:, 0]
    D, slope = densities.denoised(data, x.detach(), times[15])
    assert torch.allclose(D, exact.detach(), rtol=1e-12)
    assert torch.allclose(slope, torch.autograd.grad(exact.sum(), x)[0], rtol=1e-10)


def test_accelerated_sde_shifts_the_mean_by_the_curvature_of_the_score():
    data, times = densities._setting(0.5, 400)
    step, t = times[200:202], times[200]
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    c, c_next = data.schedule(step[0]), data.schedule(step[1])
    r, nodes, weights = c.a / c_next.a, densities.NODES, densities.WEIGHTS
    asked = x[:, None] + ((1 - r**2) / 2).sqrt() * nodes
    means, _ = drive(
        sampler("accelerated_sde").trajectory(
            asked.reshape(-1, 1), data.schedule, step, lambda n: torch.zeros(())
        ),
        data.denoise,
    )
    mean = (means.reshape(asked.shape) * weights).sum(1)
    score = densities.score(data, x, t)[0]
    exact = (x + (1 - r**2) * score) / r
    h = 1e-4
    curvature = (
        (densities.score(data, x + h, t)[1] - densities.score(data, x - h, t)[1]) / (2 * h) / c.s**2
    )
    assert torch.allclose((mean - exact) * r, (1 - r**2) ** 2 / 4 * curvature, rtol=0.05, atol=1e-7)


def test_exponential_integrator_on_ve_is_ddpm():
    process = processes.PROCESSES[6]
    times = torch.linspace(1, 0, 31, dtype=torch.float64)
    schedule = Tabled(process.at(3.0), times)
    data, s = processes._data(), schedule(times[0]).s[None]
    walked = affine(
        walker("ddpm as proven"), exact_denoiser(data, schedule), schedule, times[:-1], 1, 1
    )
    law = walked(Law(0 * s, s**2))
    last = (
        schedule(times[-2]).s ** 2
    )  # the scheme's last step, to t = 0, which DDPM replaces by the denoised image
    variance = processes.STD**2 + last
    end = Law(
        law.mean - last / variance * (law.mean - processes.MEAN),
        (1 - last / variance) ** 2 * law.variance + last,
    )
    assert float(w2_square(end, data).sqrt()) == pytest.approx(
        processes.exponential_integrator(process, 3.0, 30), rel=1e-9
    )


@pytest.mark.parametrize("answer", [2, 3, 17, 64, 90])
def test_fewest_steps_are_found(answer):
    assert processes.fewest(lambda n: 1 / n, 1 / answer, most=90) == answer
    assert processes.fewest(lambda n: 1 / n, 1 / 91, most=90) is None


def test_score_error_has_the_size_that_it_claims():
    path, d = TwoPhase(50), 16
    data, t = gaussian(d, seed=0), torch.tensor(0.4, dtype=torch.float64)
    c, zero = path(t), torch.zeros(d, dtype=torch.float64)
    law, size = data.at(c), 0.3 / math.sqrt(d)
    x = law.mean + law.variance.sqrt() * torch.randn(200_000, d, dtype=torch.float64)
    for shift, slope in ((zero + size, zero), (zero, zero + size)):
        off = score_errors.erring(data, path, shift, slope)(x, t) - exact_denoiser(data, path)(x, t)
        e = c.a * off / c.s**2
        assert float(e.square().sum(1).mean().sqrt()) == pytest.approx(0.3, rel=0.01)


def test_quadrature_fit_finds_its_constant():
    eps = [0.01, 0.1, 1.0]
    fit = score_errors.quadrature_fit(eps, [math.hypot(0.2, 3 * e) for e in eps], 0.2)
    assert pytest.approx(3, rel=1e-4) == fit.C and fit.worst == pytest.approx(1, abs=1e-4)


def test_the_exact_denoiser_is_the_conditional_mean():
    schedule = TwoPhase(50)
    t = torch.tensor(0.5, dtype=torch.float64)
    law = Law(0.7 * ONE, 0.04 * ONE)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    a, s, _, _ = schedule(t)
    expected = 0.7 + a * 0.04 / (a**2 * 0.04 + s**2) * (x - a * 0.7)
    assert torch.allclose(exact_denoiser(law, schedule)(x, t), expected, rtol=1e-12)


def test_tables_and_figures_of_small_measurements():
    small = {
        laws: laws.measure(steps=(20, 40, 80, 160), dimensions=(1, 16)),
        densities: densities.measure(
            steps=(20, 40, 80), stds=(0.5, 0.3), samplers=("ddpm as proven", "ddim"), checked=40
        ),
        processes: processes.measure(ratios=(4.0, 8.0, 16.0, 32.0), count=8),
        score_errors: score_errors.measure(
            T=40, eps=(0.01, 0.1, 1.0), dimensions=(1, 4), routed_steps=(4, 8), paths=16
        ),
    }
    for module, numbers in small.items():
        rendered = module.render(numbers)
        for text in rendered.tables.values():
            assert "nan" not in text.lower().split()
        for figure in rendered.figures.values():
            plt.close(figure)
