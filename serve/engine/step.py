"""The arithmetic of the engine: one routed step of many images, in a thread."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from ddm.rng import RngStream, uniform
from router import policies
from router.routing import Memory
from serve.engine.state import ImageState, Request, Row, StepRecord


@torch.inference_mode()
def advance(
    states: list[ImageState], begun: list[tuple[Request, range]], alive: Tensor | None
) -> tuple[list[ImageState], list[tuple[Request, Exception]]]:
    """Move paths on by what the experts said, begin new ones, and route all: images that ended, or whom they wait for next.

    Also returns the jobs over which one of these stumbled, and how.
    """
    states, moved, failed = list(states), list[ImageState](), list[tuple[Request, Exception]]()
    starts: dict[int, list[tuple[Request, int]]] = {}
    for request, places in begun:
        starts.setdefault(id(request.plan.router), []).extend((request, place) for place in places)
    for start in starts.values():
        fresh, mistaken = _begin_apart(start)
        states, failed = states + fresh, failed + mistaken
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
            groups.setdefault((id(plan.router), plan.control_variate is None), []).append(state)
    for group in groups.values():
        failed += _route_apart(group, alive)
    lost = {request for request, _ in failed}
    return [state for state in moved if state.request not in lost], failed


def _begin(places: list[tuple[Request, int]]) -> list[ImageState]:
    """Paths at t = 1, for places in jobs that one router routes."""
    plan = places[0][0].plan
    index = torch.stack([request.index[place] for request, place in places])
    seed = torch.tensor([request.seed for request, _ in places], device=index.device)
    # Step n draws number n + 1; number 0 is the policy's start.
    numbers = [len(request.plan.times) for request, _ in places]
    row = torch.arange(len(places), device=index.device).repeat_interleave(
        torch.tensor(numbers, device=index.device)
    )
    number = torch.cat([torch.arange(count, device=index.device) for count in numbers])
    draws = uniform(seed[row], RngStream.CHOICE, index[row], number)[:, 0].split(numbers)
    x = plan.start(seed, index)
    memory = plan.router.start(x, torch.stack([draw[0] for draw in draws]))
    return [
        ImageState(
            request,
            place,
            request.plan.trajectory(x[i : i + 1], request.seed, index[i : i + 1]),
            draws[i][1:].tolist(),
            Row(memory, i),
            Row(memory, i),
        )
        for i, (request, place) in enumerate(places)
    ]


def _begin_apart(
    places: list[tuple[Request, int]],
) -> tuple[list[ImageState], list[tuple[Request, Exception]]]:
    """`_begin`; where that fails, each job alone, for it may be one's fault. Also the jobs that fail, and how."""
    try:
        return _begin(places), []
    except Exception as error:
        requests = {request: None for request, _ in places}
        if len(requests) == 1:
            return [], [(places[0][0], error)]
        parts = [
            _begin_apart([(request, place) for request, place in places if request is one])
            for one in requests
        ]
        return [state for states, _ in parts for state in states], [
            each for _, failed in parts for each in failed
        ]


def _move(state: ImageState) -> None:
    """One call of its sampler further, if all its answers are there; at its beginning, to its first."""
    if state.x is None or state.t is None:
        state.x, state.t = next(state.trajectory)
    elif state.waits_for:
        assert state.alpha is not None
        assert state.chosen is not None
        clip, x = state.request.plan.config.clip, state.x
        denoised = reduce(
            add, (weight * state.answers[k].to(x) for k, weight in state.waits_for.items())
        )
        denoised = denoised if state.rest is None else denoised + state.rest
        state.denoised = denoised.clamp(-1, 1) if clip else denoised
        state.record = StepRecord(float(state.t), state.alpha, state.chosen, len(state.waits_for))
        state.asked += 1
        state.turn += 1
        try:
            state.x, state.t = state.trajectory.send(state.denoised)
        except StopIteration as end:
            state.image = (end.value.clamp(-1, 1) if clip else end.value)[0].float().cpu()


def _route_apart(states: list[ImageState], alive: Tensor | None) -> list[tuple[Request, Exception]]:
    """`_route`; where that fails, each path alone, for it may be one's fault. Returns the jobs of those that fail, and how."""
    try:
        _route(states, alive)
    except Exception as error:
        if len(states) == 1:
            return [(states[0].request, error)]
        return [failed for state in states for failed in _route_apart([state], alive)]
    return []


def _route(states: list[ImageState], alive: Tensor | None) -> None:
    """Whom each of these paths, which one router routes, waits for now, and what the stand-ins add."""
    plan = states[0].request.plan
    places = [
        divmod(state.asked, state.request.plan.method.calls_per_step) for state in states
    ]  # step, and call within it
    x = torch.cat([state.x for state in states if state.x is not None])
    t = torch.stack([state.t for state in states if state.t is not None])
    memory = _gathered([state.memory for state in states])
    draw = torch.tensor(
        [state.draws[step] for state, (step, _) in zip(states, places, strict=True)],
        dtype=torch.float64,
    )
    held = torch.tensor([within > 0 for _, within in places])
    alive = None if alive is None else alive.to(x.device)
    alpha, after = plan.router.route(x, t, memory, draw.to(x.device), held.to(x.device), alive)
    weight = policies.weights(alpha, after.chosen)
    rest = (
        None
        if plan.control_variate is None
        else plan.control_variate(x, t, alpha - weight).split(1)
    )
    chosen, weights, alphas = after.chosen.cpu(), weight.tolist(), alpha.cpu()
    for i, state in enumerate(states):
        state.before, state.memory, state.alpha, state.chosen = (
            state.memory,
            Row(after, i),
            alphas[i],
            chosen[i],
        )
        state.waits_for = {k: weights[i][k] for k in chosen[i].nonzero()[:, 0].tolist()}
        state.answers, state.rest = {}, None if rest is None else rest[i]


def _gathered(rows: list[Row]) -> Memory:
    """The rows as one batch, in their order: a few takings from the few batches that they are in."""
    batches: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        batches.setdefault(id(row.memory), []).append(place)
    parts = [
        [part[[rows[i].i for i in places]] for part in rows[places[0]].memory]
        for places in batches.values()
    ]
    back = torch.tensor([place for places in batches.values() for place in places]).argsort()
    return Memory(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))
