"""Where a sampler puts its steps."""

import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.grids import GRIDS, check_grid, time_grid
from ddm.schedules import SCHEDULES, Discrete, schedule

ANY_SCHEDULE = [grid for grid in GRIDS if grid != "own"]
ENDS_WITHOUT_SIGNAL = ("vp_cosine", "rectified_flow")  # a(1) = 0


def log_snr(name: str, times: Tensor) -> Tensor:
    a, s, _, _ = schedule(name)(times)
    return (a**2 / s**2).log()


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("grid", ANY_SCHEDULE)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_grid_falls_strictly_from_t_max_to_t_min(
    grid: str, schedule_name: str, steps: int
) -> None:
    for t_min, t_max in ((0.0, 1.0), (0.0, 0.6), (1e-3, 1.0), (0.05, 0.9)):
        times = time_grid(grid, steps, schedule(schedule_name), t_min, t_max)
        assert (len(times), times.dtype) == (steps + 1, torch.float64)
        assert (float(times[0]), float(times[-1])) == pytest.approx((t_max, t_min), abs=1e-15)
        assert (times.diff() < 0).all()


def test_uniform_t_is_even_in_t() -> None:
    assert time_grid("uniform_t", 4, schedule("vp_linear")).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid("uniform_t", 3, schedule("vp_linear"), 0.2, 0.8).tolist() == pytest.approx(
        [0.8, 0.6, 0.4, 0.2]
    )


def test_quadratic_is_even_in_the_root_of_t() -> None:
    assert time_grid("quadratic", 4, schedule("vp_linear")).tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    assert time_grid("quadratic", 3, schedule("vp_linear"), 0.04, 0.64).tolist() == pytest.approx(
        [0.64, 0.36, 0.16, 0.04]
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_edm_is_even_in_the_seventh_root_of_noise_over_signal(name: str) -> None:
    for steps, t_min, t_max in ((1, 0.01, 0.9), (2, 1e-4, 0.9), (9, 0.01, 0.9)):
        roots = (-log_snr(name, time_grid("edm", steps, schedule(name), t_min, t_max)) / 14).exp()
        expected = torch.linspace(float(roots[0]), float(roots[-1]), steps + 1, dtype=torch.float64)
        torch.testing.assert_close(roots, expected, rtol=1e-9, atol=0)


def test_the_edm_grid_of_the_edm_schedule_is_the_published_one() -> None:
    # arXiv 2206.00364, eq. 5, rho = 7: sigma_i for i < N from sigma_max to 0.002, and a last step
    # to 0
    for n, sigma_max in ((18, 80.0), (10, 50.0)):
        first, last = sigma_max ** (1 / 7), 0.002 ** (1 / 7)
        sigmas = [(first + i / (n - 1) * (last - first)) ** 7 for i in range(n)]
        process = schedule("edm", sigma_max=sigma_max)
        times = time_grid("edm", n, process)
        assert (sigma_max * times[:n]).tolist() == pytest.approx(sigmas, rel=1e-9)
        assert float(times[n]) == 0
        to_sigma_min = time_grid("edm", n - 1, process, 0.002 / sigma_max)
        torch.testing.assert_close(to_sigma_min, times[:n], rtol=1e-9, atol=0)


@pytest.mark.parametrize("grid", ["uniform_log_snr", "edm"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_grids_even_in_s_over_a_end_where_it_is_finite(name: str, grid: str) -> None:
    process, steps = schedule(name), 12
    scale = (lambda y: y) if grid == "uniform_log_snr" else (lambda y: (-y / 14).exp())
    times = time_grid(grid, steps, process)
    assert times[[0, -1]].tolist() == [1, 0]
    first = 1 - 1e-3 if name in ENDS_WITHOUT_SIGNAL else 1.0
    last = 0.002 / 80 if name == "edm" else 1e-3
    ends = scale(log_snr(name, torch.tensor([first, last], dtype=torch.float64)))
    expected = torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64)
    inside = slice(name in ENDS_WITHOUT_SIGNAL, steps)  # t = 1 stands in the place of 1 - 1e-3
    torch.testing.assert_close(
        scale(log_snr(name, times[:-1]))[inside], expected[inside], rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_cosine_and_half_are_even_in_their_angle_and_fraction(name: str) -> None:
    for t_min, t_max in ((0.0, 1.0), (0.01, 0.9)):
        for grid in ("cosine", "half"):
            a, s, _, _ = schedule(name)(time_grid(grid, 7, schedule(name), t_min, t_max))
            u = (1 - 2 * s / (s + a)).acos() if grid == "cosine" else s / (s + a / 2)
            even = torch.linspace(float(u[0]), float(u[-1]), 8, dtype=torch.float64)
            torch.testing.assert_close(u, even, rtol=1e-7, atol=1e-7)


def test_cosine_and_half_of_rectified_flow_are_closed_formulas() -> None:
    u = torch.linspace(1, 0, 7, dtype=torch.float64)
    path = schedule("rectified_flow")
    cosine, half = (1 - (math.pi * u).cos()) / 2, u / (2 - u)
    torch.testing.assert_close(time_grid("cosine", 6, path), cosine, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(time_grid("half", 6, path), half, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_log_snr_is_even_in_log_snr(name: str) -> None:
    gaps = log_snr(name, time_grid("uniform_log_snr", 9, schedule(name), 0.01, 0.9)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-9, atol=0)


def test_uniform_log_snr_of_rectified_flow_is_a_logistic_curve() -> None:
    times = time_grid("uniform_log_snr", 4, schedule("rectified_flow"), 0.1, 0.9)
    expected = torch.sigmoid(
        torch.linspace(1, -1, 5, dtype=torch.float64) * torch.tensor(9.0).double().log()
    )
    torch.testing.assert_close(times, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_uniform_log_snr_to_zero_is_even_as_far_as_its_last_time(name: str) -> None:
    times = time_grid("uniform_log_snr", 9, schedule(name))
    assert float(times[-2]) == pytest.approx(0.002 / 80 if name == "edm" else 1e-3, rel=1e-9)
    gaps = log_snr(name, times[1:-1]).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(7), rtol=1e-9, atol=0)


def test_uniform_log_snr_is_even_to_a_t_min_below_a_thousandth() -> None:
    gaps = log_snr(
        "vp_linear", time_grid("uniform_log_snr", 9, schedule("vp_linear"), 1e-4, 0.9)
    ).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 5e-4), (2e-4, 9e-4), (0.9995, 1.0)])
@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow", "edm"])
@pytest.mark.parametrize("grid", ["uniform_log_snr", "edm"])
def test_a_grid_falls_in_a_range_however_narrow(
    grid: str, name: str, t_min: float, t_max: float
) -> None:
    times = time_grid(grid, 5, schedule(name), t_min, t_max)
    assert (times.diff() < 0).all()
    assert (float(times[0]), float(times[-1])) == (t_max, t_min)


def test_own_walks_the_steps_of_a_two_phase_schedule() -> None:
    process = schedule("two_phase", steps=5, c1=2.0)
    assert time_grid("own", 5, process).tolist() == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert time_grid("own", 5, process, t_min=0.4, t_max=0.8).tolist() == [0.8, 0.6, 0.4]
    times = time_grid("own", 1000, schedule("two_phase"))
    assert (times * 1000).round().tolist() == list(range(1000, -1, -1))
    assert (times.diff() < 0).all()


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if not isinstance(schedule(name), Discrete)]
)
def test_own_is_refused_for_a_schedule_that_has_no_steps(name: str) -> None:
    message = f"grid must not be own for {schedule(name)}, which has no steps of its own"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        time_grid("own", 5, schedule(name))


