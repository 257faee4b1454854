"""Where a sampler puts its steps."""

import re

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.grids import GRIDS, time_grid
from ddm.schedules import SCHEDULES, schedule


def log_snr(name: str, times: Tensor) -> Tensor:
    a, s, _, _ = schedule(name)(times)
    return (a**2 / s**2).log()


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_grid_falls_strictly_from_t_max_to_t_min(grid: str, schedule_name: str, steps: int) -> None:
    for t_min, t_max in ((0.0, 1.0), (0.0, 0.6), (1e-3, 1.0), (0.05, 0.9)):
        times = time_grid(grid, steps, schedule(schedule_name), t_min, t_max)
        assert (len(times), times.dtype) == (steps + 1, torch.float64)
        assert (float(times[0]), float(times[-1])) == pytest.approx((t_max, t_min), abs=1e-15)
        assert (times.diff() < 0).all()


def test_uniform_t_is_even_in_t() -> None:
    assert time_grid("uniform_t", 4, schedule("vp_linear")).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid("uniform_t", 3, schedule("vp_linear"), 0.2, 0.8).tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_quadratic_is_even_in_the_root_of_t() -> None:
    assert time_grid("quadratic", 4, schedule("vp_linear")).tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    assert time_grid("quadratic", 3, schedule("vp_linear"), 0.04, 0.64).tolist() == pytest.approx(
        [0.64, 0.36, 0.16, 0.04]
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_log_snr_is_even_in_log_snr(name: str) -> None:
    gaps = log_snr(name, time_grid("uniform_log_snr", 9, schedule(name), 0.01, 0.9)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-9, atol=0)


def test_uniform_log_snr_of_rectified_flow_is_a_logistic_curve() -> None:
    times = time_grid("uniform_log_snr", 4, schedule("rectified_flow"), 0.1, 0.9)
    expected = torch.sigmoid(torch.linspace(1, -1, 5, dtype=torch.float64) * torch.tensor(9.0).double().log())
    torch.testing.assert_close(times, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_log_snr_to_zero_is_even_as_far_as_a_thousandth(name: str) -> None:
    times = time_grid("uniform_log_snr", 9, schedule(name))
    assert float(times[-2]) == pytest.approx(1e-3, rel=1e-9)
    gaps = log_snr(name, times[1:-1]).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(7), rtol=1e-9, atol=0)


def test_uniform_log_snr_is_even_to_a_t_min_below_a_thousandth() -> None:
    gaps = log_snr("vp_linear", time_grid("uniform_log_snr", 9, schedule("vp_linear"), 1e-4, 0.9)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 5e-4), (2e-4, 9e-4), (0.9995, 1.0)])
def test_uniform_log_snr_falls_in_a_range_however_narrow(t_min: float, t_max: float) -> None:
    assert (time_grid("uniform_log_snr", 5, schedule("vp_linear"), t_min, t_max).diff() < 0).all()


@pytest.mark.parametrize(
    ("steps", "t_min", "t_max", "message"),
    [
        (0, 0.0, 1.0, "sample.steps must be at least 1, got 0"),
        (2.5, 0.0, 1.0, "sample.steps must be at least 1, got 2.5"),
        (5, -0.1, 1.0, "sample.t_min must be in [0, 1.0), got -0.1"),
        (5, 0.5, 0.5, "sample.t_min must be in [0, 0.5), got 0.5"),
        (5, float("nan"), 1.0, "sample.t_min must be in [0, 1.0), got nan"),
        (5, 0.0, 1.5, "sample.t_max must be at most 1, got 1.5"),
    ],
)
def test_steps_and_times_out_of_range_are_refused_by_name(steps: int, t_min: float, t_max: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        time_grid("uniform_t", steps, schedule("vp_linear"), t_min, t_max)


def test_an_unknown_grid_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^sample.grid must be one of uniform_t .*quadratic.*, got 'uniform'$"):
        time_grid("uniform", 5, schedule("vp_linear"))
