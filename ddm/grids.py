"""The times of a sampler's steps: N + 1 numbers that fall from t_max to t_min."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddm.errors import ConfigError, one_of, require
from ddm.schedules import EDM, Discrete, Schedule

GRIDS = ("uniform_t", "uniform_log_snr", "quadratic", "cosine", "half", "edm", "own")

NO_SIGNAL = 1e-9  # an a below it: x is noise alone

Scale = Callable[[Tensor], Tensor]

# What a grid is even in, as a function of log s/a, and the inverse of that function.
_SCALES: dict[str, tuple[Scale, Scale]] = {
    "uniform_log_snr": (lambda y: y, lambda u: u),
    "cosine": (lambda y: (y / 2).exp().atan(), lambda u: 2 * u.tan().log()),
    "half": (lambda y: (y + math.log(2)).sigmoid(), lambda u: u.logit() - math.log(2)),
    "edm": (lambda y: (y / 7).exp(), lambda u: 7 * u.log()),
}


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
    dense near the data (DDIM's choice for CIFAR-10, arXiv 2010.02502, appendix D.2). `cosine`:
    `s/(s + a) = (1 - cos pi u)/2` with u even in [0, 1], dense near the data and near the noise.
    `half`: `s/(s + a/2) = u`, or `s/a = u/(2 (1 - u))`. `edm`: even in (s/a)^(1/7), denser near
    the data than any other (arXiv 2206.00364, eq. 5). `own`: the steps n/T of a discrete
    schedule, as many as it has. All but `uniform_t`, `quadratic` and `own` walk the same values of
    s/a on every schedule. `uniform_log_snr` and `edm` are even from t_max, or where a is 0
    there from t_max - 1e-3, which is then moved to t_max; to t_min, or where s is 0 there to t =
    1e-3 (on the schedule `edm` to sigma = 0.002, the paper's), from where the last step goes to 0.

    Raises `ConfigError` for an unknown name, steps below 1, times not in 0 <= t_min < t_max <= 1,
    given times that do not fall, or `own` for a schedule that has no steps or another number of
    them, or between two of them.
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
        case "cosine" | "half":
            return _even(*_SCALES[name], steps, schedule, t_min, t_max)
        case "uniform_log_snr" | "edm":
            return _even_inside(*_SCALES[name], steps, schedule, t_min, t_max)
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
    scale: Scale, inverse: Scale, steps: int, schedule: Schedule, t_min: float, t_max: float
) -> Tensor:
    """Even in `scale(log s/a)`."""
    first, last = scale(log_sigma(torch.tensor([t_max, t_min], dtype=torch.float64), schedule))
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = times_at(inverse(first + (last - first) * even), schedule, t_min, t_max)
    times[0], times[-1] = t_max, t_min
    return times


def log_sigma(t: Tensor, schedule: Schedule) -> Tensor:
    """`log s/a` at t."""
    a, s, _, _ = schedule(t)
    return s.log() - a.log()


def times_at(wanted: Tensor, schedule: Schedule, t_min: float, t_max: float = 1.0) -> Tensor:
    """The times in [t_min, t_max] at which `log s/a` has the `wanted` values, float64, by bisection."""
    left, right = torch.full_like(wanted, t_min), torch.full_like(wanted, t_max)
    for _ in range(60):
        middle = (left + right) / 2
        too_clean = log_sigma(middle, schedule) < wanted
        left, right = torch.where(too_clean, middle, left), torch.where(too_clean, right, middle)
    return middle


def _even_inside(
    scale: Scale, inverse: Scale, steps: int, schedule: Schedule, t_min: float, t_max: float
) -> Tensor:
    """`_even` between the times where s/a is finite and positive, moved to `t_max` and followed by
    a last step to 0.
    """
    clean = t_min if t_min > 0 else min(_cleanest(schedule), t_max / 2)
    has_signal = schedule(torch.tensor(t_max, dtype=torch.float64)).a > NO_SIGNAL
    noisy = t_max if has_signal else max(t_max - 1e-3, (clean + t_max) / 2)
    times = _even(scale, inverse, steps - (t_min == 0), schedule, clean, noisy)
    if t_min == 0:
        times = torch.cat([times, times.new_zeros(1)])
    times[0] = t_max
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
    if not isinstance(schedule, Discrete):
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
    rule = f"be one of the steps n / {steps} for grid=own"
    require(abs(t_max * steps - first) < 1e-9, "t_max", rule, t_max)
    require(abs(t_min * steps - last) < 1e-9, "t_min", rule, t_min)
    return torch.arange(first, last - 1, -1, dtype=torch.float64) / steps
