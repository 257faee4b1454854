"""The arithmetic of the engine: one routed step of many images, in a thread."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from ddm.rng import Use, uniform
from router import policies
from router.routing import Memory
from serve.engine.state import Job, Path, Row, Taken



@torch.inference_mode()
def advance(
    paths: list[Path], begun: list[tuple[Job, range]], alive: Tensor | None
) -> tuple[list[Path], list[tuple[Job, Exception]]]:
    """Move paths on by what the experts said, begin new ones, and route all: pictures that ended, or whom they wait for next.

    Also returns the jobs over which one of these stumbled, and how.
    """
    paths, moved, failed = list(paths), list[Path](), list[tuple[Job, Exception]]()
    starts: dict[int, list[tuple[Job, int]]] = {}
    for job, places in begun:
        starts.setdefault(id(job.recipe.router), []).extend((job, place) for place in places)
    for start in starts.values():
        fresh, mistaken = _begin_apart(start)
        paths, failed = paths + fresh, failed + mistaken
    for path in paths:
        try:
            _move(path)
            moved.append(path)
        except Exception as error:
            failed.append((path.job, error))
    groups: dict[tuple[int, bool], list[Path]] = {}
    for path in moved:
        if path.picture is None:
            recipe = path.job.recipe
            groups.setdefault((id(recipe.router), recipe.control is None), []).append(path)
    for group in groups.values():
        failed += _route_apart(group, alive)
    lost = {job for job, _ in failed}
    return [path for path in moved if path.job not in lost], failed


def _begin(places: list[tuple[Job, int]]) -> list[Path]:
    """Paths at t = 1, for places in jobs that one router routes."""
    recipe = places[0][0].recipe
    index = torch.stack([job.index[place] for job, place in places])
    seed = torch.tensor([job.seed for job, _ in places], device=index.device)
    # Step n draws number n + 1; number 0 is the policy's start.
    numbers = [len(job.recipe.times) for job, _ in places]
    row = torch.arange(len(places), device=index.device).repeat_interleave(torch.tensor(numbers, device=index.device))
    number = torch.cat([torch.arange(count, device=index.device) for count in numbers])
    draws = uniform(seed[row], Use.CHOICE, index[row], number)[:, 0].split(numbers)
    x = recipe.start(seed, index)
    memory = recipe.router.start(x, torch.stack([draw[0] for draw in draws]))
    return [
        Path(
            job,
            place,
            job.recipe.walk(x[i : i + 1], job.seed, index[i : i + 1]),
            draws[i][1:].tolist(),
            Row(memory, i),
            Row(memory, i),
        )
        for i, (job, place) in enumerate(places)
    ]


def _begin_apart(places: list[tuple[Job, int]]) -> tuple[list[Path], list[tuple[Job, Exception]]]:
    """`_begin`; where that fails, each job alone, for it may be one's fault. Also the jobs that fail, and how."""
    try:
        return _begin(places), []
    except Exception as error:
        jobs = {job: None for job, _ in places}
        if len(jobs) == 1:
            return [], [(places[0][0], error)]
        parts = [_begin_apart([(job, place) for job, place in places if job is one]) for one in jobs]
        return [path for paths, _ in parts for path in paths], [each for _, failed in parts for each in failed]


def _move(path: Path) -> None:
    """One call of its sampler further, if all its answers are there; at its beginning, to its first."""
    if path.x is None or path.t is None:
        path.x, path.t = next(path.walk)
    elif path.waits_for:
        assert path.alpha is not None
        assert path.chosen is not None
        clip, x = path.job.recipe.config.clip, path.x
        denoised = reduce(add, (weight * path.answers[k].to(x) for k, weight in path.waits_for.items()))
        denoised = denoised if path.rest is None else denoised + path.rest
        path.denoised = denoised.clamp(-1, 1) if clip else denoised
        path.taken = Taken(float(path.t), path.alpha, path.chosen, len(path.waits_for))
        path.asked += 1
        path.turn += 1
        try:
            path.x, path.t = path.walk.send(path.denoised)
        except StopIteration as end:
            path.picture = (end.value.clamp(-1, 1) if clip else end.value)[0].float().cpu()


def _route_apart(paths: list[Path], alive: Tensor | None) -> list[tuple[Job, Exception]]:
    """`_route`; where that fails, each path alone, for it may be one's fault. Returns the jobs of those that fail, and how."""
    try:
        _route(paths, alive)
    except Exception as error:
        if len(paths) == 1:
            return [(paths[0].job, error)]
        return [failed for path in paths for failed in _route_apart([path], alive)]
    return []


def _route(paths: list[Path], alive: Tensor | None) -> None:
    """Whom each of these paths, which one router routes, waits for now, and what the stand-ins add."""
    recipe = paths[0].job.recipe
    places = [divmod(path.asked, path.job.recipe.method.calls_per_step) for path in paths]  # step, and call within it
    x = torch.cat([path.x for path in paths if path.x is not None])
    t = torch.stack([path.t for path in paths if path.t is not None])
    memory = _gathered([path.memory for path in paths])
    draw = torch.tensor([path.draws[step] for path, (step, _) in zip(paths, places, strict=True)], dtype=torch.float64)
    held = torch.tensor([within > 0 for _, within in places])
    alive = None if alive is None else alive.to(x.device)
    alpha, after = recipe.router.route(x, t, memory, draw.to(x.device), held.to(x.device), alive)
    weight = policies.weights(alpha, after.chosen)
    rest = None if recipe.control is None else recipe.control(x, t, alpha - weight).split(1)
    chosen, weights, alphas = after.chosen.cpu(), weight.tolist(), alpha.cpu()
    for i, path in enumerate(paths):
        path.before, path.memory, path.alpha, path.chosen = path.memory, Row(after, i), alphas[i], chosen[i]
        path.waits_for = {k: weights[i][k] for k in chosen[i].nonzero()[:, 0].tolist()}
        path.answers, path.rest = {}, None if rest is None else rest[i]


def _gathered(rows: list[Row]) -> Memory:
    """The rows as one batch, in their order: a few takings from the few batches that they are in."""
    batches: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        batches.setdefault(id(row.memory), []).append(place)
    parts = [[part[[rows[i].i for i in places]] for part in rows[places[0]].memory] for places in batches.values()]
    back = torch.tensor([place for places in batches.values() for place in places]).argsort()
    return Memory(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))
