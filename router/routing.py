"""Who moves which image, as a pure function over rows, and the routed mixture of K experts, which is itself a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.rng import RngStream, uniform
from router import policies
from router.policies import Policy
from router.sources import Alpha, Source, Stateless

ControlVariate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Memory(NamedTuple):
    """What routing remembers of B trajectories, a row each: of alpha's source, of the policy, and who was chosen last."""

    source: Tensor
    policy: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Router:
    """Who moves an image: alpha's source, the weight of each cluster, and a policy.

    It keeps nothing: what it remembers of a trajectory is handed in and out, so it routes trajectories of any company, each
    anywhere on its way. `pi` `[K]` are the clusters' shares. `weights` `[K]` multiply them, and alpha with them, which is
    Bayes' rule for the mixture with those shares; 0 leaves a cluster out. `temperature` below 1 makes alpha more decided.
    """

    source: Source
    policy: Policy
    pi: Tensor
    weights: Tensor | None = None
    temperature: float = 1.0

    def start(self, x: Tensor, draw: Tensor) -> Memory:
        """The memory of trajectories that start at x `[B, ...]`, with uniform draws `[B]`."""
        pi = _reweighted(self.pi.to(x), self.weights).expand(len(x), -1)
        return Memory(
            self.source.start(x),
            self.policy.start(pi, draw),
            torch.zeros_like(pi, dtype=torch.bool),
        )

    def route(
        self,
        x: Tensor,
        t: Tensor,
        memory: Memory,
        draw: Tensor,
        held: bool | Tensor = False,
        alive: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """alpha `[B, K]` and the memory with who is chosen now, at x `[B, ...]`, t `[]` or `[B]`, with uniform draws `[B]`.

        `held` (one or `[B]`): within a step, where the choice stays. `alive` (bool `[K]`): the experts that there are; alpha is
        renormalized over them. Nobody is chosen who is not there or has weight 0: where that leaves nobody, the likeliest of
        the others is.
        """
        alpha, source = self.source.step(x, t, memory.source)
        if self.temperature != 1:
            alpha = (alpha.log() / self.temperature).softmax(dim=1)
        alpha = _reweighted(alpha, self.weights)
        if alive is not None:
            alpha = _reweighted(alpha, alive.to(alpha))
        there = None if self.weights is None else self.weights > 0
        if alive is not None:
            there = alive if there is None else there & alive
        chosen, state = self.policy.choose(alpha, memory.policy, draw)
        if held is not False:
            keep = torch.as_tensor(held, device=alpha.device).reshape(-1, 1)
            chosen, state = (
                torch.where(keep, memory.chosen, chosen),
                torch.where(keep, memory.policy, state),
            )
        if there is not None:
            chosen = chosen & there
            likeliest = policies.one_hot(alpha.masked_fill(~there, -1).argmax(dim=1), alpha)
            chosen = torch.where(chosen.any(dim=1, keepdim=True), chosen, likeliest)
        return alpha, Memory(source, state, chosen)


def _reweighted(p: Tensor, weights: Tensor | None) -> Tensor:
    """p `[..., K]` times the weights `[K]`, summing to 1; where nothing is left, the weights alone."""
    if weights is None:
        return p
    mass = p * weights
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total, weights / weights.sum()).to(p)


class Step(NamedTuple):
    """What happened at one call: the time, alpha `[B, K]`, and which experts moved which image, bool `[B, K]`."""

    t: float
    alpha: Tensor
    chosen: Tensor


class RoutedDenoiser:
    """`(x [B, ...], t []) -> E[x0 | x_t]`, `[B, ...]`, by the experts that a policy chooses at each step.

    One object serves one batch of trajectories from start to end, because the memory of the way is theirs; image i of the
    batch draws by its number `index[i]` (default i), so its choices do not depend on its company.

    experts: K denoisers. alpha: any `(x, t) -> [B, K]`, or a `Source`. policy: a name, or a `Policy`. pi: the clusters' shares
    `[K]`, default alpha at the first call. weights (the clusters' `[K]`) and temperature: see `Router`. calls_per_step: the
    sampler's; the choice of experts is held within a step. clip: bound the result to [-1, 1], after mixing. trace: keep a
    `Step` for every call in `steps`.

    control_variate: cheap stand-ins G_k for the experts, given as the sum `(x, t, weight [B, K]) -> sum_k weight_k G_k(x,
    t)`, such as
    `Gaussians.mix`. To what the chosen experts say is added what the stand-ins of all say, less what those of the chosen say:
    a control variate, which leaves the mean over the draws of a policy as it was, with less noise around it.

    Afterwards `calls` is the number of expert evaluations, an image each.
    """

    def __init__(
        self,
        experts: Sequence[Callable[[Tensor, Tensor], Tensor]],
        alpha: Alpha | Source,
        policy: str | Policy = "balanced",
        seed: int = 0,
        *,
        index: Tensor | None = None,
        pi: Tensor | None = None,
        weights: Tensor | None = None,
        temperature: float = 1.0,
        calls_per_step: int = 1,
        clip: bool = False,
        control_variate: ControlVariate | None = None,
        trace: bool = False,
    ) -> None:
        self.experts, self.seed = experts, seed
        self.source = alpha if isinstance(alpha, Source) else Stateless(alpha)
        self.policy = policies.policy(policy) if isinstance(policy, str) else policy
        self.index, self.pi, self.weights, self.temperature = index, pi, weights, temperature
        self.calls_per_step, self.clip, self.control_variate, self.trace = (
            calls_per_step,
            clip,
            control_variate,
            trace,
        )
        self.calls = 0
        self.steps: list[Step] = []
        self._asked = 0
        self._router: Router | None = None
        self._memory: Memory | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, chosen = self._route(x, t)
        denoised = self._mix(x, t, alpha, chosen)
        if self.trace:
            self.steps.append(Step(float(t), alpha.cpu(), chosen.cpu()))
        return denoised.clamp(-1, 1) if self.clip else denoised

    def _route(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        step, within = divmod(self._asked, self.calls_per_step)
        self._asked += 1
        index = torch.arange(len(x), device=x.device) if self.index is None else self.index
        if self._router is None or self._memory is None:
            pi = self.source.step(x, t, self.source.start(x))[0] if self.pi is None else self.pi
            self._router = Router(self.source, self.policy, pi, self.weights, self.temperature)
            self._memory = self._router.start(x, uniform(self.seed, RngStream.CHOICE, index)[:, 0])
        draw = uniform(self.seed, RngStream.CHOICE, index, step + 1)[:, 0]
        alpha, self._memory = self._router.route(x, t, self._memory, draw, held=within > 0)
        return alpha, self._memory.chosen

    def _mix(self, x: Tensor, t: Tensor, alpha: Tensor, chosen: Tensor) -> Tensor:
        """Call each chosen expert once, with all its images, and add up by weight."""
        weight = policies.weights(alpha, chosen)
        expert, row = chosen.T.nonzero(as_tuple=True)  # sorted by expert
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        parts, times = x[row].split(counts), t.expand(len(x))[row.to(t.device)].split(counts)
        asked = [
            (k, part, time)
            for k, (part, time) in enumerate(zip(parts, times, strict=True))
            if len(part)
        ]
        answers = torch.cat(
            [self.experts[k](part, time if t.ndim else t) for k, part, time in asked]
        )
        self.calls += len(row)
        share = weight[row, expert].reshape(-1, *(1,) * (x.ndim - 1))
        mixed = torch.zeros_like(x).index_add_(0, row, (share * answers).to(x))
        return (
            mixed
            if self.control_variate is None
            else mixed + self.control_variate(x, t, alpha - weight)
        )
