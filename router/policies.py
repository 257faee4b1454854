"""Who moves the picture, given alpha: at each step a policy chooses a set of experts.

The chosen experts are mixed with alpha's weights, renormalized over the set, so a policy is nothing but its choice.
What it remembers is a tensor with a row a trajectory, handed in and out: state belongs to trajectories, not to policies.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddm.errors import one_of, require

POLICIES = ("full", "top_k", "nucleus", "fixed", "stochastic", "balanced")


class Policy(Protocol):
    """A rule for choosing experts, for a batch of B trajectories over K experts."""

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        """The state `[B, K]` before the first step, from shares `pi` `[B, K]` and uniform draws `[B]` in (0, 1)."""
        ...

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of this step, bool `[B, K]` with at least one a row, and the state after it."""
        ...


def drawn(p: Tensor, draw: Tensor) -> Tensor:
    """One expert a row, drawn from `p` `[B, K]` by uniform numbers `[B]` in (0, 1): bool `[B, K]`, never where p is 0."""
    mass = p.double().cumsum(dim=1)
    k = (mass <= draw[:, None] * mass[:, -1:]).sum(dim=1)
    return _one_hot(k, p)


def _one_hot(k: Tensor, like: Tensor) -> Tensor:
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
        return torch.zeros_like(alpha, dtype=torch.bool).scatter_(1, order, mass_before < self.p), state


class Fixed:
    """One expert drawn from pi at t = 1 and kept: ancestral sampling of the mixture, the paper's Naive."""

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        return drawn(pi, draw).to(pi)

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        return state > 0, state


class Stochastic(_Stateless):
    """One expert drawn from alpha, independently at every step: the paper's algorithm. On average, the full step."""

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        return drawn(alpha, draw), state


class Balanced:
    """One expert a step with error feedback: what alpha promised an expert and it did not get is its credit.

    Credit starts at `onehot(k0) - pi`, k0 drawn from pi; at each step `credit += alpha; k = argmax credit; credit[k] -= 1`.
    After any number of steps every expert's turns differ from the sum of its alpha by a bounded amount, so the noise that
    independent draws leave behind cancels; the random start keeps the first steps, where alpha is pi, unbiased.
    """

    def start(self, pi: Tensor, draw: Tensor) -> Tensor:
        return drawn(pi, draw).to(pi) - pi

    def choose(self, alpha: Tensor, state: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        credit = state + alpha
        chosen = _one_hot(credit.argmax(dim=1), alpha)
        return chosen, credit - chosen.to(credit)


def policy(name: str, top_k: int = 1, nucleus_p: float = 0.9) -> Policy:
    """The policy of that name. Raises `ConfigError` for one that does not exist, or a parameter out of range."""
    match name:
        case "full":
            return Full()
        case "top_k":
            require(isinstance(top_k, int) and top_k >= 1, "sample.top_k", "be at least 1", top_k)
            return TopK(top_k)
        case "nucleus":
            require(0 < nucleus_p <= 1, "sample.nucleus_p", "be in (0, 1]", nucleus_p)
            return Nucleus(nucleus_p)
        case "fixed":
            return Fixed()
        case "stochastic":
            return Stochastic()
        case "balanced":
            return Balanced()
        case _:
            raise one_of("sample.policy", name, POLICIES)
