"""The arithmetic of the engine: one denoiser call of many images, stacked."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ddm.editing import keep, restore
from ddm.samplers import Step
from router import policies
from router.step import Routed, choose, combine
from serve.engine.stacking import Row, stacked
from serve.engine.state import Call, ImageState, Path, Request, StepRecord
from serve.model.planning import SamplingPlan

Work = Callable[[list[ImageState]], None]


@torch.inference_mode()
def advance(
    states: list[ImageState], alive: Tensor | None
) -> tuple[list[ImageState], dict[Request, Exception]]:
    """Take images one denoiser call further, begin new ones, and route all that are not finished.

    alive: bool `[K]`, the experts to choose from, None for all.
    Returns the images that are finished or wait for experts, and the requests that failed, with
    their errors.
    """
    fresh = [state for state in states if not state.begun]
    answered = [state for state in states if state.experts]
    failed = _grouped(fresh, _kind, _begin)
    failed |= _grouped(answered, _position, _move)
    states = [state for state in states if state.request not in failed]
    unfinished = [state for state in states if state.image is None]
    failed |= _grouped(unfinished, _router, lambda group: _route(group, alive))
    return [state for state in states if state.request not in failed], failed


def _grouped(
    states: list[ImageState], key: Callable[[ImageState], Hashable], work: Work
) -> dict[Request, Exception]:
    """Do the work for the images of each key together; if that fails, for each of their requests
    alone, since one may be at fault.

    Returns the requests that failed, with their errors.
    """
    groups: dict[Hashable, list[ImageState]] = {}
    for state in states:
        groups.setdefault(key(state), []).append(state)
    failed: dict[Request, Exception] = {}
    for group in groups.values():
        try:
            work(group)
        except Exception as error:
            if all(state.request is group[0].request for state in group):
                failed[group[0].request] = error
            else:
                failed |= _grouped(group, lambda state: state.request, work)
    return failed


def _kind(state: ImageState) -> Hashable:
    """Images of the same one begin together: one plan, and from an image, with a mask or not."""
    given = state.request.given
    return id(state.request.plan), given is None, given is None or given.mask is None


def _position(state: ImageState) -> Hashable:
    """Images of the same one take a step together."""
    return _kind(state), state.step, len(state.path.stack.denoised)


def _router(state: ImageState) -> Hashable:
    """Images of the same one are routed together."""
    plan = state.request.plan
    return id(plan.router), plan.control_variate is None


def _begin(states: list[ImageState]) -> None:
    """Begin images of one kind, at the first time of their plan."""
    plan = states[0].request.plan
    index = stacked([Row(state.request.index, state.place) for state in states])
    seed = torch.tensor([state.request.seed for state in states], device=index.device)
    given = None
    if states[0].request.given is not None:
        given = stacked([Row(state.request.given, state.place) for state in states])
    x = plan.start(seed, index, given)
    memory = plan.router.start(x, policies.first_uniforms(seed, index))
    times = torch.stack(list(plan.times))
    before = torch.cat([times[:1], times[:-1]])
    uniforms = plan.router.uniforms(seed, index, torch.arange(len(times)), before, times)
    kept = None if given is None or given.mask is None else given
    path = Path(seed, index, uniforms, (x,), (), kept)
    call = _call(plan, path, 0, next(_step(plan, path, 0)))
    for i, state in enumerate(states):
        state.path, state.call, state.memory = Row(path, i), Row(call, i), Row(memory, i)
        state.begun = True


def _move(states: list[ImageState]) -> None:
    """Send the sampler the denoised images, for images at the same call of the same step."""
    plan, n = states[0].request.plan, states[0].step
    path = stacked([state.path for state in states])
    call = stacked([state.call for state in states])
    routed = stacked([state.routed for state in states])
    evaluated = sorted((k, row) for row, state in enumerate(states) for k in state.experts)
    answers = stacked([states[row].answers[k] for k, row in evaluated])
    expert, row = torch.tensor(evaluated, device=call.x.device).T
    denoised = combine(routed, call.x, row, expert, answers, plan.config.clip)
    if path.given is not None:
        denoised = keep(path.given, denoised)
    step = _step(plan, path, n)
    next(step)
    for earlier in path.denoised:
        step.send(earlier)
    images: Sequence[Tensor] | None = None
    try:
        x, t = step.send(denoised)
        path = path._replace(denoised=(*path.denoised, denoised))
    except StopIteration as end:
        n += 1
        path = path._replace(carry=end.value, denoised=())
        if n == len(plan.times) - 1:
            x = path.carry[0] if path.given is None else restore(path.given, path.carry[0])
            images = _finished(x, plan.config.clip)
        else:
            x, t = next(_step(plan, path, n))
    after = call if images is not None else _call(plan, path, n, (x, t))
    evaluations = [1] * len(states) if call.given is None else call.given.evaluations.tolist()
    if any(state.request.trace or state.request.on_step is not None for state in states):
        _record(states, call, routed, denoised, evaluations)
    for i, state in enumerate(states):
        state.request.nfe += len(state.experts) * evaluations[i]
        state.step, state.path, state.call = n, Row(path, i), Row(after, i)
        state.experts, state.answers = [], {}
        state.attempt += 1
        state.image = None if images is None else images[i]


def _step(plan: SamplingPlan, path: Path, n: int) -> Step:
    """The sampler's step n."""
    return plan.method.step(plan.course(path.seed, path.image), n, *path.carry)


