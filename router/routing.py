"""The routed mixture of K experts, which is itself a denoiser."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.randomness import Use, uniform
from router import policies
from router.policies import Policy
from router.sources import Alpha

Control = Callable[[Tensor, Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """What happened at one call: the time, alpha `[B, K]`, and which experts moved which picture, bool `[B, K]`."""

    t: float
    alpha: Tensor
    chosen: Tensor


class RoutedDenoiser:
    """`(x [B, ...], t []) -> E[x0 | x_t]`, `[B, ...]`, by the experts that a policy chooses at each step.

    One object serves one batch of trajectories from start to end, because the policy's state and the source's are theirs;
    picture i of the batch draws by its number `index[i]` (default i), so its choices do not depend on its company.

    experts: K denoisers. alpha: any `(x, t) -> [B, K]`. policy: a name, or a `Policy`. pi: the clusters' shares `[K]`, default
    alpha at the first call. calls_per_step: the sampler's; the choice of experts is held within a step. clip: bound the
    result to [-1, 1], after mixing. trace: keep a `Step` for every call in `steps`.

    control: cheap stand-ins G_k for the experts, given as the sum `(x, t, weight [B, K]) -> sum_k weight_k G_k(x, t)`, such as
    `Gaussians.mix`. To what the chosen experts say is added what the stand-ins of all say, less what those of the chosen say:
    a control variate, which leaves the mean over the draws of a policy as it was, with less noise around it.

    Afterwards `calls` is the number of expert evaluations, a picture each.
    """

    def __init__(
        self,
        experts: Sequence[Callable[[Tensor, Tensor], Tensor]],
        alpha: Alpha,
        policy: str | Policy = "balanced",
        seed: int = 0,
        *,
        index: Tensor | None = None,
        pi: Tensor | None = None,
        calls_per_step: int = 1,
        clip: bool = False,
        control: Control | None = None,
        trace: bool = False,
    ) -> None:
        self.experts, self.alpha, self.seed = experts, alpha, seed
        self.policy = policies.policy(policy) if isinstance(policy, str) else policy
        self.index, self.pi = index, pi
        self.calls_per_step, self.clip, self.control, self.trace = calls_per_step, clip, control, trace
        self.calls = 0
        self.steps: list[Step] = []
        self._asked = 0
        self._state: Tensor | None = None
        self._chosen: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.alpha(x, t)
        chosen = self._choose(alpha)
        denoised = self._mix(x, t, alpha, chosen)
        if self.trace:
            self.steps.append(Step(float(t), alpha.cpu(), chosen.cpu()))
        return denoised.clamp(-1, 1) if self.clip else denoised

    def _choose(self, alpha: Tensor) -> Tensor:
        step, within = divmod(self._asked, self.calls_per_step)
        self._asked += 1
        if self._chosen is not None and within > 0:
            return self._chosen
        index = torch.arange(len(alpha), device=alpha.device) if self.index is None else self.index
        if self._state is None:
            pi = alpha if self.pi is None else self.pi.to(alpha).expand_as(alpha)
            self._state = self.policy.start(pi, uniform(self.seed, Use.CHOICE, index)[:, 0])
        draw = uniform(self.seed, Use.CHOICE, index, step + 1)[:, 0]
        self._chosen, self._state = self.policy.choose(alpha, self._state, draw)
        return self._chosen

    def _mix(self, x: Tensor, t: Tensor, alpha: Tensor, chosen: Tensor) -> Tensor:
        """Call each chosen expert once, with all its pictures, and add up by weight."""
        weight = policies.weights(alpha, chosen)
        expert, row = chosen.T.nonzero(as_tuple=True)  # sorted by expert
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        parts, times = x[row].split(counts), t.expand(len(x))[row.to(t.device)].split(counts)
        asked = [(k, part, time) for k, (part, time) in enumerate(zip(parts, times, strict=True)) if len(part)]
        answers = torch.cat([self.experts[k](part, time if t.ndim else t) for k, part, time in asked])
        self.calls += len(row)
        share = weight[row, expert].reshape(-1, *(1,) * (x.ndim - 1))
        mixed = torch.zeros_like(x).index_add_(0, row, (share * answers).to(x))
        return mixed if self.control is None else mixed + self.control(x, t, alpha - weight)
