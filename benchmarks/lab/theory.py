"""The distance of the routed Euler sampler from the data: its Wasserstein-2 theorem, in numbers.

The statement is that of arXiv 2606.15835, `W2 = O(N^-1/2 + eps)`; the constants and the proof below
are worked out here.

**Setting.** Data `x0` in `R^d` with `|x0| <= R`, in K clusters; `x_t = a x0 + s eps`, and
`lam = a/s` falls in t, as it does for every schedule of this project. With `b = ds/s`,
`g = a ds/s - da = -s dlam/dt >= 0` and `e = E[eps | x_t] = (x - a D)/s`,

    v = b x - g D = da D + ds e        and for cluster k alone, with D_k, likewise        (1)

The sampler takes N even steps h from t = 1 to delta, `Y' = Y - h (b Y - g Dhat_k(Y))`, with k drawn
anew at every step from `alphahat(Y)` (the policy `stochastic`), from `Y_0 ~ N(0, s(1)^2)`. In root
mean square over its own points Y_n, at every step,

    |alphahat - alpha|_2 <= eps_router   |Dhat_k - D_k| <= eps_expert, k drawn from alphahat   (2)

Norms are Euclidean, in the K weights (rows sum to 1) and in R^d; bounds at every x imply (2), small
losses over x_t do not.

**Theorem.** `W2(Y_N, x0) <= initialization + truncation + martingale + approximation + early_stop`.
With l = 1 - delta and the stability factor
`S(t) = (s_delta / s_t) exp(R^2/2 (lam_delta^2 - lam_t^2))`, the parts are, as N grows,

    S(1) a(1) R        l/2N int S |dv/dt|        sqrt(l/N int S^2 g^2) (R + eps_expert)
    int S g (sqrt(K) R eps_router + eps_expert)        sqrt((1 - a_delta)^2 R^2 + s_delta^2 d)

with neither martingale nor router's part if K = 1. `bound` sums over the steps instead, and holds
at every N.

**Proof.** Let X follow the exact flow `dX/dt = v` from `X_1 = a x0 + s eps`, so that `X_t ~ x_t`,
and let `Y_0 = s eps` with the same eps. With `Phi = id - h v(., t)` and `Dhat` the mean of Dhat_k
over the draw of k, one step takes the error Y - X to

    Y' - X' = [Phi(Y) - Phi(X)] + [Phi(X) - X'] + h g (Dhat - D)(Y) + h g (Dhat_k - Dhat)(Y)     (3)

whose last term has mean 0 given the past, so is orthogonal to the rest in root mean square; the
others add up (Minkowski). If Phi stretches by rho at most, the next two terms are within beta and
the last within sigma, the error E obeys `E'^2 <= (rho E + beta)^2 + sigma^2`. Hence `E <= B + M`
with `B' = rho B + beta` and `M'^2 = rho^2 M^2 + sigma^2`, because `rho M <= M'`: sums over the
steps of beta, and of sigma^2, times all later factors. `step` and `Constants` give rho, beta and
sigma. The couplings of X_1 with Y_0 and of `x_delta = a x0 + s eps` with x0 give the initialization
and the early stop. QED

Two points at +-R attain rho, on the path that stays midway between them. Hardly any path does: a
worst case compounded over all steps, `exp(R^2 / 2 s_delta^2)`, is what makes the bound loose.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.errors import require
from ddm.schedules import Schedule


class Constants(NamedTuple):
    """What holds of all data in the ball at the times t: tensors like t, in units of x and 1/t.
    Each is derived here.

    `Sigma = Cov(x0 | x_t)`, for which `0 <= Sigma <= R^2`; `||.||` is the root mean square over
    x_t. A cluster's D_k and v_k obey the same constants, since its data lie in the same ball.

    lipschitz: of v in x. `grad D = (a/s^2) Sigma`, so `grad v = b - (g a/s^2) Sigma` is symmetric
        with eigenvalues in `[b - g a R^2/s^2, b]`; the larger absolute value.
    expansion: `g a R^2/s^2 - b`, the rate at which paths can part towards the data; negative if all
        approach. It integrates to log S, because `g a/s^2 = -d(lam^2/2)/dt` and `b = d log s/dt`.
    offset, slope: growth, `|v(x)| <= offset + slope |x|`: `g R` and `|b|`, from (1) and `|D| <= R`.
    moment: `||x_t|| <= sqrt(a^2 R^2 + s^2 d)`, which is the flow's as well.
    time_derivative: along the flow, `||dv/dt|| <= |a''| R + |s''| sqrt(d) + s (dlam/dt)^2 rate`,
        the rate of `denoiser_rate` at `||e|| <= ||eps|| = sqrt(d)`; from (1) and
        `de/dlam = -lam dD/dlam`. For schedules that torch differentiates twice. Times h^2/2 it is
        the truncation of a short step.
    martingale: sigma over h, with exact experts:
        `g sqrt(sum_k alphahat_k |D_k - sum_j alphahat_j D_j|^2) <= g R`; 0 if K = 1. With the
        experts' errors R becomes `R + eps_expert`, by Minkowski.
    router, expert: beta over h, less the truncation, is `router eps_router + expert eps_expert`,
        `g sqrt(K) R` (0 if K = 1) and `g`:
        `|sum_k (alphahat_k - alpha_k) D_k| <= |alphahat - alpha|_2 sqrt(K) R` by Cauchy-Schwarz,
        and by Jensen the error of a mean of experts is no larger than that of the one drawn.
    """

    lipschitz: Tensor
    expansion: Tensor
    offset: Tensor
    slope: Tensor
    moment: Tensor
    time_derivative: Tensor
    martingale: Tensor
    router: Tensor
    expert: Tensor


def constants(schedule: Schedule, R: float, d: int, K: int, t: Tensor) -> Constants:
    """The `Constants` of data in a ball of radius R about 0 in R^d, in K clusters, at times `t`
    `[n]` in (0, 1], float64.

    Raises `ConfigError` for R not above 0, or d or K below 1.
    """
    _check(R, d, K)
    a, s, da, ds = schedule(t)
    dda, dds = _second_derivatives(schedule, t)
    b, g, lam, root_d = ds / s, a * ds / s - da, a / s, math.sqrt(d)
    pull, several = g * lam / s * R**2, float(K > 1)
    return Constants(
        lipschitz=torch.maximum(b.abs(), (b - pull).abs()),
        expansion=pull - b,
        offset=g * R,
        slope=b.abs(),
        moment=((a * R) ** 2 + s**2 * d).sqrt(),
        time_derivative=dda.abs() * R
        + dds.abs() * root_d
        + g**2 / s * denoiser_rate(lam, R, root_d),
        martingale=several * g * R,
        router=several * math.sqrt(K) * g * R,
        expert=g,
    )


def _second_derivatives(schedule: Schedule, t: Tensor) -> list[Tensor]:
    """`a''` and `s''`, by differentiating the closed forms of da and ds."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        # 0 t: a straight path has a da that does not depend on t, which autograd would refuse.
        return [
            torch.autograd.grad((rate + 0 * t).sum(), t, retain_graph=True)[0]
            for rate in schedule(t)[2:]
        ]


