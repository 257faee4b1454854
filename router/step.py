"""The routed step: choose experts for a batch of images, and combine their answers.

Everything here is a pure function of its batch. `RoutedDenoiser` drives it for a batch from start to
end, the engine that serves for whatever images are ready.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.seed_model import is_above
from router import policies
from router.policies import Policy
from router.sources import Alpha, Source, Stateless

# (x [B, ...], t [] or [B], weight [B, K]) -> sum_k weight_k G_k(x, t) [B, ...]
ControlVariate = Callable[[Tensor, Tensor, Tensor], Tensor]


class RoutingState(NamedTuple):
    """The state of B trajectories, one row each.

    source: of the source of alpha, `[B, M]`. policy: of the policy, `[B, ...]`. chosen: the experts
    of the last call, bool `[B, K]`. alpha: as last evaluated, `[B, K]`. evaluated: whether that was
    in the last call, bool `[B]`. first_u: the uniform number that draws the first expert, `[B]`.
    seeded: whether the seed model was called last, bool `[B]`.
    """

    source: Tensor
    policy: Tensor
    chosen: Tensor
    alpha: Tensor
    evaluated: Tensor
    first_u: Tensor
    seeded: Tensor


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
    above: at times above it every expert is the seed model (`ddm.seed_model`); 1 for none. There an
    image has one expert under every policy, the first, in whose place the seed model is called; alpha
    is needed by a source that integrates it alone. The first call at most there draws the first
    expert again, from alpha, also within a step.
    """

    source: Source
    policy: Policy
    pi: Tensor | None = None
    weights: Tensor | None = None
    temperature: float = 1.0
    above: float = 1.0

    @staticmethod
    def of(
        alpha: Alpha | Source, policy: str | Policy = "balanced", pi: Tensor | None = None
    ) -> "Router":
        """The router of any `(x, t) -> alpha [B, K]` and a policy or its name."""
        source = alpha if isinstance(alpha, Source) else Stateless(alpha)
        return Router(source, policies.policy(policy) if isinstance(policy, str) else policy, pi)

    def start(self, x: Tensor, u: Tensor) -> RoutingState:
        """The state of trajectories that start at x `[B, ...]`; u: `first_uniforms`, `[B]`."""
        pi, chosen = self._first(x, u)
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return RoutingState(
            source=self.source.start(x),
            policy=self.policy.start(pi, u),
            chosen=chosen,
            alpha=pi,
            evaluated=none,
            first_u=u,
            seeded=none,
        )

    def _first(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """pi and the experts that it gives B images of pure noise, `[B, K]` each."""
        assert self.pi is not None
        pi = _reweighted(self.pi.to(x), self.weights).expand(len(x), -1)
        return pi, policies.sample_categorical(pi, u)

    def uniforms(
        self, seed: int | Tensor, index: Tensor, step: Tensor, t_last: Tensor, t: Tensor
    ) -> Tensor:
        """The policy's `uniforms`; a policy that keeps its experts draws as well where a step below
        t = 1 begins at the time of the one before: see `_draws_anew`.
        """
        u = self.policy.uniforms(seed, index, step, t_last, t)
        anew = _draws_anew(t_last, t)
        if not self.policy.keeps or not anew.any():
            return u
        drawn = policies.step_uniforms(seed, index, step)
        return torch.where(u.isnan() & anew.to(u.device), drawn, u)

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
        seeded, last = state.seeded, state.chosen
        if self.above < 1:
            seeded = is_above(t, self.above).to(u.device).expand(len(x))
            below = state.seeded & ~seeded
            u = torch.where(below, state.first_u, u)
            kept = (kept & ~below) | seeded
            last = torch.where(seeded[:, None], self._first(x, state.first_u)[1], last)
        keeps = self.policy.keeps and not every_alpha
        # A source that integrates along the trajectory needs every step.
        if isinstance(self.source, Stateless) and (keeps or self.above < 1):
            evaluated = ~kept if keeps else ~seeded
            if keeps and eligible is not None:
                evaluated |= ~(state.chosen & eligible).any(dim=1)
            alpha, source_state = self._alpha_of(evaluated, x, t, state), state.source
        else:
            evaluated = torch.ones_like(kept)
            alpha, source_state = self.source.step(x, t, state.source)
            alpha = self._tempered(alpha)
        after = state._replace(source=source_state, alpha=alpha, evaluated=evaluated, seeded=seeded)
        if available is not None:
            alpha = _reweighted(alpha, available.to(alpha))
        before = state.policy
        if not self.policy.keeps:
            # The first alpha of an image that has not come from pure noise: the choice starts there.
            first = ~seeded & (state.seeded | ~state.evaluated) & (t < 1).to(u.device)
            before = torch.where(first[:, None], self.policy.start(alpha, state.first_u), before)
        drawn, policy_state = self.policy.choose(alpha, before, u)
        chosen = torch.where(kept[:, None], last, drawn)
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


def _draws_anew(t_last: Tensor, t: Tensor) -> Tensor:
    """Where a trajectory starts below t = 1, from a given image, or noise was added back to it.

    x then is not what an expert drawn from pi would have made of noise: given x, the expert's law
    is alpha(x, t).
    """
    return (t_last == t) & (t < 1)


def _reweighted(p: Tensor, weights: Tensor | None) -> Tensor:
    """p `[..., K]` times the weights `[K]`, normalized; the weights alone, normalized, where the
    product is 0 for all k.
    """
    if weights is None:
        return p
    mass = p * weights
    total = mass.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, mass / total, weights / weights.sum()).to(p)


class Routed(NamedTuple):
    """B images with their experts.

    alpha: `[B, K]`, over the available experts. weight: alpha over the chosen ones, 0 elsewhere,
    `[B, K]`. control: the control variate's term, `[B, ...]`, or None.
    """

    alpha: Tensor
    weight: Tensor
    control: Tensor | None


def choose(
    router: Router,
    control_variate: ControlVariate | None,
    x: Tensor,
    t: Tensor,
    state: RoutingState,
    u: Tensor,
    keep: bool | Tensor = False,
    available: Tensor | None = None,
) -> tuple[Routed, RoutingState]:
    """Choose experts at x `[B, ...]`, t `[]` or `[B]`; the new state has the choice.

    control_variate: see `RoutedDenoiser`. The others are those of `Router.route`.
    """
    alpha, state = router.route(
        x, t, state, u, keep, available, every_alpha=control_variate is not None
    )
    weight = policies.weights(alpha, state.chosen)
    control = None
    if control_variate is not None:
        # The seed model is the mixture already.
        missing = (alpha - weight).masked_fill(state.seeded[:, None], 0)
        control = control_variate(x, t, missing)
    return Routed(alpha, weight, control), state


def combine(
    routed: Routed, x: Tensor, row: Tensor, expert: Tensor, answers: Tensor, clip: bool
) -> Tensor:
    """The denoised images `[B, ...]` of x `[B, ...]`: the experts' answers by weight, and the
    control variate's term.

    answers: `[M, ...]`, M >= B, of the experts `expert` `[M]` for the images `row` `[M]`. clip:
    bound the result to [-1, 1].
    """
    factor = routed.weight[row, expert].reshape(-1, *(1,) * (x.ndim - 1))
    denoised = torch.zeros_like(x).index_add_(0, row, (factor * answers).to(x))
    if routed.control is not None:
        denoised = denoised + routed.control
    return denoised.clamp(-1, 1) if clip else denoised
