"""No request is held up by larger ones: the order of images, counted in calls."""

import asyncio
import itertools

import pytest
import torch

from serve.engine.admission import Admission
from serve.engine.fair_queue import FairQueue
from serve.engine.state import ImageState, Request
from serve.model.model import Model
from tests.serve.engine.harness import fakes, images, only, request_for, run, running, same, until


def unplanned(n: int = 1) -> Request:
    """A request for n images, for tests of order alone."""
    return Request(None, 0, torch.arange(n), done=None)  # type: ignore[arg-type]


def image(request: Request, place: int = 0) -> ImageState:
    return ImageState(request, place)


def begun(admission: Admission) -> list[list[int]]:
    return [list(places) for _, places in admission.begin()]


def finish(admission: Admission, request: Request) -> None:
    request.images[len(request.images)] = torch.zeros(0)
    admission.image_ended()


# Queues


def test_requests_take_turns_of_one_image() -> None:
    queue, requests = FairQueue(), [unplanned(), unplanned(), unplanned()]
    for request, n in zip(requests, (4, 1, 2), strict=True):
        for place in range(n):
            queue.push(image(request, place))
    assert len(queue) == len(list(queue)) == 7
    taken = [(requests.index((state := queue.pop()).request), state.place) for _ in range(7)]
    assert taken == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2), (0, 3)]
    assert not queue


def test_a_new_request_waits_for_one_image_of_each_other() -> None:
    queue, large, small = FairQueue(), [unplanned() for _ in range(6)], unplanned()
    for request in large:
        for place in range(64):
            queue.push(image(request, place))
    for _ in range(9):
        queue.pop()
    queue.push(image(small))
    waited = 0
    while queue.pop().request is not small:
        waited += 1
    assert waited == 6


def test_images_put_back_are_the_next_in_their_order() -> None:
    queue, one, other = FairQueue(), unplanned(), unplanned()
    for place in range(3):
        queue.push(image(one, place))
        queue.push(image(other, place))
    taken = [queue.pop() for _ in range(3)]
    queue.push_first(taken)
    again = [queue.pop() for _ in range(6)]
    assert again[0] is taken[0]
    assert len(queue) == 0 and len(set(again)) == 6
    for request in (one, other):
        assert [state.place for state in again if state.request is request] == [0, 1, 2]


def test_removed_images_are_gone_and_the_others_keep_their_order() -> None:
    queue, one, other = FairQueue(), unplanned(), unplanned()
    for place in range(4):
        queue.push(image(one, place))
        queue.push(image(other, place))
    queue.remove(lambda state: state.request is one or state.place == 1)
    assert len(queue) == 3 and queue.peek().place == 0
    assert [queue.pop().place for _ in range(3)] == [0, 2, 3]


# Admission


def test_room_is_shared_between_requests_that_came_together() -> None:
    admission, requests = Admission(7), [unplanned(64), unplanned(2), unplanned(64)]
    for request in requests:
        admission.add(request)
    assert begun(admission) == [[0, 1, 2], [0, 1], [0, 1]]
    assert begun(admission) == []
    finish(admission, requests[2])
    assert begun(admission) == [[2]]  # to the request with the fewest
    finish(admission, requests[0])
    assert begun(admission) == [[3]]  # to the earlier one among equals
    assert admission.active == 7


def test_a_late_request_has_its_share_at_once_though_there_is_no_room() -> None:
    admission, large, late = Admission(8), unplanned(64), unplanned(64)
    admission.add(large)
    assert begun(admission) == [list(range(8))]
    admission.add(late)
    assert begun(admission) == [list(range(4))]
    for _ in range(4):
        finish(admission, large)
        assert begun(admission) == []  # until no more than max_active are under way
    finish(admission, large)
    assert begun(admission) == [[8]]


