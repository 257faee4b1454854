"""Forward processes: x_t = a(t) x0 + s(t) eps, and the one conversion between denoiser and
velocity.

A schedule is a frozen dataclass; calling it at t returns the two coefficients and their time
derivatives in closed form. The rest of the project (samplers, router targets, losses) uses only
these four numbers. To add a process, add a dataclass with `__call__` and a line in `_PROCESSES`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddm.errors import ConfigError, one_of, require


class Coeffs(NamedTuple):
    """The Gaussian path at t: `x_t = a x0 + s eps`, and the time derivatives of a and s.

    Each `[]` or `[B]`, as t is.
    """

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor

    def broadcast_to(self, x: Tensor) -> "Coeffs":
        """The same coefficients, shaped to multiply images `[B, ...]`."""
        return Coeffs(*(c.reshape(c.shape + (1,) * (x.ndim - 1)) if c.ndim else c for c in self))


class Schedule(Protocol):
    """`t` `[]` or `[B]` in [0, 1] -> `Coeffs` of t's dtype.

    At t = 0 s is 0 and ds may be infinite: never divide there.
    """

    def __call__(self, t: Tensor) -> Coeffs: ...


class _Positive:
    """A process whose parameters must all be above 0."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value > 0, key, "be above 0", value)


def _preserving(log_a: Tensor, rate: Tensor) -> Coeffs:
    """Variance preserving coefficients from log a and beta = -2 d(log a)/dt; `expm1` keeps s exact
    near the data.
    """
    a, s = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
    return Coeffs(a, s, -rate / 2 * a, rate / 2 * a**2 / s)


def _exploding(variance: Tensor, diffusion: Tensor) -> Coeffs:
    """Variance exploding coefficients, a = 1, from `s^2 = int g^2` and g."""
    s = variance.sqrt()
    return Coeffs(1 + 0 * s, s, torch.zeros_like(s), diffusion**2 / (2 * s))


def _power_integral(t: Tensor, b: float, c: float, power: float) -> Tensor:
    """`int_0^t (b + c u)^power du` for b, c > 0, exact near t = 0."""
    return b ** (power + 1) / (c * (power + 1)) * torch.expm1((power + 1) * torch.log1p(c / b * t))


@dataclass(frozen=True)
class VPConstant(_Positive):
    """`dx = -beta/2 x dt + sqrt(beta) dW` with beta constant: the Ornstein-Uhlenbeck process."""

    beta: float = 10.0

    def __call__(self, t: Tensor) -> Coeffs:
        return _preserving(-self.beta * t / 2, self.beta * torch.ones_like(t))