@pytest.mark.parametrize("key", ["t_min", "t_max"])
def test_own_is_refused_between_two_steps(key: str) -> None:
    process = schedule("two_phase", steps=5, c0=1.0, c1=2.0)
    with pytest.raises(ConfigError, match=f"{key} must be one of the steps n / 5 .*got 0.5"):
        time_grid("own", 5, process, **{key: 0.5})


def test_own_is_refused_for_another_number_of_steps() -> None:
    message = "steps must be 1000, as in the schedule, for grid=own, got 999"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        time_grid("own", 999, schedule("two_phase"))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_times_of_ones_own_stay_as_they_are(
    kind: Callable[[list[float]], Sequence[float] | Tensor],
) -> None:
    times = time_grid(kind([1.0, 0.5, 0.25, 0.0]), 3, schedule("vp_linear"), t_min=0.1)
    assert times.dtype == torch.float64
    assert times.tolist() == [1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    "times",
    [
        [1.0, 0.5],
        [1.0, 0.5, 0.5, 0.0],
        [0.0, 0.2, 0.5, 1.0],
        [1.5, 1.0, 0.5, 0.0],
        [1.0, 0.5, 0.2, -0.1],
        [1.0, math.nan, 0.5, 0.0],
    ],
)
def test_times_of_ones_own_must_fall_and_be_as_many_as_the_steps(times: list[float]) -> None:
    rule = f"be a name of {' '.join(GRIDS)}, or steps + 1 = 4 times that fall, from at most 1 to at least 0"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'grid must {rule}, got {times}')}$"):
        time_grid(times, 3, schedule("vp_linear"))


@pytest.mark.parametrize(
    ("steps", "t_min", "t_max", "message"),
    [
        (0, 0.0, 1.0, "steps must be at least 1, got 0"),
        (2.5, 0.0, 1.0, "steps must be at least 1, got 2.5"),
        (5, -0.1, 1.0, "t_min must be in [0, 1.0), got -0.1"),
        (5, 0.5, 0.5, "t_min must be in [0, 0.5), got 0.5"),
        (5, float("nan"), 1.0, "t_min must be in [0, 1.0), got nan"),
        (5, 0.0, 1.5, "t_max must be at most 1, got 1.5"),
    ],
)
def test_steps_and_times_out_of_range_are_refused_by_name(
    steps: int, t_min: float, t_max: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        time_grid("uniform_t", steps, schedule("vp_linear"), t_min, t_max)


def test_an_unknown_grid_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=rf"^grid must be one of {' '.join(GRIDS)}, got 'uniform'$"
    ):
        time_grid("uniform", 5, schedule("vp_linear"))


@pytest.mark.parametrize("t_min", [0.3, 0.95])
def test_own_is_refused_an_end_that_is_no_step(t_min: float) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^t_min must be one of the steps n / 5 for grid=own, got {t_min}$",
    ):
        time_grid("own", 5, schedule("two_phase", steps=5, c1=2.0), t_min)


def test_even_steps_in_t_are_refused_on_the_schedule_edm_alone() -> None:
    for grid in GRIDS:
        for name in SCHEDULES:
            if (grid, name) != ("uniform_t", "edm"):
                check_grid(grid, schedule(name))
    message = (
        "grid must be another for EDM(sigma_max=80.0), such as edm: uniform_t is even in sigma"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)} there, got 'uniform_t'$"):
        check_grid("uniform_t", schedule("edm"))
