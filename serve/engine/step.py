"""The arithmetic of the engine: one routed step of many images."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from router import policies
from router.routing import RoutingState
from serve.engine.state import ImageState, Request, Row, StepRecord


@torch.inference_mode()
def advance(
    states: list[ImageState], begun: list[tuple[Request, range]], alive: Tensor | None
) -> tuple[list[ImageState], list[tuple[Request, Exception]]]:
    """Take images one denoiser call further, begin new ones, and route all that are not finished.

    begun: places in their requests. alive: bool `[K]`, the experts to choose from, None for all.
    Returns the images that are finished or wait for experts, and the requests that failed, with
    their errors.
    """
    states = list(states)
    moved: list[ImageState] = []
    failed: list[tuple[Request, Exception]] = []
    arrivals = [(request, place) for request, places in begun for place in places]
    starts: dict[int, list[tuple[Request, int]]] = {}
    for request, place in arrivals:
        starts.setdefault(id(request.plan), []).append((request, place))
    fresh: dict[tuple[Request, int], ImageState] = {}
    for start in starts.values():
        begun_states, errors = _begin_or_isolate(start)
        fresh |= {(state.request, state.place): state for state in begun_states}
        failed += errors
    states += [fresh[arrival] for arrival in arrivals if arrival in fresh]
    for state in states:
        try:
            _move(state)
            moved.append(state)
        except Exception as error:
            failed.append((state.request, error))
    groups: dict[tuple[int, bool], list[ImageState]] = {}
    for state in moved:
        if state.image is None:
            plan = state.request.plan
            key = (id(plan.router), plan.control_variate is None)
            groups.setdefault(key, []).append(state)
    for group in groups.values():
        failed += _route_or_isolate(group, alive)
    lost = {request for request, _ in failed}
    return [state for state in moved if state.request not in lost], failed


def _begin(places: list[tuple[Request, int]]) -> list[ImageState]:
    """Images at t = 1, for places in requests that share a plan."""
    plan = places[0][0].plan
    index = torch.stack([request.index[place] for request, place in places])
    seed = torch.tensor([request.seed for request, _ in places], device=index.device)
    x = plan.start(seed, index)
    memory = plan.router.start(x, policies.first_uniforms(seed, index))
    times = torch.stack(list(plan.times))
    before = torch.cat([times[:1], times[:-1]])
    uniforms = plan.router.policy.uniforms(seed, index, torch.arange(len(times)), before, times)
    return [
        ImageState(
            request,
            place,
            plan.trajectory(x[i : i + 1], request.seed, index[i : i + 1]),
            uniforms[i].tolist(),
            Row(memory, i),
            Row(memory, i),
        )
        for i, (request, place) in enumerate(places)
    ]


def _begin_or_isolate(
    places: list[tuple[Request, int]],
) -> tuple[list[ImageState], list[tuple[Request, Exception]]]:
    """`_begin`; if that fails, each request alone, since one may be at fault.

    Also returns the requests that failed, with their errors.
    """
    try:
        return _begin(places), []
    except Exception as error:
        requests = {request: None for request, _ in places}
        if len(requests) == 1:
            return [], [(places[0][0], error)]
    states: list[ImageState] = []
    failed: list[tuple[Request, Exception]] = []
    for one in requests:
        alone = [(request, place) for request, place in places if request is one]
        begun, errors = _begin_or_isolate(alone)
        states += begun
        failed += errors
    return states, failed


def _move(state: ImageState) -> None:
    """Give the sampler the denoised image, if all answers are there; start a new sampler."""
    if state.x is None or state.t is None:
        state.x, state.t = next(state.trajectory)
    elif state.expert_weights:
        assert state.alpha is not None
        assert state.chosen is not None
        clip, x = state.request.plan.config.clip, state.x
        denoised = reduce(
            add, (weight * state.answers[k].to(x) for k, weight in state.expert_weights.items())
        )
        denoised = denoised if state.control_term is None else denoised + state.control_term
        state.denoised = denoised.clamp(-1, 1) if clip else denoised
        nfe = len(state.expert_weights)
        state.record = StepRecord(float(state.t), state.alpha, state.chosen, nfe)
        state.calls += 1
        state.attempt += 1
        try:
            state.x, state.t = state.trajectory.send(state.denoised)
        except StopIteration as end:
            image = (end.value.clamp(-1, 1) if clip else end.value)[0].float().cpu()
            if not image.isfinite().all():
                raise ValueError(
                    "it is not finite: the weights are damaged, or do not work with these settings"
                ) from None
            state.image = image


def _route_or_isolate(
    states: list[ImageState], alive: Tensor | None
) -> list[tuple[Request, Exception]]:
    """`_route`; if that fails, each image alone, since one may be at fault.

    Returns the requests that failed, with their errors.
    """
    try:
        _route(states, alive)
    except Exception as error:
        if len(states) == 1:
            return [(states[0].request, error)]
        return [failed for state in states for failed in _route_or_isolate([state], alive)]
    return []


def _route(states: list[ImageState], alive: Tensor | None) -> None:
    """Choose experts for images that share a router, and compute the control variate's term."""
    plan = states[0].request.plan
    # Step, and call within the step.
    positions = [divmod(state.calls, state.request.plan.method.calls_per_step) for state in states]
    x = torch.cat([state.x for state in states if state.x is not None])
    t = torch.stack([state.t for state in states if state.t is not None])
    memory = _gather([state.memory for state in states])
    uniforms = torch.tensor(
        [state.uniforms[step] for state, (step, _) in zip(states, positions, strict=True)],
        dtype=torch.float64,
    )
    held = torch.tensor([within > 0 for _, within in positions])
    alive = None if alive is None else alive.to(x.device)
    every_alpha = plan.control_variate is not None
    alpha, after = plan.router.route(
        x, t, memory, uniforms.to(x.device), held.to(x.device), alive, every_alpha
    )
    weight = policies.weights(alpha, after.chosen)
    control_terms = (
        None
        if plan.control_variate is None
        else plan.control_variate(x, t, alpha - weight).split(1)
    )
    chosen, weights, alphas = after.chosen.cpu(), weight.tolist(), alpha.cpu()
    evaluated = after.evaluated.tolist()
    for i, state in enumerate(states):
        state.previous_memory, state.memory = state.memory, Row(after, i)
        state.alpha, state.chosen = alphas[i], chosen[i]
        state.request.router_nfe += evaluated[i]
        experts = chosen[i].nonzero()[:, 0].tolist()
        state.expert_weights = {k: weights[i][k] for k in experts}
        state.answers = {}
        state.control_term = None if control_terms is None else control_terms[i]


def _gather(rows: list[Row]) -> RoutingState:
    """The rows as one batch, in their order; one gather from each batch that holds some."""
    batches: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        batches.setdefault(id(row.memory), []).append(place)
    parts = [
        [part[[rows[i].i for i in places]] for part in rows[places[0]].memory]
        for places in batches.values()
    ]
    back = torch.tensor([place for places in batches.values() for place in places]).argsort()
    return RoutingState(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))
