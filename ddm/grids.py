"""The times of a sampler's steps: N + 1 numbers that fall from t_max to t_min."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddm.errors import ConfigError, one_of, require
from ddm.schedules import EDM, Schedule, TwoPhase

GRIDS = ("uniform_t", "uniform_log_snr", "quadratic", "edm", "own")


def time_grid(
    name: str | Sequence[float] | Tensor,
    steps: int,
    schedule: Schedule,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """The times `[steps + 1]`, float64 on the CPU, from `t_max` down to `t_min`; or the times given
    in place of a name.

    `uniform_t`: even in t. `uniform_log_snr`: even in log a^2/s^2. `quadratic`: even in sqrt(t),
    dense near the data (DDIM's choice for CIFAR-10, arXiv 2010.02502, appendix D.2). `edm`: even in
    (s/a)^(1/7), denser still (arXiv 2206.00364, eq. 5). `own`: the steps n/T of a two-phase
    schedule, as many as it has. `uniform_log_snr` and `edm` are even from t_max, or where a is 0
    there from t_max - 1e-3, which is then moved to t_max; to t_min, or where s is 0 there to t =
    1e-3 (on the schedule `edm` to sigma = 0.002, the paper's), from where the last step goes to 0.

    Raises `ConfigError` for an unknown name, steps below 1, times not in 0 <= t_min < t_max <= 1,
    given times that do not fall, or `own` for a schedule that has no steps or another number of
    them.
    """
    require(isinstance(steps, int) and steps >= 1, "steps", "be at least 1", steps)
    if not isinstance(name, str):
        return _given(torch.as_tensor(name, dtype=torch.float64).cpu(), steps)
    require(0 <= t_min < t_max, "t_min", f"be in [0, {t_max})", t_min)
    require(t_max <= 1, "t_max", "be at most 1", t_max)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    match name:
        case "uniform_t":
            return t_min + (t_max - t_min) * even
        case "quadratic":
            return (math.sqrt(t_min) + (math.sqrt(t_max) - math.sqrt(t_min)) * even) ** 2
        case "uniform_log_snr":
            return _even(lambda log_sigma: log_sigma, lambda y: y, steps, schedule, t_min, t_max)
        case "edm":
            return _even(
                lambda y: (y / 7).exp(), lambda y: 7 * y.log(), steps, schedule, t_min, t_max
            )
        case "own":
            return _own(steps, schedule, t_min, t_max)
        case _:
            raise one_of("grid", name, GRIDS)


def check_grid(name: str, schedule: Schedule) -> None:
    """Raise `ConfigError` for a grid that is no use on the schedule: of even steps in sigma only
    the last is near the data.
    """
    useless = name == "uniform_t" and isinstance(schedule, EDM)
    require(
        not useless,
        "grid",
        f"be another for {schedule}, such as edm: {name} is even in sigma there",
        name,
    )


def _even(
    scale: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    steps: int,
    schedule: Schedule,
    t_min: float,
    t_max: float,
) -> Tensor:
    """Even in `scale(log s/a)`, found by bisection between the ends where s/a is finite and
    positive.
    """

    def log_sigma(t: Tensor) -> Tensor:
        a, s, _, _ = schedule(t)
        return s.log() - a.log()

    clean = t_min if t_min > 0 else min(_cleanest(schedule), t_max / 2)
    noisy = (
        t_max
        if schedule(torch.tensor(t_max, dtype=torch.float64)).a > 1e-9
        else max(t_max - 1e-3, (clean + t_max) / 2)
    )
    ends = torch.tensor([noisy, clean], dtype=torch.float64)
    count = steps + 1 - (t_min == 0)
    first, last = scale(log_sigma(ends))
    wanted = inverse(first + (last - first) * torch.linspace(0, 1, count, dtype=torch.float64))
    right, left = ends[:1].expand_as(wanted), ends[1:].expand_as(wanted)
    for _ in range(60):
        middle = (left + right) / 2
        too_clean = log_sigma(middle) < wanted
        left, right = torch.where(too_clean, middle, left), torch.where(too_clean, right, middle)
    times = torch.cat([middle, middle.new_zeros(1)]) if t_min == 0 else middle
    times[0], times[-1] = t_max, t_min
    return times


def _cleanest(schedule: Schedule) -> float:
    """The last time before 0 of grids that are even in a function of s/a."""
    return 0.002 / schedule.sigma_max if isinstance(schedule, EDM) else 1e-3


def _given(times: Tensor, steps: int) -> Tensor:
    names = " ".join(GRIDS)
    numbers = f"steps + 1 = {steps + 1} times that fall, from at most 1 to at least 0"
    falls = (
        times.ndim == 1
        and len(times) == steps + 1
        and bool((times.diff() < 0).all() and times[0] <= 1 and times[-1] >= 0)
    )
    require(falls, "grid", f"be a name of {names}, or {numbers}", times.tolist())
    return times


def _own(steps: int, schedule: Schedule, t_min: float, t_max: float) -> Tensor:
    if not isinstance(schedule, TwoPhase):
        raise ConfigError(
            f"grid must not be own for {schedule}, which has no steps of its own", "grid"
        )
    require(
        steps == schedule.steps,
        "steps",
        f"be {schedule.steps}, as in the schedule, for grid=own",
        steps,
    )
    first, last = round(t_max * steps), round(t_min * steps)
    whole = abs(t_max * steps - first) + abs(t_min * steps - last) < 1e-9
    require(whole, "t_min", f"be one of the steps n / {steps} for grid=own", t_min)
    return torch.arange(first, last - 1, -1, dtype=torch.float64) / steps
