"""Samplers as generators that know nothing of networks, batches or servers.

A step yields (x, t), is sent the denoised image, `x0 = yield x, t`, and returns what the next step
starts from. A step is a function of that alone, so images at the same step may be stacked and
parted between two steps as one likes. `Sampler.trajectory` is all steps, one after another:
`drive` calls a denoiser in a loop, `drive_async` awaits one, which may be remote. Both count the
calls.
"""

import math
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddm.errors import ConfigError, one_of, require
from ddm.grids import NO_SIGNAL, time_grid
from ddm.rng import RngStream, normal
from ddm.schedules import Coeffs, Schedule, velocity

# (x [B, ...], t [] or [B] of any device and dtype) -> E[x0 | x_t = x] [B, ...]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Times = Tensor | Sequence[Tensor]  # falling, each `[]`, on the CPU
Noise = Callable[[int], Tensor]  # the n-th standard normal noise of a trajectory, shaped like x
# Yields (x, t), is sent the denoised x, returns x at the grid's end.
Trajectory = Generator[tuple[Tensor, Tensor], Tensor, Tensor]
# What a step starts from: x `[B, ...]`, and what a sampler remembers of the steps before.
Carry = tuple[Tensor, ...]
# Yields (x, t), is sent the denoised x, returns what the next step starts from.
Step = Generator[tuple[Tensor, Tensor], Tensor, Carry]


class Course(NamedTuple):
    """What the steps of a trajectory share: the schedule, the times, and the noise."""

    schedule: Schedule
    times: Times
    noise: Noise

    def coeffs(self, n: int) -> Coeffs:
        """The schedule's at the n-th time."""
        return self.schedule(self.times[n])


def euler(course: Course, n: int, x: Tensor) -> Step:
    """Euler's method on the probability-flow ODE, `x' = x + (t' - t) v(x, t)`: the sampler of the
    paper's routed ODE.
    """
    t, t_next = course.times[n], course.times[n + 1]
    return (x + (t_next - t) * velocity(x, (yield x, t), course.coeffs(n)),)


def ddim(course: Course, n: int, x: Tensor) -> Step:
    """`x' = a' D + (s'/s) (x - a D)` (arXiv 2010.02502, eq. 12 with sigma = 0): exact where D is
    constant over the step.
    """
    return (_towards((yield x, course.times[n]), x, course.coeffs(n), course.coeffs(n + 1)),)


def _towards(denoised: Tensor, x: Tensor, c: Coeffs, c_next: Coeffs) -> Tensor:
    """The solution of the ODE from t to t' if D is `denoised` throughout the step.

    With rho = a/s the ODE is `d(x/s)/d rho = D`, so this is exact for the mean of D over the step,
    weighted by d rho: samplers of higher order differ only in how they estimate that mean. Where s'
    = 0, x' is `denoised` itself.
    """
    return c_next.a * denoised + c_next.s / c.s * (x - c.a * denoised)


def heun(course: Course, n: int, x: Tensor) -> Step:
    """Heun's method on the ODE, the mean of the velocities at both ends (arXiv 2206.00364,
    algorithm 1).

    A step to t = 0, where there is no velocity, is the denoised image, at one call.
    """
    t, t_next = course.times[n], course.times[n + 1]
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    denoised = yield x, t
    if c_next.s == 0:
        return (denoised,)
    v = velocity(x, denoised, c)
    x_next = x + (t_next - t) * v
    v_next = velocity(x_next, (yield x_next, t_next), c_next)
    return (x + (t_next - t) / 2 * (v + v_next),)


