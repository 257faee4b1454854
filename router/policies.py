"""Which experts denoise the image, given alpha: at each step a policy chooses a set of experts.

The chosen experts are weighted by alpha, renormalized over the set. A policy is stateless: the
state of a trajectory is a row of a tensor that is passed in and returned.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddm.errors import one_of, require

POLICIES = ("full", "top_k", "nucleus", "fixed", "stochastic", "balanced", "adaptive")


class Policy(Protocol):
    """A rule for choosing experts, for a batch of B trajectories over K experts."""

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        """The state `[B, ...]` before the first step.

        pi: mixture weights, `[B, K]`. u: uniform numbers in (0, 1), `[B]`.
        """
        ...

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of this step, bool `[B, K]` with at least one per row, and the state after
        it.

        alpha: `[B, K]`. state: as `start` or the last `choose` returned it. u: uniform numbers in
        (0, 1), `[B]`.
        """
        ...


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


class _Stateless:
    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return torch.zeros_like(pi)


class Full(_Stateless):
    """All experts: the mixture itself, K evaluations per step."""

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha, dtype=torch.bool), state


@dataclass(frozen=True)
class TopK(_Stateless):
    """The `k` experts of largest alpha."""

    k: int = 1

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        best = alpha.topk(min(self.k, alpha.shape[1]), dim=1).indices
        return torch.zeros_like(alpha, dtype=torch.bool).scatter_(1, best, True), state


@dataclass(frozen=True)
class Nucleus(_Stateless):
    """The fewest experts of largest alpha whose sum is at least `p`."""

    p: float = 0.9

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        descending, order = alpha.sort(dim=1, descending=True)
        mass_before = descending.cumsum(dim=1) - descending
        chosen = mass_before < self.p
        chosen[:, 0] = True  # also where p is too small for a float32
        return torch.zeros_like(chosen).scatter_(1, order, chosen), state


class Fixed:
    """One expert per trajectory, sampled from pi at t = 1: ancestral sampling of the mixture, the
    paper's Naive.
    """

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        return sample_categorical(pi, u).to(pi)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return state > 0, state


class Stochastic(_Stateless):
    """One expert sampled from alpha, independently at every step: the paper's algorithm.

    Its mean is the full step.
    """

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return sample_categorical(alpha, u), state


class Balanced:
    """One expert per step with error feedback.

    The state is a credit for each expert, which starts at `onehot(k0) - pi`, k0 sampled from pi. At
    each step `credit += alpha; k = argmax credit; credit[k] -= 1`. After any number of steps, the
    number of an expert's steps differs from the sum of its alpha by a bounded amount, so the noise
    of independent samples cancels. The random start keeps the first steps, where alpha is pi,
    unbiased.
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

    def start(self, pi: Tensor, u: Tensor) -> Tensor:
        saved = torch.zeros_like(pi[:, :1])
        return torch.cat([super().start(pi, u), saved], dim=1)

    def choose(self, alpha: Tensor, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        credit = state[:, :-1] + alpha
        saved = state[:, -1:] + self.budget - 1
        undecided = alpha.amax(dim=1, keepdim=True) < self.decided
        spend = undecided & (saved > 1 - 1e-4)  # sums of floats may stay just below 1
        first = one_hot(credit.argmax(dim=1), alpha)
        second = one_hot(credit.masked_fill(first, -torch.inf).argmax(dim=1), alpha)
        chosen = first | (second & spend)
        saved = saved - (chosen.sum(dim=1, keepdim=True) - 1)
        return chosen, torch.cat([credit - weights(alpha, chosen), saved], dim=1)


def policy(name: str, top_k: int = 1, nucleus_p: float = 0.9, budget: float = 1.5) -> Policy:
    """The policy of that name.

    Raises `ConfigError` for an unknown name or a parameter out of range.
    """
    require(isinstance(top_k, int) and top_k >= 1, "top_k", "be at least 1", top_k)
    require(0 < nucleus_p <= 1, "nucleus_p", "be in (0, 1]", nucleus_p)
    require(budget >= 1, "budget", "be at least 1 call a step", budget)
    known: dict[str, Policy] = {
        "full": Full(),
        "top_k": TopK(top_k),
        "nucleus": Nucleus(nucleus_p),
        "fixed": Fixed(),
        "stochastic": Stochastic(),
        "balanced": Balanced(),
        "adaptive": Adaptive(budget),
    }
    if name not in known:
        raise one_of("policy", name, POLICIES)
    return known[name]
