"""Forward processes: x_t = a(t) x0 + s(t) eps, and the one conversion between denoiser and velocity.

A schedule is a frozen dataclass; calling it at t gives the two coefficients and their time derivatives in closed form.
Everything else in the project (samplers, router targets, losses) sees only these four numbers. A new process is a new
dataclass with `__call__`, a name in `SCHEDULES` and a line in `schedule`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddm.errors import ConfigError, one_of, require

SCHEDULES = ("vp_linear", "vp_cosine", "rectified_flow")


class Coeffs(NamedTuple):
    """The Gaussian path at t: `x_t = a x0 + s eps`, and the time derivatives of a and s. Each `[]` or `[B]`, as t is."""

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor

    def beside(self, x: Tensor) -> "Coeffs":
        """The same coefficients, shaped to multiply pictures `[B, ...]`."""
        return Coeffs(*(c.reshape(c.shape + (1,) * (x.ndim - 1)) if c.ndim else c for c in self))


class Schedule(Protocol):
    """`t` `[]` or `[B]` in [0, 1] -> `Coeffs` of t's dtype. At t = 0 s is 0 and ds may be infinite: never divide there."""

    def __call__(self, t: Tensor) -> Coeffs: ...


def _preserving(log_a: Tensor, rate: Tensor) -> Coeffs:
    """Variance preserving coefficients from log a and beta = -2 d(log a)/dt; `expm1` keeps s exact near the data."""
    a, s = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
    return Coeffs(a, s, -rate / 2 * a, rate / 2 * a**2 / s)


@dataclass(frozen=True)
class VPLinear:
    """`dx = -beta/2 x dt + sqrt(beta) dW` with beta from `beta_min` to `beta_max`, linear in t (arXiv 2011.13456, eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        require(self.beta_min > 0, "schedule.beta_min", "be above 0", self.beta_min)
        require(self.beta_max >= self.beta_min, "schedule.beta_max", "be at least schedule.beta_min", self.beta_max)

    def __call__(self, t: Tensor) -> Coeffs:
        slope = self.beta_max - self.beta_min
        return _preserving(-(self.beta_min * t + slope * t**2 / 2) / 2, self.beta_min + slope * t)


@dataclass(frozen=True)
class VPCosine:
    """`a(t) = cos u(t) / cos u(0)`, `u(t) = pi/2 (t + shift) / (1 + shift)` (arXiv 2102.09672, eq. 17); a(1) is 0."""

    shift: float = 0.008

    def __post_init__(self) -> None:
        require(self.shift > 0, "schedule.shift", "be above 0", self.shift)

    def __call__(self, t: Tensor) -> Coeffs:
        rate = math.pi / 2 / (1 + self.shift)
        u0, u = rate * self.shift, rate * (self.shift + t)
        # s^2 = 1 - cos^2(u) / cos^2(u0) = sin(u + u0) sin(u - u0) / cos^2(u0), without the cancellation near t = 0
        a, s = u.cos() / math.cos(u0), ((u + u0).sin() * (rate * t).sin()).sqrt() / math.cos(u0)
        da = -rate * u.sin() / math.cos(u0)
        return Coeffs(a, s, da, -a * da / s)


@dataclass(frozen=True)
class RectifiedFlow:
    """`a = 1 - t`, `s = t`: straight lines from data to noise (arXiv 2209.03003, eq. 1; flow matching, arXiv 2210.02747)."""

    def __call__(self, t: Tensor) -> Coeffs:
        one = torch.ones_like(t)
        return Coeffs(1 - t, t, -one, one)


def schedule(name: str, **parameters: Any) -> Schedule:
    """The forward process of that name: `schedule("vp_linear", beta_min=0.1, beta_max=20.0)(t) -> Coeffs`.

    Raises `ConfigError` for a name or a parameter that does not exist, or a value out of range.
    """
    match name:
        case "vp_linear":
            kind: Any = VPLinear
        case "vp_cosine":
            kind = VPCosine
        case "rectified_flow":
            kind = RectifiedFlow
        case _:
            raise one_of("schedule.name", name, SCHEDULES)
    known = kind.__dataclass_fields__
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(
                f"schedule.{key} must be a parameter of {name} ({', '.join(known) or 'it has none'}), got {value!r}"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require(is_number and math.isfinite(value), f"schedule.{key}", "be a finite number", value)
    return kind(**parameters)


def velocity(x: Tensor, denoised: Tensor, c: Coeffs) -> Tensor:
    """The probability-flow velocity `v = (ds/s) x + (da - a ds/s) D`, for s > 0.

    Affine in D with weights that do not depend on it, so a mixture of denoisers with weights that sum to one is the same
    mixture of velocities: the decomposition on which the routed sampler stands.
    """
    a, s, da, ds = c.beside(x)
    return ds / s * x + (da - a * ds / s) * denoised
