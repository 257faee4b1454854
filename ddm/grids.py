"""Where a sampler puts its steps: N + 1 times that fall from t_max to t_min."""

import math

import torch
from torch import Tensor

from ddm.errors import one_of, require
from ddm.schedules import Schedule

GRIDS = ("uniform_t", "uniform_log_snr", "quadratic")


def time_grid(name: str, steps: int, schedule: Schedule, t_min: float = 0.0, t_max: float = 1.0) -> Tensor:
    """The times `[steps + 1]`, float64 on the CPU, from `t_max` down to `t_min`.

    `uniform_t`: even in t. `uniform_log_snr`: even in log a^2/s^2, as far as t = 1e-3 where `t_min` is 0. `quadratic`: even in
    sqrt(t), dense near the data (DDIM's choice for CIFAR-10, arXiv 2010.02502, appendix D.2).

    Raises `ConfigError` for an unknown name, steps below 1, or times not in 0 <= t_min < t_max <= 1.
    """
    require(isinstance(steps, int) and steps >= 1, "sample.steps", "be at least 1", steps)
    require(0 <= t_min < t_max, "sample.t_min", f"be in [0, {t_max})", t_min)
    require(t_max <= 1, "sample.t_max", "be at most 1", t_max)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    match name:
        case "uniform_t":
            return t_min + (t_max - t_min) * even
        case "quadratic":
            return (math.sqrt(t_min) + (math.sqrt(t_max) - math.sqrt(t_min)) * even) ** 2
        case "uniform_log_snr":
            return _uniform_log_snr(even, schedule, t_min, t_max)
        case _:
            raise one_of("sample.grid", name, GRIDS)


def _uniform_log_snr(even: Tensor, schedule: Schedule, t_min: float, t_max: float) -> Tensor:
    """Even in log SNR between t_max and max(t_min, 1e-3), where it is finite; a grid to t = 0 has that as its last step."""

    def log_snr(t: Tensor) -> Tensor:
        a, s, _, _ = schedule(t)
        return 2 * (a.clamp_min(1e-12).log() - s.log())  # rectified flow has a(1) = 0

    clean = t_min if t_min > 0 else min(1e-3, t_max / 2)
    noisy = max(min(t_max, 1 - 1e-3), (clean + t_max) / 2)  # where a(1) = 0
    ends = torch.tensor([clean, noisy], dtype=torch.float64)
    inner = (
        even if t_min > 0 else torch.linspace(1, 0, len(even) - 1, dtype=torch.float64) if len(even) > 2 else even[:1]
    )
    high, low = log_snr(ends)
    wanted = high + (low - high) * inner
    left, right = ends[:1].expand_as(wanted), ends[1:].expand_as(wanted)
    for _ in range(60):
        middle = (left + right) / 2
        too_clean = log_snr(middle) > wanted
        left, right = torch.where(too_clean, middle, left), torch.where(too_clean, right, middle)
    times = torch.cat([middle, middle.new_zeros(1)]) if t_min == 0 else middle
    times[0], times[-1] = t_max, t_min
    return times