def dpmpp_2m(course: Course, n: int, x: Tensor, *last: Tensor) -> Step:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): D extrapolated to the middle of the step in
    lambda = log a/s.

    The first step, and one to s = 0 or to a = 0 where lambda is infinite, are DDIM's.
    """
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    middle = denoised = yield x, course.times[n]
    if last and c_next.s != 0 and c_next.a > NO_SIGNAL:
        h, h_last = _lambda(c_next) - _lambda(c), _lambda(c) - _lambda(course.coeffs(n - 1))
        middle = denoised + h / (2 * h_last) * (denoised - last[0])
    return _towards(middle, x, c, c_next), denoised


def unipc(course: Course, n: int, x: Tensor, *memory: Tensor, order: int = 3) -> Step:
    """UniPC of that order (arXiv 2302.04867, algorithms 1 and 2 for data prediction), one call per
    step.

    The predictor integrates a polynomial in lambda = log a/s through the last `order` denoised
    images. With the next one, the corrector repeats the step with a polynomial through that as
    well. Both are exponential integrators: they integrate the polynomial exactly, which is the
    paper's family with every moment matched. Toward t = 0, where lambda is infinite, the order
    falls to 2 and in the last step to 1, DDIM's (the `lower_order_final` of the authors' code), and
    so does the last step of an inversion to a = 0.
    """
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    here, there = _lambda(c), _lambda(c_next)
    denoised = yield x, course.times[n]
    before, answers = memory[:1], (*memory[1:], denoised)  # x of the step before; denoised images
    places = [_lambda(course.coeffs(i)) for i in range(n + 1 - len(answers), n)] + [here]
    if before:
        used = 1 + _unipc_order(course, n - 1, len(answers) - 1, order)
        corrected = _mean(answers[-used:], places[-used:], places[-2], here)
        x = _towards(corrected, before[0], course.coeffs(n - 1), c)
    used = _unipc_order(course, n, len(answers), order)
    middle = denoised if used == 1 else _mean(answers[-used:], places[-used:], here, there)
    return _towards(middle, x, c, c_next), x, *answers[-order:]


def _unipc_order(course: Course, n: int, known: int, order: int) -> int:
    """The denoised images, of those that are known, that the prediction of step n uses."""
    if course.coeffs(n + 1).a < NO_SIGNAL:
        return 1
    left = len(course.times) - 1 - n
    ends_at_data = course.coeffs(-1).s == 0
    return min(known, order, left if ends_at_data else order)


# Of orders 1 to 4, the oldest value first.
_ADAMS_BASHFORTH = (
    (1.0,),
    (-1 / 2, 3 / 2),
    (5 / 12, -16 / 12, 23 / 12),
    (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
)


def ipndm(course: Course, n: int, x: Tensor, *values: Tensor, order: int = 3) -> Step:
    """iPNDM of that order, 1 to 4 (arXiv 2204.13902, section 4; the linear multistep formulas of
    arXiv 2202.09778, eq. 12), one call per step.

    With sigma = s/a the ODE is `d(x/a)/d sigma = eps`, `eps = (x - a D)/s`. The mean of eps over a
    step is Adams and Bashforth's, with the coefficients of even steps: that of a polynomial in the
    number of the step, which at few steps is closer than one in sigma. The first steps have lower
    orders, and a step to t = 0 order 2. Exact where D is constant, or eps a polynomial on even
    steps; the order of accuracy is at most 2 because of uneven steps and of the first one.
    """
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    denoised = yield x, course.times[n]
    values = (*values, (x - c.a * denoised) / c.s)[-order:]
    used = min(len(values), 2 if c_next.s == 0 else order)
    x = _towards(denoised, x, c, c_next)  # the step of order 1, also where a = 0
    if used > 1:
        ahead = _weighted(_ADAMS_BASHFORTH[used - 1], values[-used:]) - values[-1]
        x = x + (c_next.s - c_next.a * c.s / c.a) * ahead
    return x, *values


def _lambda(c: Coeffs) -> Tensor:
    """`log a/s`, half the log SNR; where a = 0 a number low enough to act as -infinity."""
    return c.a.clamp_min(1e-150).log() - c.s.log()


def _mean(
    answers: Sequence[Tensor], places: Sequence[Tensor], here: Tensor, there: Tensor
) -> Tensor:
    """The mean over a step, weighted by `d rho = d e^lambda`, of the polynomial through the answers
    at their places.
    """
    h = there - here
    moments = _exponential_moments(h, len(answers))
    powers = torch.arange(len(answers), dtype=here.dtype)[:, None]
    weights = torch.linalg.solve(((torch.stack(list(places)) - here) / h) ** powers, moments)
    return _weighted(weights, answers)


def _weighted(weights: Iterable[Tensor | float], values: Sequence[Tensor]) -> Tensor:
    """The sum of the values, each times its weight."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True)]
    return sum(terms[1:], terms[0])