@dataclass(frozen=True)
class VPLinear:
    """`dx = -beta/2 x dt + sqrt(beta) dW` with beta from `beta_min` to `beta_max`, linear in t
    (arXiv 2011.13456, eq. 32).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        require(self.beta_min > 0, "beta_min", "be above 0", self.beta_min)
        require(
            self.beta_max >= self.beta_min,
            "beta_max",
            "be at least beta_min",
            self.beta_max,
        )

    def __call__(self, t: Tensor) -> Coeffs:
        slope = self.beta_max - self.beta_min
        return _preserving(-(self.beta_min * t + slope * t**2 / 2) / 2, self.beta_min + slope * t)


@dataclass(frozen=True)
class VPPolynomial(_Positive):
    """Variance preserving with `beta = (b + c t)^rho` (arXiv 2311.11003, table 1)."""

    b: float = 0.3
    c: float = 5.2
    rho: float = 2.0

    def __call__(self, t: Tensor) -> Coeffs:
        return _preserving(
            -_power_integral(t, self.b, self.c, self.rho) / 2, (self.b + self.c * t) ** self.rho
        )


@dataclass(frozen=True)
class VPExponential(_Positive):
    """Variance preserving with `beta = b e^(c t)`."""

    b: float = 0.1
    c: float = 6.5

    def __call__(self, t: Tensor) -> Coeffs:
        return _preserving(
            -self.b / (2 * self.c) * torch.expm1(self.c * t), self.b * (self.c * t).exp()
        )


@dataclass(frozen=True)
class VPCosine(_Positive):
    """`a(t) = cos u(t) / cos u(0)`, `u(t) = pi/2 (t + shift) / (1 + shift)` (arXiv 2102.09672, eq.
    17); a(1) is 0.
    """

    shift: float = 0.008

    def __call__(self, t: Tensor) -> Coeffs:
        rate = math.pi / 2 / (1 + self.shift)
        u0, u = rate * self.shift, rate * (self.shift + t)
        # s^2 = 1 - cos^2(u) / cos^2(u0) = sin(u + u0) sin(u - u0) / cos^2(u0), without the
        # cancellation near t = 0
        a, s = u.cos() / math.cos(u0), ((u + u0).sin() * (rate * t).sin()).sqrt() / math.cos(u0)
        da = -rate * u.sin() / math.cos(u0)
        return Coeffs(a, s, da, -a * da / s)


@dataclass(frozen=True)
class VEExponential(_Positive):
    """`dx = g dW` with `g = b e^(c t)` (arXiv 2011.13456, eq. 30, is of this form); s runs to about
    49 at t = 1.
    """

    b: float = 0.041
    c: float = 8.5

    def __call__(self, t: Tensor) -> Coeffs:
        return _exploding(
            self.b**2 / (2 * self.c) * torch.expm1(2 * self.c * t), self.b * (self.c * t).exp()
        )


@dataclass(frozen=True)
class VEPolynomial(_Positive):
    """`dx = g dW` with `g = (b + c t)^rho` (arXiv 2311.11003, table 1); s runs to about 50 at t =
    1.
    """

    b: float = 0.3
    c: float = 10.3
    rho: float = 2.0

    def __call__(self, t: Tensor) -> Coeffs:
        return _exploding(
            _power_integral(t, self.b, self.c, 2 * self.rho), (self.b + self.c * t) ** self.rho
        )


@dataclass(frozen=True)
class RectifiedFlow:
    """`a = 1 - t`, `s = t`: straight lines from data to noise (arXiv 2209.03003, eq. 1; flow
    matching, arXiv 2210.02747).
    """

    def __call__(self, t: Tensor) -> Coeffs:
        one = torch.ones_like(t)
        return Coeffs(1 - t, t, -one, one)


@dataclass(frozen=True)
class EDM(_Positive):
    """`a = 1`, `s = sigma = sigma_max t` (arXiv 2206.00364, table 1, with its time divided by
    sigma_max).
    """

    sigma_max: float = 80.0

    def __call__(self, t: Tensor) -> Coeffs:
        one = torch.ones_like(t)
        return Coeffs(1 + 0 * t, self.sigma_max * t, 0 * one, self.sigma_max * one)


class Discrete:
    """A process of `steps` steps with a noise rate `betas` each: the product of `1 - beta_j` over
    j <= n is `a^2` at t = n / steps.
    """

    steps: int

    @cached_property
    def betas(self) -> Tensor:
        """`beta_1 ... beta_T`, float64 `[T]`."""
        raise NotImplementedError

    def _check_steps(self) -> None:
        whole = self.steps == int(self.steps) and 2 <= self.steps <= 1_000_000
        require(whole, "steps", "be a whole number in [2, 1000000]", self.steps)

    def _ends(self, t: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `values` at 0 ... T those before and after t, and the part of the step between."""
        place = t.double() * self.steps
        n = place.detach().floor().clamp(0, self.steps - 1)
        below, above = (values.to(t.device)[(n + i).long()] for i in (0, 1))
        return below, above, place - n


@dataclass(frozen=True)
class TwoPhase(Discrete):
    """The discrete schedule of the convergence proofs (arXiv 2408.02320, eq. 7; arXiv 2403.03852):
    step n at t = n / steps.

    With `eta = c1 log T / T`: `beta_1 = T^-c0`, `beta_n = eta min{beta_1 (1 + eta)^n, 1}`, and the
    product of `1 - beta_j` over j <= n is `a(n/T)^2`. Between two steps log a is linear, so da and
    ds jump at each of them: use the grid `own`, and not a sampler that uses slopes (`euler`,
    `heun`).
    """

    steps: int = 1000
    c0: float = 2.0
    c1: float = 4.0

    def __post_init__(self) -> None:
        self._check_steps()
        require(self.c0 > 0, "c0", "be above 0", self.c0)
        highest = self.steps / math.log(self.steps)
        require(0 < self.c1 < highest, "c1", f"be in (0, T / log T = {highest:.4g})", self.c1)

    @cached_property
    def betas(self) -> Tensor:
        """`beta_1 ... beta_T`, float64 `[T]`."""
        eta, first = self.c1 * math.log(self.steps) / self.steps, self.steps**-self.c0
        n = torch.arange(1, self.steps + 1, dtype=torch.float64)
        betas = eta * (math.log(first) + n * math.log1p(eta)).clamp_max(0).exp()
        betas[0] = first
        return betas

    @cached_property
    def _log_a(self) -> Tensor:
        return torch.cat(
            [torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas).cumsum(0) / 2]
        )

    def __call__(self, t: Tensor) -> Coeffs:
        below, above, part = self._ends(t, self._log_a)
        log_a = below + part * (above - below)
        return Coeffs(
            *(c.to(t.dtype) for c in _preserving(log_a, 2 * self.steps * (below - above)))
        )


