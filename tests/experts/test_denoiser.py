"""An expert as a denoiser: EDM's coefficients, and their effect near the data."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ddm.errors import ConfigError
from ddm.oracle import GaussianMixture
from ddm.schedules import SCHEDULES, schedule
from experts.denoiser import Denoiser, ExpertConfig, Parameterization, SeededDenoiser
from experts.unet import UNetConfig

SIGMA_DATA = 0.7


class Fake(nn.Module):
    """A network that is a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


def denoiser(
    function: Callable[[Tensor, Tensor], Tensor],
    name: str,
    parameterization: Parameterization = "preconditioned",
) -> Denoiser:
    return Denoiser(Fake(function), schedule(name), parameterization, SIGMA_DATA)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_preconditioning_is_table_1_of_edm(
    name: str,
) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) + t[:, None, None, None]

    t = torch.tensor([1e-4, 1e-2, 0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    x = images(len(t))
    c = schedule(name)(t)
    sigma, y = (c.s / c.a)[:, None, None, None], x / c.a[:, None, None, None]
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2) ** 0.5
    c_in = 1 / (SIGMA_DATA**2 + sigma**2) ** 0.5
    expected = c_skip * y + c_out * network(c_in * y, t)
    torch.testing.assert_close(denoiser(network, name)(x, t), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_preconditioned_denoiser_returns_its_input_at_0(
    name: str,
) -> None:
    x, t = images(3), torch.zeros((), dtype=torch.float64)
    a = schedule(name)(t).a
    out = denoiser(lambda y, _: 1e6 * torch.cos(y), name)(x, t)
    torch.testing.assert_close(out, x / a, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_network_errors_are_scaled_by_the_noise(name: str) -> None:
    t = torch.tensor([1e-10, 1e-6, 1e-3, 1e-2, 0.1], dtype=torch.float64)
    x = images(len(t))
    right, wrong = denoiser(lambda y, _: y, name)(x, t), denoiser(lambda y, _: y + 1, name)(x, t)
    error = (wrong - right).abs().amax(dim=(1, 2, 3))
    c = schedule(name)(t)
    assert (error <= c.s / c.a * (1 + 1e-6)).all()
    assert (error[1:] / error[:-1] > 1).all() and error[0] > 0
    # and at pure noise the network's answer is the image itself, in units of sigma_data
    last = denoiser(lambda y, _: torch.ones_like(y), "rectified_flow")(
        x, torch.ones((), dtype=torch.float64)
    )
    torch.testing.assert_close(last, torch.full_like(x, SIGMA_DATA))


def test_a_silent_network_is_the_best_denoiser_of_gaussian_data() -> None:
    """Against the oracle: F = 0 is exact for pixels from N(0, sigma_data^2)."""
    for name in SCHEDULES:
        zero = torch.zeros(1, 18, dtype=torch.float64)
        oracle = GaussianMixture(
            torch.ones(1, dtype=torch.float64), zero, zero + SIGMA_DATA, schedule(name)
        )
        t, x = torch.tensor([1e-3, 0.2, 0.6, 1.0], dtype=torch.float64), images(4)
        out = denoiser(lambda y, _: torch.zeros_like(y), name)(x, t)
        torch.testing.assert_close(out.flatten(1), oracle.denoise(x.flatten(1), t))


def test_raw_is_the_network_itself() -> None:
    t, x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), images(3)
    out = denoiser(lambda y, t: y**2 - t[:, None, None, None], "vp_linear", "raw")(x, t)
    torch.testing.assert_close(out, x**2 - t[:, None, None, None], rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_noise_and_the_velocity_give_the_image(name: str) -> None:
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = images(4), images(8)[4:]
    a, s, _, _ = schedule(name)(t).broadcast_to(x0)
    x, size = a * x0 + s * eps, (a**2 + s**2).sqrt()

    def answers(value: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def network(seen: Tensor, _: Tensor) -> Tensor:
            torch.testing.assert_close(seen, x / size)
            return value

        return network

    torch.testing.assert_close(denoiser(answers(eps), name, "epsilon")(x, t), x0)
    v = (a * eps - s * x0) / size
    torch.testing.assert_close(denoiser(answers(v), name, "v")(x, t), x0)


@pytest.mark.parametrize("parameterization", ["raw", "preconditioned", "epsilon", "v"])
def test_one_time_equals_a_time_per_image(
    parameterization: Parameterization,
) -> None:
    unet = UNetConfig(channels=8, multipliers=[1, 2], blocks=1, attention=[], dropout=0.3)
    expert = (
        ExpertConfig(unet=unet, parameterization=parameterization)
        .build([2, 4, 4], schedule("vp_linear"))
        .eval()
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.normal_(std=0.3)
        x = torch.randn(3, 2, 4, 4)
        each = expert(x, torch.full((3,), 0.3))
        assert each.std() > 0.1
        torch.testing.assert_close(expert(x, torch.tensor(0.3)), each)
        torch.testing.assert_close(
            expert(x, torch.tensor(0.3, dtype=torch.float64)), each
        )  # a sampler's time


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sigma_data", 0.0, "sigma_data must be in (0, 1000], got 0.0"),
        ("min_snr_gamma", -1.0, "min_snr_gamma must be above 0, got -1.0"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("t_min", 0.0, "t_min must be in (0, 1), got 0.0"),
        ("ema_decay", 1.0, "ema_decay must be in [0, 1), got 1.0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_key_rule_and_value(
    key: str, value: float, message: str
) -> None:
    ExpertConfig().check()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ExpertConfig(**{key: value}).check()  # type: ignore[arg-type]


def test_above_its_time_an_expert_is_the_seed_model() -> None:
    sizes: list[int] = []

    def constant(value: float) -> Denoiser:
        def network(x: Tensor, t: Tensor) -> Tensor:
            sizes.append(len(x))
            return torch.full_like(x, value) + t.reshape(-1, 1, 1, 1)

        return denoiser(network, "vp_linear", "raw")

    seeded = SeededDenoiser(constant(10), constant(20), above=0.6)
    times = torch.tensor([0.6, 0.7, 0.1, 1.0, 0.9], dtype=torch.float64)
    x = images(5)
    whole = seeded(x, times)
    expected = torch.tensor([10.6, 20.7, 10.1, 21.0, 20.9], dtype=torch.float64)
    torch.testing.assert_close(whole, expected.reshape(-1, 1, 1, 1).expand_as(x))
    assert sorted(sizes) == [2, 3]
    for t, value in zip(times, expected, strict=True):
        torch.testing.assert_close(seeded(x[:1], t), torch.full_like(x[:1], float(value)))
    sizes.clear()
    torch.testing.assert_close(seeded(x[:3], times[:3]), whole[:3])
    assert sizes == [2, 2]  # no network is compiled for one image


@pytest.mark.parametrize("t_max", [0.001, 0, 1.0, 2])
def test_a_last_time_that_cannot_be_is_refused(t_max: float) -> None:
    with pytest.raises(ConfigError, match=r"t_max must be in \(t_min = 0.001, 1\), or null, got"):
        ExpertConfig(t_max=t_max).check()
