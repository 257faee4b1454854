"""An expert of one process used on another, against the oracle, whose denoisers are exact on both."""

import itertools
import math

import pytest
import torch

from ddm.conversion import Conversion, check_conversion, time_of
from ddm.errors import ConfigError
from ddm.grids import log_sigma
from ddm.oracle import GaussianMixture
from ddm.samplers import sample
from ddm.schedules import SCHEDULES, schedule
from router.routing import RoutedDenoiser

ALL = [schedule(name) for name in SCHEDULES]
TIMES = torch.tensor([1e-3, 0.02, 0.3, 0.7, 0.95, 0.995], dtype=torch.float64)


def mixture(name: str) -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.4, 0.6], dtype=torch.float64),
        means=torch.tensor([[-1.0, 0.3], [0.8, -0.5]], dtype=torch.float64),
        stds=torch.tensor([[0.2, 0.5], [0.4, 0.1]], dtype=torch.float64),
        schedule=schedule(name),
    )


@pytest.mark.parametrize("process", ALL, ids=SCHEDULES)
def test_a_time_is_found_by_its_noise_to_machine_precision(process: object) -> None:
    assert (time_of(log_sigma(TIMES, process), process) - TIMES).abs().max() < 1e-12


@pytest.mark.parametrize(("outer", "inner"), list(itertools.permutations(SCHEDULES, 2)))
def test_a_converted_denoiser_is_the_exact_one(outer: str, inner: str) -> None:
    there, here = mixture(inner), mixture(outer)
    convert = Conversion(here.schedule, there.schedule)
    noise = log_sigma(TIMES, here.schedule)
    times = TIMES[noise < log_sigma(torch.ones((), dtype=torch.float64), there.schedule)]
    assert len(times) >= 3
    x = here.marginal(len(times), 0.5, seed=0).double()
    for k in range(2):
        torch.testing.assert_close(
            there.expert(k)(*convert(x, times)), here.expert(k)(x, times), rtol=1e-8, atol=1e-8
        )
        one = convert(x, times[1])
        torch.testing.assert_close(
            there.expert(k)(*one), here.expert(k)(x, times[1]), rtol=1e-8, atol=1e-8
        )


def test_a_vp_linear_and_a_rectified_flow_expert_sample_as_two_of_vp_linear() -> None:
    ours, other = mixture("vp_linear"), mixture("rectified_flow")
    convert = Conversion(ours.schedule, other.schedule)
    pairs = {
        "alike": [ours.expert(0), ours.expert(1)],
        "mixed": [ours.expert(0), lambda x, t: other.expert(1)(*convert(x, t))],
        "not converted": [ours.expert(0), other.expert(1)],
    }
    start = ours.marginal(64, 1.0, seed=0).double()
    made = {}
    for name, experts in pairs.items():
        routed = RoutedDenoiser(experts, ours.posterior, "full")
        made[name] = sample(routed, start, ours.schedule, "heun", 20, "cosine")
    torch.testing.assert_close(made["mixed"], made["alike"], rtol=1e-9, atol=1e-9)
    assert (made["not converted"] - made["alike"]).abs().max() > 0.1


@pytest.mark.parametrize("inner", ALL, ids=SCHEDULES)
@pytest.mark.parametrize("outer", ALL, ids=SCHEDULES)
def test_a_conversion_is_finite_from_the_noise_to_the_data(outer: object, inner: object) -> None:
    convert = Conversion(outer, inner)
    for t in (0.0, 1e-6, 0.5, 1.0):
        x, t_inner = convert(torch.ones(2, 3), torch.tensor(t))
        assert x.isfinite().all() and x.dtype == torch.float32
        assert 0 < t_inner < 1


def test_an_expert_that_has_not_seen_the_noise_cannot_be_converted() -> None:
    for outer, inner in itertools.product(ALL, ALL):
        check_conversion(outer, inner)
    weak = schedule("vp_constant", beta=0.1)
    most = math.sqrt(math.expm1(0.1))
    with pytest.raises(ConfigError, match=rf"schedule must reach s/a = 20 .* at {most:.4g}"):
        check_conversion(schedule("vp_linear"), weak)
    check_conversion(weak, schedule("vp_linear"))
