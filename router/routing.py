"""One routed step as a pure function of a batch, and the routed mixture of K experts, itself a
denoiser.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from router import policies
from router.policies import Policy
from router.sources import Alpha, Source, Stateless

# (x [B, ...], t [] or [B], weight [B, K]) -> sum_k weight_k G_k(x, t) [B, ...]
ControlVariate = Callable[[Tensor, Tensor, Tensor], Tensor]


class RoutingState(NamedTuple):
    """The state of B trajectories, one row each.

    source: of the source of alpha, `[B, M]`. policy: of the policy, `[B, ...]`. chosen: the experts
    of the last call, bool `[B, K]`. alpha: as last evaluated, `[B, K]`. evaluated: whether that was
    in the last call, bool `[B]`.
    """

    source: Tensor
    policy: Tensor
    chosen: Tensor
    alpha: Tensor
    evaluated: Tensor


@dataclass(frozen=True)
class Router:
    """Which experts denoise an image: a source of alpha and a policy.

    Stateless: one batch may mix trajectories at different times, because their state is passed in
    and returned.

    pi: the mixture weights of the clusters, `[K]`, or None for alpha at the first call
    (`RoutedDenoiser` alone).
    weights: `[K]`, factors of pi and alpha, which by Bayes' rule makes them those of the mixture
    with the weights `pi * weights`; 0 leaves a cluster out. None for all 1.
    temperature: the policy sees `alpha^(1/temperature)`, renormalized.
    """

    source: Source
    policy: Policy
    pi: Tensor | None = None
    weights: Tensor | None = None
    temperature: float = 1.0

    @staticmethod
    def of(
        alpha: Alpha | Source, policy: str | Policy = "balanced", pi: Tensor | None = None
    ) -> "Router":
        """The router of any `(x, t) -> alpha [B, K]` and a policy or its name."""
        source = alpha if isinstance(alpha, Source) else Stateless(alpha)
        return Router(source, policies.policy(policy) if isinstance(policy, str) else policy, pi)

    def start(self, x: Tensor, u: Tensor) -> RoutingState:
        """The state of trajectories that start at x `[B, ...]`; u: `first_uniforms`, `[B]`."""
        assert self.pi is not None
        pi = _reweighted(self.pi.to(x), self.weights).expand(len(x), -1)
        return RoutingState(
            source=self.source.start(x),
            policy=self.policy.start(pi, u),
            chosen=policies.sample_categorical(pi, u),
            alpha=pi,
            evaluated=torch.zeros(len(x), dtype=torch.bool, device=x.device),
        )

    def route(
        self,
        x: Tensor,
        t: Tensor,
        state: RoutingState,
        u: Tensor,
        keep: bool | Tensor = False,
        available: Tensor | None = None,
        every_alpha: bool = False,
    ) -> tuple[Tensor, RoutingState]:
        """Choose experts at x `[B, ...]`, t `[]` or `[B]`.

        Returns alpha `[B, K]` and the new state, with the choice in it.

        u: of the policy's `uniforms`, `[B]`. keep: the trajectories that keep their choice, because
        their step has begun; one bool or `[B]`. available: bool `[K]`, None for all. every_alpha:
        evaluate alpha also where a policy that `keeps` its experts does, and where it is otherwise
        the last one.

        alpha is renormalized over the available experts. Unavailable and zero-weight experts are
        never selected; if none of the chosen remain, the most likely eligible expert is used.
        """
        eligible = None if self.weights is None else self.weights > 0
        if available is not None:
            eligible = available if eligible is None else eligible & available
        kept = u.isnan() | torch.as_tensor(keep, device=u.device)
        # A source that integrates along the trajectory needs every step.
        if self.policy.keeps and isinstance(self.source, Stateless) and not every_alpha:
            evaluated = ~kept
            if eligible is not None:
                evaluated |= ~(state.chosen & eligible).any(dim=1)
            alpha, source_state = self._alpha_of(evaluated, x, t, state), state.source
        else:
            evaluated = torch.ones_like(kept)
            alpha, source_state = self.source.step(x, t, state.source)
            alpha = self._tempered(alpha)
        after = state._replace(source=source_state, alpha=alpha, evaluated=evaluated)
        if available is not None:
            alpha = _reweighted(alpha, available.to(alpha))
        drawn, policy_state = self.policy.choose(alpha, state.policy, u)
        chosen = torch.where(kept[:, None], state.chosen, drawn)
        policy_state = torch.where(kept[:, None], state.policy, policy_state)
        if eligible is not None:
            chosen = chosen & eligible
            most_likely = alpha.masked_fill(~eligible, -1).argmax(dim=1)
            fallback = policies.one_hot(most_likely, alpha)
            chosen = torch.where(chosen.any(dim=1, keepdim=True), chosen, fallback)
        return alpha, after._replace(policy=policy_state, chosen=chosen)

    def _alpha_of(self, wanted: Tensor, x: Tensor, t: Tensor, state: RoutingState) -> Tensor:
        """alpha `[B, K]` before availability, evaluated at the `wanted` rows, bool `[B]`, and at the
        others as it was last.
        """
        rows = wanted.nonzero()[:, 0]
        if not len(rows):
            return state.alpha
        times = t[rows.to(t.device)] if t.ndim else t
        alpha, _ = self.source.step(x[rows], times, state.source[rows])
        return state.alpha.index_copy(0, rows, self._tempered(alpha).to(state.alpha))

    def _tempered(self, alpha: Tensor) -> Tensor:
        """alpha at the temperature, reweighted."""
        if self.temperature != 1:
            alpha = (alpha.log() / self.temperature).softmax(dim=1)
        return _reweighted(alpha, self.weights)


def _reweighted(p: Tensor, weights: Tensor | None) -> Tensor:
    """p `[..., K]` times the weights `[K]`, normalized; the weights alone, normalized, where the
    product is 0 for all k.
    """
    if weights is None:
        return p
    mass = p * weights
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total, weights / weights.sum()).to(p)


class Step(NamedTuple):
    """One denoiser call: its time, alpha `[B, K]`, and the experts evaluated for each image, bool
    `[B, K]`.
    """

    t: float
    alpha: Tensor
    chosen: Tensor


class RoutedDenoiser:
    """`(x [B, ...], t []) -> E[x0 | x_t]`, `[B, ...]`, by the experts that a policy chooses at each
    step.

    One object serves one batch of trajectories from start to end, because it holds their state.
    Image i of the batch uses the random numbers of `index[i]` (default i), so its experts do not
    depend on the rest of the batch.

    experts: K denoisers.
    alpha: any `(x, t) -> [B, K]`, or a `Source`, from which `policy` (a name or a `Policy`)
    chooses; or a whole `Router`, which has a policy of its own.
    calls_per_step: the sampler's; the experts stay the same within a step.
    clip: bound the result to [-1, 1], after mixing.
    control_variate: cheap approximations G_k of the experts, as `(x, t, weight [B, K]) -> sum_k
    weight_k G_k(x, t)`, such as `Gaussians.mix`. The result is `sum_chosen w_k D_k + sum_k alpha_k
    G_k - sum_chosen w_k G_k`, w being alpha renormalized
    over the chosen: the same mean over the random numbers of a policy, with less variance.
    trace: append a `Step` to `steps` at every call.

    Afterwards `calls` is the number of expert evaluations, images x experts x calls, and
    `router_calls` that of alpha, images x calls.
    """

    def __init__(
        self,
        experts: Sequence[Callable[[Tensor, Tensor], Tensor]],
        alpha: Alpha | Source | Router,
        policy: str | Policy = "balanced",
        seed: int = 0,
        *,
        index: Tensor | None = None,
        calls_per_step: int = 1,
        clip: bool = False,
        control_variate: ControlVariate | None = None,
        trace: bool = False,
    ) -> None:
        self.experts = experts
        self.router = alpha if isinstance(alpha, Router) else Router.of(alpha, policy)
        self.seed = seed
        self.index = index
        self.calls_per_step = calls_per_step
        self.clip = clip
        self.control_variate = control_variate
        self.trace = trace
        self.calls = 0
        self._router_calls: Tensor | int = 0  # a tensor, so that no step waits for a device
        self.steps: list[Step] = []
        self._denoiser_calls = 0
        self._state: RoutingState | None = None
        self._step_t: Tensor | None = None  # of the last step
        self._u = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, chosen = self._route(x, t)
        denoised = self._mix(x, t, alpha, chosen)
        if self.trace:
            self.steps.append(Step(float(t), alpha.cpu(), chosen.cpu()))
        return denoised.clamp(-1, 1) if self.clip else denoised

    @property
    def router_calls(self) -> int:
        """Evaluations of alpha so far, images x calls."""
        return int(self._router_calls)

    def _route(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        step, call_within_step = divmod(self._denoiser_calls, self.calls_per_step)
        self._denoiser_calls += 1
        index = torch.arange(len(x), device=x.device) if self.index is None else self.index
        if self._state is None:
            if self.router.pi is None:
                source = self.router.source
                pi, _ = source.step(x, t, source.start(x))
                self.router = replace(self.router, pi=pi)
            self._state = self.router.start(x, policies.first_uniforms(self.seed, index))
        if call_within_step == 0:
            last = t if self._step_t is None else self._step_t
            number = torch.tensor([step])
            times = last.reshape(-1, 1), t.reshape(-1, 1)
            self._u = self.router.policy.uniforms(self.seed, index, number, *times)[:, 0]
            self._step_t = t
        alpha, self._state = self.router.route(
            x,
            t,
            self._state,
            self._u,
            keep=call_within_step > 0,
            every_alpha=self.control_variate is not None,
        )
        self._router_calls = self._router_calls + self._state.evaluated.sum()
        return alpha, self._state.chosen

    def _mix(self, x: Tensor, t: Tensor, alpha: Tensor, chosen: Tensor) -> Tensor:
        """Call each chosen expert once, with all its images, and sum by weight."""
        weight = policies.weights(alpha, chosen)
        expert, row = chosen.T.nonzero(as_tuple=True)  # sorted by expert
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        images = x[row].split(counts)
        times = t.expand(len(x))[row.to(t.device)].split(counts)
        parts = [
            self.experts[k](images[k], times[k] if t.ndim else t)
            for k in range(len(counts))
            if counts[k]
        ]
        self.calls += len(row)
        factor = weight[row, expert].reshape(-1, *(1,) * (x.ndim - 1))
        mixed = torch.zeros_like(x).index_add_(0, row, (factor * torch.cat(parts)).to(x))
        if self.control_variate is None:
            return mixed
        return mixed + self.control_variate(x, t, alpha - weight)