class _DDPM(Discrete):
    """Between two steps a is linear, so da and ds jump at each of them."""

    zero_terminal_snr: float

    def _check(self) -> None:
        self._check_steps()
        flag = self.zero_terminal_snr
        require(flag in (0, 1), "zero_terminal_snr", "be 0 or 1", flag)

    @cached_property
    def _a(self) -> Tensor:
        signal = torch.log1p(-self.betas).cumsum(0).mul(0.5).exp()
        if self.zero_terminal_snr:
            first, last = signal[0], signal[-1]
            signal = (signal - last) * (first / (first - last))
        return torch.cat([signal.new_ones(1), signal])

    def __call__(self, t: Tensor) -> Coeffs:
        below, above, part = self._ends(t, self._a)
        a, da = below + part * (above - below), self.steps * (above - below)
        s = ((1 - a) * (1 + a)).sqrt()
        return Coeffs(*(c.to(t.dtype) for c in (a, s, da, -a * da / s)))


@dataclass(frozen=True)
class DDPM(_DDPM):
    """DDPM's discrete process, `beta_1 = beta_start` to `beta_T = beta_end` (arXiv 2006.11239,
    section 4): step n at t = n / steps.

    power: `beta^(1/power)` is linear in n; 1 is diffusers' `linear`, 2 its `scaled_linear`.
    zero_terminal_snr: 1 moves and scales a so that it falls to 0 (arXiv 2305.08891, algorithm 1).
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    power: float = 1.0
    zero_terminal_snr: float = 0

    def __post_init__(self) -> None:
        self._check()
        require(0 < self.beta_start < 1, "beta_start", "be in (0, 1)", self.beta_start)
        rule = f"be in [beta_start = {self.beta_start:g}, 1)"
        require(self.beta_start <= self.beta_end < 1, "beta_end", rule, self.beta_end)
        require(self.power > 0, "power", "be above 0", self.power)

    @cached_property
    def betas(self) -> Tensor:
        first, last = self.beta_start ** (1 / self.power), self.beta_end ** (1 / self.power)
        return torch.linspace(first, last, int(self.steps), dtype=torch.float64) ** self.power


@dataclass(frozen=True)
class DDPMCosine(_DDPM):
    """The cosine process in discrete steps (arXiv 2102.09672, eq. 17), with beta at most 0.999:
    diffusers' `squaredcos_cap_v2`; `zero_terminal_snr` as in `DDPM`.
    """

    steps: int = 1000
    zero_terminal_snr: float = 0

    def __post_init__(self) -> None:
        self._check()

    @cached_property
    def betas(self) -> Tensor:
        t = torch.linspace(0, 1, int(self.steps) + 1, dtype=torch.float64)
        a_square = ((t + 0.008) / 1.008 * (math.pi / 2)).cos().square()
        return (1 - a_square[1:] / a_square[:-1]).clamp_max(0.999)


_PROCESSES: dict[str, Any] = {
    "vp_constant": VPConstant,
    "vp_linear": VPLinear,
    "vp_polynomial": VPPolynomial,
    "vp_exponential": VPExponential,
    "vp_cosine": VPCosine,
    "ve_exponential": VEExponential,
    "ve_polynomial": VEPolynomial,
    "rectified_flow": RectifiedFlow,
    "edm": EDM,
    "two_phase": TwoPhase,
    "ddpm": DDPM,
    "ddpm_cosine": DDPMCosine,
}
SCHEDULES = tuple(_PROCESSES)


def schedule(name: str, **parameters: Any) -> Schedule:
    """The forward process of that name: `schedule("vp_linear", beta_min=0.1, beta_max=20.0)(t) ->
    Coeffs`.

    Raises `ConfigError` for an unknown name or parameter, or a value out of range.
    """
    if name not in _PROCESSES:
        raise one_of("name", name, SCHEDULES)
    kind = _PROCESSES[name]
    known = kind.__dataclass_fields__
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(
                f"{key} must be a parameter of {name} ({', '.join(known) or 'it has none'}), "
                f"got {value!r}",
                key,
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require(is_number and math.isfinite(value), key, "be a finite number", value)
    return kind(**parameters)


def velocity(x: Tensor, denoised: Tensor, c: Coeffs) -> Tensor:
    """The probability-flow velocity `v = (ds/s) x + (da - a ds/s) D`, for s > 0.

    Affine in D, with coefficients that do not depend on D: a mixture of denoisers with weights that
    sum to one gives the same mixture of velocities. The routed sampler is based on this.
    """
    a, s, da, ds = c.broadcast_to(x)
    return ds / s * x + (da - a * ds / s) * denoised