def _exponential_moments(h: Tensor, count: int) -> Tensor:
    """The moments `E z^n`, n < count, of z in [0, 1] with a density that grows as `e^(h z)`, h > 0;
    `[count]`.

    They are `n! phi_(n+1)(-h) / phi_1(-h)` with the phi functions of exponential integrators (arXiv
    2302.04867, section 3.1). `phi_(n+1)(-h) = (1/n! - phi_n(-h)) / h` loses digits as h falls, and
    the series `sum_k (-h)^k / (n + 1 + k)!` as it rises.
    """
    if h > 2:
        phi = [-torch.expm1(-h) / h]
        for n in range(1, count):
            phi.append((1 / math.factorial(n) - phi[-1]) / h)
    else:
        k = torch.arange(30, dtype=h.dtype)
        phi = [((-h) ** k / (k + n + 2).lgamma().exp()).sum() for n in range(count)]
    return torch.stack([math.factorial(n) * part / phi[0] for n, part in enumerate(phi)])


def euler_maruyama(course: Course, n: int, x: Tensor) -> Step:
    """Euler and Maruyama's method on the reverse SDE `dx = (f x - g^2 score) dt + g dW` (arXiv
    2011.13456, eq. 6).

    `f = da/a`, `g^2 = 2 s (ds - f s)`. A step to t = 0 is the denoised image.
    """
    c, dt = course.coeffs(n), course.times[n + 1] - course.times[n]
    denoised = yield x, course.times[n]
    if course.coeffs(n + 1).s == 0:
        return (denoised,)
    f = c.da / c.a
    g_square = 2 * c.s * (c.ds - f * c.s)
    drift = f * x - g_square * _score(x, denoised, c)
    return (x + dt * drift + (-dt * g_square).sqrt() * course.noise(n),)


def ddpm(course: Course, n: int, x: Tensor) -> Step:
    """DDPM, `Y' = (Y + beta score) / sqrt(1 - beta) + sqrt(beta) Z` (arXiv 2006.11239, algorithm
    2).

    beta is the step's own, and `sigma_t^2 = beta` is the paper's first choice (section 3.2), which
    is exact for data from N(0, 1). For any process `sqrt(1 - beta)` is the ratio r = a/a', and
    `beta = s^2 - r^2 s'^2` the variance that the step adds to the noise. A step to t = 0 is the
    denoised image.
    """
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    denoised = yield x, course.times[n]
    if c_next.s == 0:
        return (denoised,)
    r = c.a / c_next.a
    beta = c.s**2 - (r * c_next.s) ** 2
    return ((x + beta * _score(x, denoised, c)) / r + beta.sqrt() * course.noise(n),)


def accelerated_ode(course: Course, n: int, x: Tensor) -> Step:
    """The accelerated ODE sampler of arXiv 2403.03852, eq. 12: DDIM, and a correction by the change
    of the score.

    With n growing toward the noise and `alpha_n` the step's ratio of a^2 (no posterior):

        Y- = sqrt(alpha_(n+1)) (Y - (1 - alpha_(n+1))/2 score_n(Y))
        Y' = (Y + (1 - alpha_n)/2 score_n(Y)
              + (1 - alpha_n)^2 / (4 (1 - alpha_(n+1)))
                (score_n(Y) - sqrt(alpha_(n+1)) score_(n+1)(Y-))) / sqrt(alpha_n)

    The first step has no n + 1 and is Heun's; one to t = 0 is the denoised image.
    """
    if n == 0:
        return (yield from heun(course, n, x))
    c_last, c, c_next = (course.coeffs(i) for i in (n - 1, n, n + 1))
    denoised = yield x, course.times[n]
    if c_next.s == 0:
        return (denoised,)
    r, r_last = c.a / c_next.a, c_last.a / c.a  # sqrt(alpha_n), sqrt(alpha_(n+1))
    score = _score(x, denoised, c)
    noisier = r_last * (x - (1 - r_last**2) / 2 * score)
    change = score - r_last * _score(noisier, (yield noisier, course.times[n - 1]), c_last)
    x = (x + (1 - r**2) / 2 * score + (1 - r**2) ** 2 / (4 * (1 - r_last**2)) * change) / r
    return (x,)