def denoiser_rate(lam: Tensor, R: float, noise: Tensor | float) -> Tensor:
    """A bound on `|dD/dlam|` along the flow where `|e| = noise`: `R^2 |e| + (32/27) lam R^3`.

    For `y = x/s` the flow is `dy/dlam = D`, and the log-density of x0 given y is
    `lam y.x0 - lam^2 |x0|^2/2` plus that of x0 and a normalizer. With `z = x0 - D` and
    `y = lam D + e`, its derivative is `e.z - lam |z|^2` up to a constant, and the mean of x0 moves
    by the covariance with it: `dD/dlam = Sigma e - lam E[z |z|^2]`. Last, `|z| <= R + |D|` and
    `E|z|^2 <= R^2 - |D|^2` give `E|z|^3 <= (R + |D|)^2 (R - |D|)`, which is largest at `|D| = R/3`.
    """
    return R**2 * noise + 32 / 27 * R**3 * lam


class Step(NamedTuple):
    """Euler steps, one or many: tensors like their times. See `step`."""

    factor: Tensor
    truncation: Tensor
    kept: Tensor


def step(schedule: Schedule, R: float, d: int, t: Tensor, t_next: Tensor) -> Step:
    """What Euler's steps from t to t_next < t, of any length h = t - t_next, do to an error and
    what they add to it.

    factor: rho, with `|Phi(x) - Phi(y)| <= rho |x - y|`. `grad Phi = 1 - h grad v` has eigenvalues
        in `[1 - h b, 1 - h b + h g a R^2/s^2]`, so rho is at most `1 + h lipschitz`, and below 1
        where the flow contracts.
    truncation: `||Phi(X) - X'||`. By `d(x/s)/dlam = D` the flow is
        `X' = (s'/s) X + s' int_lam^lam' D_mu dmu`, so that
        `Phi(X) - X' = (s - h ds - s') e + (a - h da - a') D - s' int_lam^lam' (D_mu - D) dmu`:
        Euler's own errors on s and a, where `||e|| <= sqrt(d)` and `|D| <= R`, and a double
        integral of `denoiser_rate`. It holds across kinks as well.
    kept: `|1 - h b|`, so that the second moment of the routed points obeys
        `||Y'|| <= kept ||Y|| + h g (R + eps_expert)`.
    """
    (a, s, da, ds), (a_next, s_next, _, _) = schedule(t), schedule(t_next)
    h, b, g, lam, root_d = t - t_next, ds / s, a * ds / s - da, a / s, math.sqrt(d)
    gained = a_next / s_next - lam
    of_schedule = (s - h * ds - s_next).abs() * root_d + (a - h * da - a_next).abs() * R
    # int_lam^lam' (lam' - mu) rate(mu) dmu, of a rate affine in mu: that at the weight's centre, a
    # third of the way.
    of_denoiser = s_next * gained**2 / 2 * denoiser_rate(lam + gained / 3, R, root_d)
    kept = 1 - h * b
    return Step(
        torch.maximum(kept.abs(), kept + h * g * lam / s * R**2),
        of_schedule + of_denoiser,
        kept.abs(),
    )


