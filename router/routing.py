"""The routed mixture of K experts, itself a denoiser."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.condition import Condition, guided
from router import policies
from router.cores import Expert, side_by_side
from router.policies import Policy
from router.sources import Alpha, Source
from router.step import ControlVariate, Routed, Router, RoutingState, choose, combine


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
    calls_per_step: the sampler's; the experts stay the same within a step. The second call of a
    step is at another time than the first; one at the same time begins the next step.
    clip: bound the result to [-1, 1], after mixing.
    control_variate: cheap approximations G_k of the experts, as `(x, t, weight [B, K]) -> sum_k
    weight_k G_k(x, t)`, such as `Gaussians.mix`. The result is `sum_chosen w_k D_k + sum_k alpha_k
    G_k - sum_chosen w_k G_k`, w being alpha renormalized
    over the chosen: the same mean over the random numbers of a policy, with less variance.
    condition: of all images, and their guidance; with one the experts are `(x, t, vector [B, C]) ->
    [B, ...]`, and with autoguidance they have a `seed_model` that is called in the same way.
    trace: append a `Step` to `steps` at every call.

    Afterwards `calls` is the number of expert evaluations, images x experts x calls, where each
    guidance counts as one more, and `router_calls` that of alpha, images x calls.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        alpha: Alpha | Source | Router,
        policy: str | Policy = "balanced",
        seed: int = 0,
        *,
        index: Tensor | None = None,
        calls_per_step: int = 1,
        clip: bool = False,
        control_variate: ControlVariate | None = None,
        condition: Condition | None = None,
        trace: bool = False,
    ) -> None:
        self.experts = experts
        self.router = alpha if isinstance(alpha, Router) else Router.of(alpha, policy)
        self.seed = seed
        self.index = index
        self.calls_per_step = calls_per_step
        self.clip = clip
        self.control_variate = control_variate
        self.condition = condition
        self.trace = trace
        self.calls = 0
        self._router_calls: Tensor | int = 0  # a tensor, so that no step waits for a device
        self.steps: list[Step] = []
        self.steps_begun = 0
        self._calls_in_step = 0
        self._state: RoutingState | None = None
        self._step_t: Tensor | None = None  # of the last step
        self._u = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        routed, chosen = self._route(x, t)
        chosen = chosen.cpu()  # for the sizes of the calls: all that a step waits for
        expert, row = chosen.T.nonzero(as_tuple=True)  # sorted by expert
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        expert, row = expert.to(x.device), row.to(x.device)
        answers = self._call(x, t, counts, row)
        if self.trace:
            self.steps.append(Step(float(t), routed.alpha.cpu(), chosen))
        return combine(routed, x, row, expert, answers, self.clip)

    @property
    def router_calls(self) -> int:
        """Evaluations of alpha so far, images x calls."""
        return int(self._router_calls)

    def _route(self, x: Tensor, t: Tensor) -> tuple[Routed, Tensor]:
        index = torch.arange(len(x), device=x.device) if self.index is None else self.index
        if self._state is None:
            if self.router.pi is None:
                source = self.router.source
                pi, _ = source.step(x, t, source.start(x))
                self.router = replace(self.router, pi=pi)
            self._state = self.router.start(x, policies.first_uniforms(self.seed, index))
        begins = self._begins_step(t)
        if begins:
            last = t if self._step_t is None else self._step_t
            number = torch.tensor([self.steps_begun])
            times = last.reshape(-1, 1), t.reshape(-1, 1)
            self._u = self.router.uniforms(self.seed, index, number, *times)[:, 0]
            self._step_t = t
            self.steps_begun += 1
            self._calls_in_step = 0
        self._calls_in_step += 1
        routed, self._state = choose(
            self.router, self.control_variate, x, t, self._state, self._u, keep=not begins
        )
        self._router_calls = self._router_calls + self._state.evaluated.sum()
        return routed, self._state.chosen

    def _begins_step(self, t: Tensor) -> bool:
        """Whether this call is the first of a step.

        A step to t = 0 has one call with every sampler, so the next call may come early: at the same
        time again, where the step is repeated (`ddm.editing`). The second call of a step is at
        another time.
        """
        if self._step_t is None or self._calls_in_step == self.calls_per_step:
            return True
        return bool((t == self._step_t).all())

    def _call(self, x: Tensor, t: Tensor, counts: list[int], row: Tensor) -> Tensor:
        """The experts' answers `[M, ...]` for the images `row` `[M]`, the first `counts[0]` of which
        are the first expert's, and so on.
        """
        images = x[row].split(counts)
        times = t[row.to(t.device)] if t.ndim else t
        each = times.split(counts) if t.ndim else [t] * len(counts)
        given = None if self.condition is None else self.condition.at(times, len(row))
        self.calls += len(row) if given is None else int(given.evaluations.sum())
        calls = zip(self.experts, images, each, strict=True)
        return side_by_side(self._answer, [call for call in calls if len(call[1])])

    def _answer(self, expert: Expert, x: Tensor, t: Tensor) -> Tensor:
        if self.condition is None:
            return expert(x, t)
        guide = getattr(expert, "seed_model", None)
        return guided(expert, x, t, self.condition.at(t, len(x)), guide)