def accelerated_sde(course: Course, n: int, x: Tensor) -> Step:
    """The accelerated SDE sampler of arXiv 2403.03852, eq. 15, with `alpha_n` the step's ratio of
    a^2 (no posterior).

        Y+ = Y + sqrt((1 - alpha_n)/2) Z
        Y' = (Y+ + (1 - alpha_n) score_n(Y+) + sqrt((1 - alpha_n)/2) Z') / sqrt(alpha_n)

    Its distribution is of order 2 where the score is linear, and of order 1 elsewhere: the score at
    Y+ shifts the mean of the step by its curvature. A step to t = 0 is the denoised image.
    """
    c, c_next = course.coeffs(n), course.coeffs(n + 1)
    if c_next.s == 0:
        return ((yield x, course.times[n]),)
    r = c.a / c_next.a
    half = ((1 - r**2) / 2).sqrt()
    x = x + half * course.noise(2 * n)
    score = _score(x, (yield x, course.times[n]), c)
    return ((x + (1 - r**2) * score + half * course.noise(2 * n + 1)) / r,)


def _score(x: Tensor, denoised: Tensor, c: Coeffs) -> Tensor:
    """`grad log p = (a D - x) / s^2`."""
    return (c.a * denoised - x) / c.s**2


@dataclass(frozen=True)
class Sampler:
    """A sampler: its step, its order of accuracy in 1/N, and its denoiser calls per step.

    `order` is that of the trajectory's error for a deterministic sampler, and that of the
    distribution's for a stochastic one, on any smooth grid. `orders` are the values of the key
    `order`, for a sampler that takes it. `needs` says where it is defined: on any schedule, where
    there is `signal` (a > 0), or where the variance is `preserved`, a^2 + s^2 = 1, as well.
    """

    step: Callable[..., Step]  # of (course, n, *carry)
    order: int
    orders: Sequence[int] = ()
    calls_per_step: int = 1
    needs: Literal["nothing", "signal", "preserved"] = "nothing"

    def trajectory(self, x: Tensor, schedule: Schedule, times: Times, noise: Noise) -> Trajectory:
        """All steps from `x` `[B, ...]` at the first time on."""
        course = Course(schedule, times, noise)
        carry: Carry = (x,)
        for n in range(len(times) - 1):
            carry = yield from self.step(course, n, *carry)
        return carry[0]

    def lacks(self, schedule: Schedule, times: Tensor) -> str:
        """Why the sampler is not defined on the schedule at these times, in words; empty where it
        is.
        """
        a, s, _, _ = schedule(times)
        if self.needs != "nothing" and a.min() < 1e-6:
            return f"where a falls to {float(a.min()):.2g}: it divides by a"
        uneven = (a**2 + s**2 - 1).abs()
        if self.needs == "preserved" and uneven.max() > 1e-6:
            worst = int(uneven.argmax())
            total, t = float((a**2 + s**2)[worst]), float(times[worst])
            return f"where a^2 + s^2 is {total:.4g} at t = {t:.4g}: it needs 1"
        return ""


_SAMPLERS = {
    "euler": Sampler(euler, order=1),
    "ddim": Sampler(ddim, order=1),
    "heun": Sampler(heun, order=2, calls_per_step=2),
    "dpmpp_2m": Sampler(dpmpp_2m, order=2),
    "unipc": Sampler(unipc, order=3, orders=range(2, 4)),
    "ipndm": Sampler(ipndm, order=2, orders=range(1, 5)),
    "euler_maruyama": Sampler(euler_maruyama, order=1, needs="signal"),
    "ddpm": Sampler(ddpm, order=1, needs="signal"),
    "accelerated_ode": Sampler(accelerated_ode, order=2, calls_per_step=2, needs="preserved"),
    "accelerated_sde": Sampler(accelerated_sde, order=1, needs="preserved"),
}
SAMPLERS = tuple(_SAMPLERS)
# Those of the ODE alone that take any steps, also from the data to the noise.
REVERSIBLE = ("euler", "ddim", "heun", "dpmpp_2m", "unipc", "ipndm")