def _call(plan: SamplingPlan, path: Path, n: int, asked: tuple[Tensor, Tensor]) -> Call:
    """The call that the sampler has asked for in step n."""
    x, t = asked
    begun = torch.full((len(x),), bool(path.denoised), device=x.device)
    given = None if plan.condition is None else plan.condition.at(t, len(x))
    return Call(x, t.expand(len(x)), path.uniforms[:, n], begun, given)


def _finished(x: Tensor, clip: bool) -> Sequence[Tensor]:
    """The images at the end of their trajectories, on the CPU."""
    images = (x.clamp(-1, 1) if clip else x).float().cpu()
    if not images.isfinite().all():
        raise ValueError(
            "it is not finite: the weights are damaged, or do not work with these settings"
        )
    return images.unbind()


def _record(
    states: list[ImageState],
    call: Call,
    routed: Routed,
    denoised: Tensor,
    evaluations: Sequence[int],
) -> None:
    """Note a call of one time, for who asks to hear of it; evaluations: of a network for each image
    and expert.
    """
    t, alpha = float(call.t[0]), routed.alpha.cpu()
    chosen = torch.zeros_like(alpha, dtype=torch.bool)
    rows = [row for row, state in enumerate(states) for _ in state.experts]
    chosen[rows, [k for state in states for k in state.experts]] = True
    parts = zip(alpha.unbind(), chosen.unbind(), denoised.unbind(), evaluations, strict=True)
    for state, (alpha_row, chosen_row, image, each) in zip(states, parts, strict=True):
        nfe = len(state.experts) * each
        state.record = StepRecord(state.step + 1, t, alpha_row, chosen_row, nfe)
        state.denoised = image


def _route(states: list[ImageState], alive: Tensor | None) -> None:
    """Choose experts for images that share a router."""
    plan = states[0].request.plan
    call = stacked([state.call for state in states])
    before = stacked([state.memory for state in states])
    alive = None if alive is None else alive.to(call.x.device)
    routed, memory = choose(
        plan.router, plan.control_variate, call.x, call.t, before, call.u, call.keep, alive
    )
    # One transfer of both.
    *chosen, evaluated = torch.cat([memory.chosen, memory.evaluated[:, None]], dim=1).T.tolist()
    for i, state in enumerate(states):
        state.previous_memory, state.memory = Row(before, i), Row(memory, i)
        state.routed = Row(routed, i)
        state.experts = [k for k, of in enumerate(chosen) if of[i]]
        state.request.router_nfe += evaluated[i]
