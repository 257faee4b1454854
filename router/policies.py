"""Which experts denoise the image, given alpha: at each step a policy chooses a set of experts.

The chosen experts are weighted by alpha, renormalized over the set. A policy is stateless: the
state of a trajectory is a row of a tensor that is passed in and returned, and its random numbers
are a function of the seed, the image and the step.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ddm.errors import one_of, require
from ddm.rng import RngStream, uniform

POLICIES = ("full", "top_k", "nucleus", "fixed", "switching", "stochastic", "balanced", "adaptive")


class Policy(Protocol):
    """A rule for choosing experts, for a batch of B trajectories over K experts.

    keeps: the experts stay the same from step to step where `uniforms` says so. Such a policy
    follows one expert's ODE at a time; the others follow the mixture's.
    """

    keeps: ClassVar[bool]

    def uniforms(
        self, seed: int | Tensor, index: Tensor, step: Tensor, t_last: Tensor, t: Tensor
    ) -> Tensor:
        """The uniform numbers in (0, 1) with which `choose` draws, float64 `[B, N]`; NaN at a step
        that keeps its experts.

        seed: one or int64 `[B]`. index: of the images, int64 `[B]`. step: numbers of the steps,
        int64 `[N]`. t, t_last: times of these steps and of those before them, `[N]` or `[B, N]`;
        of the first step both are its own.
        """
        ...

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        """The state `[B, ...]` before the first step.

        pi: mixture weights, or alpha of an image that does not start as pure noise, `[B, K]`. u:
        uniform numbers in (0, 1), `[B]`.
        """
        ...

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of this step, bool `[B, K]` with at least one per row, and the state after
        it.

        alpha: `[B, K]`. state: as `start` or the last `choose` returned it. u: a column of
        `uniforms`, `[B]`; what is returned where it is NaN is not used.
        """
        ...

    def nfe_per_step(self, k: int) -> float:
        """About how many of k experts it evaluates for an image at each step."""
        ...


def first_uniforms(seed: int | Tensor, index: Tensor) -> Tensor:
    """The uniform numbers in (0, 1) with which images draw their first expert, float64 `[B]`.

    They are the low-discrepancy sequence of the golden ratio, `frac(shift + i 0.618...)`, with a
    shift of the seed's own: any 16 images in a row have the experts in nearly the proportions of
    pi, and each image alone has every number equally often over the seeds.
    """
    shift = uniform(seed, RngStream.CHOICE, torch.zeros_like(index))[:, 0]
    # As whole numbers, which wrap: exact for any index.
    return (shift + (index * 0x9E3779B9 & 0xFFFFFFFF).double() / 2**32) % 1


def step_uniforms(seed: int | Tensor, index: Tensor, step: Tensor) -> Tensor:
    """Independent uniform numbers in (0, 1), one for each image and step, float64 `[B, N]`;
    arguments as in `Policy.uniforms`.
    """
    seeds = seed.repeat_interleave(len(step)) if isinstance(seed, Tensor) else seed
    images = index.repeat_interleave(len(step))
    numbers = step.to(index.device).repeat(len(index)) + 1  # 0 is `first_uniforms`'
    return uniform(seeds, RngStream.CHOICE, images, numbers).reshape(len(index), len(step))


def sample_categorical(p: Tensor, u: Tensor) -> Tensor:
    """One expert per row, sampled from `p` `[B, K]` (up to a factor) by inversion of `u` `[B]` in
    (0, 1): bool `[B, K]`.

    Never one whose p is 0.
    """
    cumulative = p.double().cumsum(dim=1)
    k = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(dim=1)
    return one_hot(k, p)


def weights(alpha: Tensor, chosen: Tensor) -> Tensor:
    """alpha `[B, K]` renormalized over the chosen, bool `[B, K]`; equal weights where alpha is 0
    for all of them.
    """
    weight = torch.where(chosen, alpha, 0)
    total = weight.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weight / total, chosen / chosen.sum(dim=1, keepdim=True)).to(
        alpha
    )