def sampler(name: str, order: int = 3) -> Sampler:
    """The sampler of that name; `order` is that of unipc, 2 or 3, or of ipndm, 1 to 4, and means
    nothing to the others.

    Raises `ConfigError` for an unknown name, or an order that the sampler does not have.
    """
    if name not in _SAMPLERS:
        raise one_of("sampler", name, SAMPLERS)
    found = _SAMPLERS[name]
    if not found.orders:
        return found
    rule = f"be in [{found.orders[0]}, {found.orders[-1]}] for sampler={name}"
    require(order in found.orders, "order", rule, order)
    return replace(found, step=partial(found.step, order=order), order=min(order, found.order))


def plan_steps(
    name: str,
    steps: int,
    grid: str | Sequence[float] | Tensor,
    schedule: Schedule,
    t_min: float = 0.0,
    order: int = 3,
    t_max: float = 1.0,
) -> tuple[Sampler, Tensor]:
    """A sampler and its times, which stay on the CPU so that no step waits for a device.

    Raises `ConfigError` naming the key of what is unknown or out of range, or a sampler that is not
    defined on the schedule.
    """
    method, times = sampler(name, order), time_grid(grid, steps, schedule, t_min, t_max)
    lacking = method.lacks(schedule, times)
    if lacking:
        defined = [key for key, other in _SAMPLERS.items() if not other.lacks(schedule, times)]
        raise ConfigError(
            f"sampler must be one of {' '.join(defined)} for {schedule}, {lacking}; got {name!r}",
            "sampler",
        )
    return method, times


def drive(trajectory: Trajectory, denoise: Denoiser) -> tuple[Tensor, int]:
    """Run a sampler to its end. Returns its result and the number of calls."""
    calls = 0
    try:
        x, t = next(trajectory)
        while True:
            calls += 1
            x, t = trajectory.send(denoise(x, t))
    except StopIteration as end:
        return end.value, calls


async def drive_async(
    trajectory: Trajectory, denoise: Callable[[Tensor, Tensor], Awaitable[Tensor]]
) -> tuple[Tensor, int]:
    """`drive`, for a denoiser that must be awaited."""
    calls = 0
    try:
        x, t = next(trajectory)
        while True:
            calls += 1
            x, t = trajectory.send(await denoise(x, t))
    except StopIteration as end:
        return end.value, calls


def start(
    x: Tensor,
    schedule: Schedule,
    sampler_name: str,
    steps: int,
    grid: str | Sequence[float] | Tensor,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    t_min: float = 0.0,
    order: int = 3,
) -> Trajectory:
    """A sampler ready to be driven from `x` `[B, ...]` at t = 1.

    The noise of step n is that of the images `index` (default 0 ... B-1) of the seed. Raises what
    `plan_steps` raises.
    """
    index = torch.arange(len(x), device=x.device) if index is None else index
    method, times = plan_steps(sampler_name, steps, grid, schedule, t_min, order)

    def noise(step: int) -> Tensor:
        return normal(seed, RngStream.STEP, index, step, x.shape[1:]).to(x.dtype)

    return method.trajectory(x, schedule, times, noise)


def sample(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 25,
    grid: str | Sequence[float] | Tensor = "uniform_t",
    seed: int = 0,
    t_min: float = 0.0,
    order: int = 3,
) -> Tensor:
    """Sample from `x` `[B, ...]`, noise times s(1), at t = 1 to the end of the grid at `t_min`;
    returns x there.

    `grid` is one of `GRIDS`, or steps + 1 falling times, the last of which is then the end.

    Raises `ConfigError` for an unknown sampler or grid, steps below 1, or a sampler that is not
    defined on the schedule.
    """
    return drive(
        start(x, schedule, sampler, steps, grid, seed=seed, t_min=t_min, order=order), denoiser
    )[0]