def test_every_request_has_an_image_under_way_however_many_there_are() -> None:
    admission, requests = Admission(4), [unplanned(3) for _ in range(10)]
    for request in requests:
        admission.add(request)
    admission.begin()
    assert [request.active for request in requests] == [1] * 10
    assert admission.active == 10


def test_images_under_way_are_bounded_however_requests_arrive() -> None:
    admission, requests = Admission(64), [unplanned(64) for _ in range(32)]
    for request in requests:
        admission.add(request)
        admission.begin()
    harmonic = sum(64 // count for count in range(1, 33))
    assert admission.active == sum(request.active for request in requests) == harmonic


def test_a_request_that_leaves_frees_its_room() -> None:
    admission, leaves, stays = Admission(4), unplanned(4), unplanned(9)
    admission.add(leaves)
    admission.begin()
    finish(admission, leaves)
    admission.add(stays)
    assert begun(admission) == [[0, 1]]
    admission.remove(leaves)
    assert begun(admission) == [[2, 3]]
    admission.remove(stays)
    assert admission.active == 0


# The engine


def test_a_small_request_behind_large_ones_takes_one_call_per_step(model: Model) -> None:
    """A call takes 4 images; of 7 requests, each gets its turn within two calls."""

    async def work() -> None:
        turn = asyncio.Semaphore(1)
        experts = fakes(model, turn=turn)
        expert = experts[0]
        async with running(experts, turn=turn, max_batch=4, max_active=16) as engine:
            large = [request_for(model, 12, seed=s, **only(model, 0, steps=90)) for s in range(6)]
            tasks = [asyncio.create_task(engine.run(request)) for request in large]
            await until(lambda: len(expert.batches) > 20)
            small = request_for(model, 1, seed=7, **only(model, 0, steps=3))
            calls = len(expert.batches)
            await engine.run(small)
            calls = len(expert.batches) - calls
            same(images(small), model.sample(1, seed=7, **only(model, 0, steps=3)))
            assert not any(request.done.done() for request in large)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        # One call under way, then at most two for each step, and one for each routing between.
        assert calls <= 1 + 3 * 3

    run(work)


def test_large_requests_lose_no_image_to_small_ones(model: Model) -> None:
    async def work() -> None:
        async with running(fakes(model), max_batch=4, max_active=6) as engine:
            large = [request_for(model, 7, seed=s, **only(model, 0, steps=9)) for s in range(2)]
            tasks = [asyncio.create_task(engine.run(request)) for request in large]
            for seed in range(10, 20):
                small = request_for(model, 1, seed=seed, **only(model, 0, steps=2))
                await engine.run(small)
            await asyncio.gather(*tasks)
            for request in large:
                settings = only(model, 0, steps=9)
                same(images(request), model.sample(7, seed=request.seed, **settings))

    run(work)


@pytest.mark.parametrize(("max_batch", "bound"), [(2, 22), (8, 7)])
def test_calls_between_two_steps_of_a_request_are_bounded(
    model: Model, max_batch: int, bound: int
) -> None:
    """Of 40 requests of one image each, max_batch have their turn in a call; two for routing."""

    async def work() -> None:
        turn = asyncio.Semaphore(1)
        experts = fakes(model, turn=turn)
        seen: dict[int, list[int]] = {seed: [] for seed in range(40)}
        async with (
            running(experts, turn=turn, max_batch=max_batch, max_active=12) as engine,
            asyncio.TaskGroup() as group,
        ):
            for seed, steps in seen.items():

                def note(*_: object, steps: list[int] = steps) -> None:
                    steps.append(len(experts[0].batches))

                settings = only(model, 0, steps=4 + 3 * (seed % 5))
                request = request_for(model, 1, seed=seed, on_step=note, **settings)
                group.create_task(engine.run(request))
        for seed, steps in seen.items():
            assert len(steps) == 4 + 3 * (seed % 5)
            assert max(later - one for one, later in itertools.pairwise(steps)) <= bound
        firsts = [steps[0] for steps in seen.values()]
        assert firsts == sorted(firsts)

    run(work)