def one_hot(k: Tensor, like: Tensor) -> Tensor:
    """Expert k `[B]` alone, bool `[B, K]`, the shape of `like`."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, k[:, None], True)


class _EveryStep:
    """Chooses anew at each step, and has no state."""

    keeps: ClassVar[bool] = False

    def uniforms(
        self, seed: int | Tensor, index: Tensor, step: Tensor, t_last: Tensor, t: Tensor
    ) -> Tensor:
        return step_uniforms(seed, index, step)

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(pi)

    def nfe_per_step(self, k: int) -> float:
        return 1.0


class Full(_EveryStep):
    """All experts: the mixture itself, K evaluations per step."""

    def nfe_per_step(self, k: int) -> float:
        return float(k)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha, dtype=torch.bool), state


@dataclass(frozen=True)
class TopK(_EveryStep):
    """The `k` experts of largest alpha."""

    k: int = 1

    def nfe_per_step(self, k: int) -> float:
        return float(min(self.k, k))

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        best = alpha.topk(min(self.k, alpha.shape[1]), dim=1).indices
        return torch.zeros_like(alpha, dtype=torch.bool).scatter_(1, best, True), state


@dataclass(frozen=True)
class Nucleus(_EveryStep):
    """The fewest experts of largest alpha whose sum is at least `p`."""

    p: float = 0.9

    def nfe_per_step(self, k: int) -> float:
        return float(k)  # at most: alpha is not known before

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        descending, order = alpha.sort(dim=1, descending=True)
        mass_before = descending.cumsum(dim=1) - descending
        chosen = mass_before < self.p
        chosen[:, 0] = True  # also where p is too small for a float32
        return torch.zeros_like(chosen).scatter_(1, order, chosen), state


@dataclass(frozen=True)
class Switching:
    """One expert per trajectory, drawn anew from alpha at the times of a Poisson process of `rate`
    per unit of t; the first is drawn from pi.

    Exact for every rate, if the experts and alpha are. Let (x, k) have the law `pi_k p_k(x, t)`.
    Between two redraws x follows expert k's ODE, which carries `p_k(., t)` to `p_k(., t')`, and k
    stays: the pair's law is `pi_k p_k(x, t')`. A redraw replaces k by a sample of
    `alpha_k(x, t) = pi_k p_k(x, t) / p(x, t)`, the law of k given x, and leaves x: the pair's law is
    what it was. Whether there is a redraw does not depend on the pair, so x has the mixture's
    marginal `p(x, t) = sum_k pi_k p_k(x, t)` at every t. Rate 0 is ancestral sampling, the policy
    `fixed`, and an infinite rate the policy `stochastic`. Between two redraws the path is smooth,
    so that samplers of high order keep their order; the redraws correct what a wrong first expert
    has done.

    The times of the redraws, and the numbers with which they draw, are a function of the seed and
    the image alone, so that an image changes little with the number of steps. A redraw takes place
    at the first step after its time.
    """

    rate: float

    keeps: ClassVar[bool] = True

    def nfe_per_step(self, k: int) -> float:
        return 1.0

    def uniforms(
        self, seed: int | Tensor, index: Tensor, step: Tensor, t_last: Tensor, t: Tensor
    ) -> Tensor:
        shape = len(index), len(step)
        if self.rate == 0:
            return torch.full(shape, torch.nan, dtype=torch.float64, device=index.device)
        redraws, choices = self.redraws(seed, index)
        count, count_last = (
            torch.searchsorted(-redraws, -times.to(redraws).expand(shape).contiguous(), right=True)
            for times in (t, t_last)
        )
        newest = choices.gather(1, (count - 1).clamp_min(0))
        return torch.where(count > count_last, newest, torch.nan)

    def redraws(self, seed: int | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The times of the redraws, falling from 1 to below 0, and the uniform number of each: two
        float64 `[B, M]`; the rate must be above 0.
        """
        # More than so many redraws in a unit of t have a probability below 1e-12.
        most = math.ceil(self.rate + 8 * math.sqrt(self.rate) + 16)
        drawn = uniform(seed, RngStream.SWITCH, index, 0, 2 * most)
        gaps = -drawn[:, 0::2].log() / self.rate
        return 1 - gaps.cumsum(dim=1), drawn[:, 1::2]

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(pi)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return sample_categorical(alpha, u), state


class Stochastic(_EveryStep):
    """One expert sampled from alpha, independently at every step: the paper's algorithm.

    Its mean is the full step.
    """

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return sample_categorical(alpha, u), state


class Balanced(_EveryStep):
    """One expert per step with error feedback.

    The state is a credit for each expert, which starts at `onehot(k0) - pi`, k0 sampled from pi, or
    from alpha in pi's place where an image does not come from pure noise. At
    each step `credit += alpha; k = argmax credit; credit[k] -= 1`. After any number of steps, the
    number of an expert's steps differs from the sum of its alpha by a bounded amount, so the noise
    of independent samples cancels. The random start keeps the first steps, where alpha is pi,
    unbiased. This is sum-up rounding of mixed-integer optimal control (Sager, Bock, Diehl, Math.
    Program. 133, 2012).
    """

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return sample_categorical(pi, u).to(pi) - pi

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        credit = state + alpha
        chosen = one_hot(credit.argmax(dim=1), alpha)
        return chosen, credit - chosen.to(credit)


@dataclass(frozen=True)
class Adaptive(Balanced):
    """`balanced`, with a second expert where alpha is undecided, for at most `budget` evaluations
    per step on average.

    Each step saves `budget - 1` evaluations. A whole one is spent when the largest alpha is below
    `decided`: the two experts of largest credit are mixed, and each pays its weight. The state is
    `[B, K + 1]`, the saved evaluations last.
    """

    budget: float = 1.5
    decided: float = 0.9

    def nfe_per_step(self, k: int) -> float:
        return min(self.budget, k)

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        saved = torch.zeros_like(pi[:, :1])
        return torch.cat([super().start(pi, u), saved], dim=1)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        credit = state[:, :-1] + alpha
        saved = state[:, -1:] + self.budget - 1
        undecided = alpha.amax(dim=1, keepdim=True) < self.decided
        spend = undecided & (saved > 1 - 1e-4)  # sums of floats may stay just below 1
        first = one_hot(credit.argmax(dim=1), alpha)
        # At the first step all others' credit is 0: alpha decides.
        rest = (credit + 1e-6 * alpha).masked_fill(first, -torch.inf)
        second = one_hot(rest.argmax(dim=1), alpha)
        chosen = first | (second & spend)
        saved = saved - (chosen.sum(dim=1, keepdim=True) - 1)
        return chosen, torch.cat([credit - weights(alpha, chosen), saved], dim=1)


def policy(
    name: str,
    top_k: int = 1,
    nucleus_p: float = 0.9,
    budget: float = 1.5,
    switch_rate: float = 1.0,
) -> Policy:
    """The policy of that name.

    Raises `ConfigError` for an unknown name or a parameter out of range.
    """
    require(isinstance(top_k, int) and top_k >= 1, "top_k", "be at least 1", top_k)
    require(0 < nucleus_p <= 1, "nucleus_p", "be in (0, 1]", nucleus_p)
    require(budget >= 1, "budget", "be at least 1 call a step", budget)
    require(0 <= switch_rate < math.inf, "switch_rate", "be finite and at least 0", switch_rate)
    known: dict[str, Policy] = {
        "full": Full(),
        "top_k": TopK(top_k),
        "nucleus": Nucleus(nucleus_p),
        "fixed": Switching(0.0),
        "switching": Switching(switch_rate),
        "stochastic": Stochastic(),
        "balanced": Balanced(),
        "adaptive": Adaptive(budget),
    }
    if name not in known:
        raise one_of("policy", name, POLICIES)
    return known[name]