def stability(schedule: Schedule, R: float, delta: float) -> float:
    """log10 of `S(1) = (s_delta / s_1) exp(R^2/2 (lam_delta^2 - lam_1^2))`, the limit of the
    product of all factors.

    Two paths of the flow end at most so much farther apart than they began. Raises `ConfigError`
    for R or delta out of range.
    """
    _check(R, delta=delta)
    a, s, _, _ = schedule(torch.tensor([delta, 1.0], dtype=torch.float64))
    log_s, snr = s.log(), (a / s) ** 2
    return float((log_s[0] - log_s[1] + R**2 / 2 * (snr[0] - snr[1])) / math.log(10))


class Bound(NamedTuple):
    """The theorem in numbers: log10 of distances in units of x, the root of a sum over d; -inf for
    none.

    The theorem's five parts; `sampling`, the first four together: the distance from x_delta;
    `total`, all five: that from x0. trivial: `||Y_N|| + ||x_delta||`, to which bounded denoisers
    limit `sampling` anyhow: where it is more, it says nothing.
    """

    initialization: float
    truncation: float
    martingale: float
    approximation: float
    early_stop: float
    sampling: float
    total: float
    trivial: float


def bound(
    schedule: Schedule,
    R: float,
    d: int,
    K: int,
    delta: float,
    steps: int,
    eps_router: float = 0.0,
    eps_expert: float = 0.0,
) -> Bound:
    """The bound on W2 between the routed Euler sampler's end and the data, after `steps` even steps
    from t = 1 to `delta`.

    The data lie in a ball of radius R about 0 in R^d, in K clusters; eps_router and eps_expert are
    the errors (2). Summed as logarithms, which nothing overflows. Raises `ConfigError` for R not
    above 0, d, K or steps below 1, delta not in (0, 1), or a negative error.
    """
    _check(R, d, K, delta, steps, eps_router, eps_expert)
    times = torch.linspace(1, delta, steps + 1, dtype=torch.float64)
    t, t_next, h = times[:-1], times[1:], (1 - delta) / steps
    c, (factor, truncation, kept) = constants(schedule, R, d, K, t), step(schedule, R, d, t, t_next)
    from_step = factor.log().flip(0).cumsum(0).flip(0)
    after_step = torch.cat([from_step[1:], from_step.new_zeros(1)])
    sigma = h * c.martingale * (1 + eps_expert / R)
    approximation = h * (c.router * eps_router + c.expert * eps_expert)
    ends = schedule(times[[0, -1]])
    parts = torch.stack(
        [
            (ends.a[0] * R).log() + from_step[0],
            (truncation.log() + after_step).logsumexp(0),
            (2 * (sigma.log() + after_step)).logsumexp(0) / 2,
            (approximation.log() + after_step).logsumexp(0),
            torch.hypot((1 - ends.a[1]) * R, ends.s[1] * math.sqrt(d)).log(),
        ]
    )
    reached = float(ends.s[0]) * math.sqrt(d)
    for share, pushed in zip(
        kept.tolist(), (h * c.expert * (R + eps_expert)).tolist(), strict=True
    ):
        reached = share * reached + pushed
    trivial = (reached + constants(schedule, R, d, K, times[-1]).moment).log()
    sums = [parts[:4].logsumexp(0), parts.logsumexp(0), trivial]
    return Bound(*(torch.cat([parts, torch.stack(sums)]) / math.log(10)).tolist())


def _check(
    R: float,
    d: int = 1,
    K: int = 1,
    delta: float = 0.5,
    steps: int = 1,
    eps_router: float = 0.0,
    eps_expert: float = 0.0,
) -> None:
    require(0 < R < math.inf, "theory.R", "be above 0 and finite", R)
    for key, count in {"d": d, "K": K, "steps": steps}.items():
        require(isinstance(count, int) and count >= 1, f"theory.{key}", "be at least 1", count)
    require(0 < delta < 1, "theory.delta", "be in (0, 1)", delta)
    for key, error in {"eps_router": eps_router, "eps_expert": eps_expert}.items():
        require(0 <= error < math.inf, f"theory.{key}", "be at least 0 and finite", error)
