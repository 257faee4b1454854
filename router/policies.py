"""Who moves the image, given alpha: at each step a policy chooses a set of experts.

The chosen experts are mixed with alpha's weights, renormalized over the set, so a policy is nothing but its choice.
What it remembers is a tensor with a row a trajectory, handed in and out: state belongs to trajectories, not to policies.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddm.errors import one_of, require

POLICIES = ("full", "top_k", "nucleus", "fixed", "stochastic", "balanced", "adaptive")


class Policy(Protocol):
    """A rule for choosing experts, for a batch of B trajectories over K experts."""

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        """The state `[B, ...]` before the first step, from shares `pi` `[B, K]` and uniform draws `[B]` in (0, 1)."""
        ...

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of this step, bool `[B, K]` with at least one a row, and the state after it."""
        ...


def sample_categorical(p: Tensor, draw: Tensor) -> Tensor:
    """One expert a row, drawn from `p` `[B, K]` by uniform numbers `[B]` in (0, 1): bool `[B, K]`, never where p is 0."""
    mass = p.double().cumsum(dim=1)
    k = (mass <= draw[:, None] * mass[:, -1:]).sum(dim=1)
    return one_hot(k, p)


def weights(alpha: Tensor, chosen: Tensor) -> Tensor:
    """The share of each chosen expert in the mixture, `[B, K]`: alpha renormalized over the chosen, even where it is 0 there."""
    weight = torch.where(chosen, alpha, 0)
    total = weight.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weight / total, chosen / chosen.sum(dim=1, keepdim=True)).to(
        alpha
    )


def one_hot(k: Tensor, like: Tensor) -> Tensor:
    """Expert k `[B]` alone, bool `[B, K]` as `like` is."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, k[:, None], True)


class _Stateless:
    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        return torch.zeros_like(pi)


class Full(_Stateless):
    """All experts: the mixture itself, K calls a step."""

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha, dtype=torch.bool), state


@dataclass(frozen=True)
class TopK(_Stateless):
    """The `k` experts of largest alpha."""

    k: int = 1

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        best = alpha.topk(min(self.k, alpha.shape[1]), dim=1).indices
        return torch.zeros_like(alpha, dtype=torch.bool).scatter_(1, best, True), state


@dataclass(frozen=True)
class Nucleus(_Stateless):
    """The fewest experts of largest alpha that carry the mass `p` together."""

    p: float = 0.9

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        falling, order = alpha.sort(dim=1, descending=True)
        mass_before = falling.cumsum(dim=1) - falling
        few = mass_before < self.p
        few[:, 0] = True  # also where p is too small for a float32
        return torch.zeros_like(few).scatter_(1, order, few), state


class Fixed:
    """One expert drawn from pi at t = 1 and kept: ancestral sampling of the mixture, the paper's Naive."""

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        return sample_categorical(pi, draw).to(pi)

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        return state > 0, state


class Stochastic(_Stateless):
    """One expert drawn from alpha, independently at every step: the paper's algorithm. On average, the full step."""

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        return sample_categorical(alpha, draw), state


class Balanced:
    """One expert a step with error feedback: what alpha promised an expert and it did not get is its credit.

    Credit starts at `onehot(k0) - pi`, k0 drawn from pi; at each step `credit += alpha; k = argmax credit; credit[k] -= 1`.
    After any number of steps every expert's turns differ from the sum of its alpha by a bounded amount, so the noise that
    independent draws leave behind cancels; the random start keeps the first steps, where alpha is pi, unbiased.
    """

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        return sample_categorical(pi, draw).to(pi) - pi

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        credit = state + alpha
        chosen = one_hot(credit.argmax(dim=1), alpha)
        return chosen, credit - chosen.to(credit)


@dataclass(frozen=True)
class Adaptive(Balanced):
    """`balanced`, with a second expert where alpha is undecided, for at most `budget` calls a step on average.

    What the budget leaves over one call a step is saved; a saved call is spent where the largest alpha is below `decided`. The
    two with the largest credit are mixed, and each pays its share.
    """

    budget: float = 1.5
    decided: float = 0.9

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        saved = torch.zeros_like(pi[:, :1])  # the state's last column
        return torch.cat([super().start(pi, draw), saved], dim=1)

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        credit, saved = state[:, :-1] + alpha, state[:, -1:] + self.budget - 1
        spend = (saved > 1 - 1e-4) & (
            alpha.amax(dim=1, keepdim=True) < self.decided
        )  # sums of floats: 0.4 + 0.6 < 1
        first = one_hot(credit.argmax(dim=1), alpha)
        second = one_hot(credit.masked_fill(first, -torch.inf).argmax(dim=1), alpha)
        chosen = first | (second & spend)
        saved = saved - (chosen.sum(dim=1, keepdim=True) - 1)
        return chosen, torch.cat([credit - weights(alpha, chosen), saved], dim=1)


def policy(name: str, top_k: int = 1, nucleus_p: float = 0.9, budget: float = 1.5) -> Policy:
    """The policy of that name. Raises `ConfigError` for one that does not exist, or a parameter out of range."""
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
