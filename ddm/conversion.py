"""A denoiser of one forward process used on another: `x_t / a` and `s / a` are all that it sees.

`x_t / a = x0 + (s / a) eps` has the same law on every process at equal s/a. So `E[x0 | x_t = x]` on
one is that on another at the time of equal s/a, with x / a the same (arXiv 2206.00364, section 3;
arXiv 2603.06741 mixes experts of different processes by it).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ddm.errors import require
from ddm.grids import log_sigma
from ddm.schedules import Schedule

_LOGIT_T = 20.0  # knots reach to 2e-9 from either end of [0, 1]
_KNOTS = 4097
_NOISE = 20.0  # s/a at which 1/400 of x/s is left of an image of size 1: no longer seen


@dataclass(frozen=True)
class Conversion:
    """`(x, t)` on the process `outer` -> `(x', t')` on `inner`, with equal s/a and `x'/a' = x/a`.

    x `[B, ...]`, t `[]` or `[B]`; t' is float64. Where s/a on `outer` is beyond the ends of
    `inner`, t' is its end, and x' has the size of an image there.
    """

    outer: Schedule
    inner: Schedule

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        t_inner = time_of(log_sigma(t, self.outer), self.inner)
        a, s, _, _ = self.outer(t)
        a_inner, s_inner, _, _ = self.inner(t_inner)
        # a'/a and s'/s are this number, which is also defined where a or s is 0.
        scale = ((a_inner**2 + s_inner**2) / (a**2 + s**2)).sqrt().to(x)
        if scale.ndim:
            scale = scale.reshape(-1, *[1] * (x.ndim - 1))
        return scale * x, t_inner


def check_conversion(outer: Schedule, inner: Schedule) -> None:
    """Raise `ConfigError` if an expert of `inner` has not seen the noise that `outer` starts from."""
    one = torch.ones((), dtype=torch.float64)
    first = math.exp(min(700.0, float(log_sigma(one, outer))))
    most = math.exp(min(700.0, float(log_sigma(one, inner))))
    require(
        most >= min(first, _NOISE) * (1 - 1e-6),
        "schedule",
        f"reach s/a = {min(first, _NOISE):.4g} at t = 1 to be converted to {outer}",
        f"{inner}, which ends at {most:.4g}",
    )


def time_of(wanted: Tensor, schedule: Schedule) -> Tensor:
    """The times in (0, 1) at which `log s/a` has the `wanted` values, float64, clamped to the ends.

    By linear interpolation over the logit of t, and two steps of Newton's method.
    """
    knots, values = _table(schedule, wanted.device)  # type: ignore[arg-type]  # it is frozen
    wanted = wanted.clamp(values[0], values[-1])
    right = torch.searchsorted(values, wanted.contiguous()).clamp(1, len(values) - 1)
    low, high = values[right - 1], values[right]
    place = torch.lerp(knots[right - 1], knots[right], (wanted - low) / (high - low))
    for _ in range(2):
        t = place.sigmoid()
        a, s, da, ds = schedule(t)
        slope = (ds / s - da / a) * t * (1 - t)
        step = (s.log() - a.log() - wanted) / slope
        place = (place - step).clamp(knots[right - 1], knots[right])
    return place.sigmoid()


@lru_cache
def _table(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of t, and `log s/a` there, float64, both rising."""
    knots = torch.linspace(-_LOGIT_T, _LOGIT_T, _KNOTS, dtype=torch.float64)
    values = log_sigma(knots.sigmoid(), schedule)
    rises = torch.cat([values.isfinite()[:1], values.diff() > 0]) & values.isfinite()
    return knots[rises].to(device), values[rises].to(device)
