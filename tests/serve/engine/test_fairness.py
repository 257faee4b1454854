"""No request is held up by larger ones: the order of images, counted in calls."""

import asyncio
import itertools
from collections import Counter

import pytest
import torch

from serve.engine.admission import Admission
from serve.engine.fair_queue import FairQueue
from serve.engine.scheduler import Engine
from serve.engine.shares import ANYONE, Flow, Key, Shares
from serve.engine.state import ImageState, Request
from serve.engine.turn import Rank, Turn
from serve.model.model import Model
from tests.serve.engine.harness import (
    Fake,
    fakes,
    images,
    only,
    request_for,
    run,
    running,
    same,
    until,
)


def unplanned(n: int = 1, key: Key = ANYONE, steps: int = 1) -> Request:
    """A request for n images, for tests of order alone."""
    request = Request(None, 0, torch.arange(n), key=key, done=None)  # type: ignore[arg-type]
    request.nfe_per_image = float(steps)
    return request


def queue_of(*requests: Request, credit: float = 8.0) -> FairQueue:
    """A queue, empty, of an engine that these requests have entered."""
    shares = Shares(credit)
    for request in requests:
        shares.enter(request.flow)
    return FairQueue(shares)


def pop(queue: FairQueue) -> ImageState:
    (state,) = queue.take(1, 1, 0, alone=lambda state: False)
    return state


def image(request: Request, place: int = 0) -> ImageState:
    return ImageState(request, place)


def begun(admission: Admission) -> list[list[int]]:
    return [list(places) for _, places in admission.begin()]


def finish(admission: Admission, request: Request) -> None:
    request.images[len(request.images)] = torch.zeros(0)
    admission.image_ended()


# Queues


def test_requests_take_turns_of_one_image() -> None:
    requests = [unplanned(), unplanned(), unplanned()]
    queue = queue_of(*requests)
    for request, n in zip(requests, (4, 1, 2), strict=True):
        for place in range(n):
            queue.push(image(request, place))
    assert len(queue) == len(list(queue)) == 7
    taken = [(requests.index((state := pop(queue)).request), state.place) for _ in range(7)]
    assert taken == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2), (0, 3)]
    assert not queue


def test_a_new_request_waits_for_one_image_of_each_other() -> None:
    large, small = [unplanned() for _ in range(6)], unplanned()
    queue = queue_of(*large, small)
    for request in large:
        for place in range(64):
            queue.push(image(request, place))
    for _ in range(9):
        pop(queue)
    queue.push(image(small))
    waited = 0
    while pop(queue).request is not small:
        waited += 1
    assert waited == 6


def test_images_put_back_are_the_next_in_their_order() -> None:
    one, other = unplanned(), unplanned()
    queue = queue_of(one, other)
    for place in range(3):
        queue.push(image(one, place))
        queue.push(image(other, place))
    taken = [pop(queue) for _ in range(3)]
    queue.push_first(taken)
    again = [pop(queue) for _ in range(6)]
    assert again[0] is taken[0]
    assert len(queue) == 0 and len(set(again)) == 6
    for request in (one, other):
        assert [state.place for state in again if state.request is request] == [0, 1, 2]


def test_removed_images_are_gone_and_the_others_keep_their_order() -> None:
    one, other = unplanned(), unplanned()
    queue = queue_of(one, other)
    for place in range(4):
        queue.push(image(one, place))
        queue.push(image(other, place))
    queue.remove(lambda state: state.request is one or state.place == 1)
    assert len(queue) == 3
    assert [pop(queue).place for _ in range(3)] == [0, 2, 3]


# Shares


def served(shares: Shares, *flows: Flow, rounds: int, evaluations: float = 1) -> Counter[Flow]:
    """How often each of these goes first, if all have work all the time."""
    counts = Counter[Flow]()
    for _ in range(rounds):
        first = min(flows, key=shares.rank)
        shares.charge(first, evaluations)
        counts[first] += 1
    return counts


def test_keys_share_by_weight_and_the_sizes_of_a_key_equally() -> None:
    shares = Shares(credit=8)
    one, other = Key("one", weight=3), Key("other")
    flows = [Flow(one, 1), Flow(other, 1), Flow(other, 4)]
    for flow in flows:
        shares.enter(flow)
    counts = served(shares, *flows, rounds=4000)
    assert counts[flows[0]] == pytest.approx(3000, abs=10)
    assert counts[flows[1]] == pytest.approx(counts[flows[2]], abs=10)


def test_a_higher_priority_goes_first() -> None:
    shares = Shares(credit=8)
    urgent, heavy = Flow(Key("urgent", priority=1), 3), Flow(Key("heavy", weight=100), 0)
    for flow in (urgent, heavy):
        shares.enter(flow)
    assert served(shares, urgent, heavy, rounds=100) == {urgent: 100}
    assert not shares.joins(heavy, urgent) and not shares.joins(urgent, heavy)


def test_who_comes_back_has_its_credit_and_no_more() -> None:
    shares = Shares(credit=8)
    giant, small = Flow(ANYONE, 5), Flow(ANYONE, 0)
    shares.enter(giant)
    shares.charge(giant, 1000)
    for _ in range(3):
        served(shares, giant, rounds=20)
        shares.enter(small)
        assert served(shares, giant, small, rounds=8) == {small: 8}
        assert served(shares, giant, small, rounds=20)[giant] == pytest.approx(10, abs=1)
        shares.leave(small)


def test_a_call_of_a_large_request_is_short_while_there_are_small_ones() -> None:
    giant, small = unplanned(64, steps=250), unplanned(1, steps=3)
    queue = queue_of(giant)
    for place in range(64):
        queue.push(image(giant, place))
    assert len(queue.take(32, 8, 0, alone=lambda state: False)) == 32
    queue.shares.enter(small.flow)
    assert len(queue.take(32, 8, 0, alone=lambda state: False)) == 8
    queue.push(image(small))
    assert [state.request for state in queue.take(32, 8, 1, lambda state: False)] == [small]
    queue.push(image(small))
    filled = queue.take(32, 8, 6, alone=lambda state: False)  # as on a GPU
    assert [state.request for state in filled] == [small, *5 * [giant]]


def test_keys_within_their_share_have_calls_in_common() -> None:
    one, other = unplanned(16, Key("one")), unplanned(16, Key("other"))
    queue = queue_of(one, other)
    for place in range(16):
        for request in (one, other):
            queue.push(image(request, place))
    queue.shares.charge(one.flow, 8)
    taken = queue.take(20, 8, 0, alone=lambda state: False)
    assert [state.request for state in taken] == [*16 * [other], *4 * [one]]
    queue.push_first(taken)
    queue.shares.charge(one.flow, 1)
    assert {state.request for state in queue.take(20, 8, 0, lambda state: False)} == {other}


# Turns


def test_the_next_turn_is_the_lowest_rank_at_that_moment() -> None:
    async def work() -> None:
        turn, order = Turn(), list[str]()
        ranks: dict[str, Rank | None] = {"a": None, "b": (3,), "c": (2,), "d": (1,)}

        async def one(name: str) -> None:
            async with turn.of(lambda: ranks[name]):
                order.append(name)
                ranks["a"] = (0,) if name == "d" else ranks["a"]
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for name in ranks:
                group.create_task(one(name))
        assert order == ["d", "a", "c", "b"]

    run(work)


def test_who_leaves_while_it_waits_or_as_its_turn_comes_takes_no_place() -> None:
    async def work() -> None:
        turn, taken = Turn(), list[int]()

        async def one(number: int) -> None:
            async with turn.of(lambda: (number,)):
                taken.append(number)
                await asyncio.sleep(0)

        first = asyncio.create_task(one(0))
        await until(lambda: bool(taken))
        tasks = [asyncio.create_task(one(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await first
        tasks[1].cancel()  # as the place is given to it
        await asyncio.wait(tasks)
        assert taken == [0, 3]

    run(work)


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
        turn = Turn(1)
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
        turn = Turn(1)
        experts = fakes(model, turn=turn)
        seen: dict[int, list[int]] = {seed: [] for seed in range(40)}
        async with (
            running(experts, turn=turn, max_batch=max_batch, max_active=12) as engine,
            asyncio.TaskGroup() as group,
        ):
            for seed, steps in seen.items():

                def note(*_: object, steps: list[int] = steps) -> None:
                    steps.append(len(experts[0].batches))

                settings = only(model, 0, steps=8 + 3 * (seed % 5))
                request = request_for(model, 1, seed=seed, on_step=note, **settings)
                group.create_task(engine.run(request))
        for seed, steps in seen.items():
            assert len(steps) == 8 + 3 * (seed % 5)
            assert max(later - one for one, later in itertools.pairwise(steps)) <= bound
        firsts = [steps[0] for steps in seen.values()]
        assert firsts == sorted(firsts)

    run(work)


GIANT, STEPS = 24, 30


async def beside_a_giant(
    engine: Engine, model: Model, experts: list[Fake], small: Request, giant: Request
) -> list[int]:
    """Images per call from when the small request comes to its last one, which is of one image."""
    task = asyncio.create_task(engine.run(giant))
    await until(lambda: len(experts[0].batches) > 2)
    before = len(experts[0].batches)
    await engine.run(small)
    task.cancel()
    await asyncio.wait([task])
    sizes = experts[0].sizes[before:]
    while sizes[-1] > 1:  # a call of the giant that began before this was told of the end
        sizes.pop()
    return sizes


def test_a_short_request_goes_before_a_giant(model: Model) -> None:
    async def work() -> None:
        turn = Turn()
        experts = fakes(model, turn=turn)
        small = request_for(model, 1, seed=7, **only(model, 0, steps=3))
        giant = request_for(model, GIANT, **only(model, 0, steps=STEPS))
        async with running(experts, turn=turn, max_batch=16) as engine:
            sizes = await beside_a_giant(engine, model, experts, small, giant)
            same(images(small), model.sample(1, seed=7, **only(model, 0, steps=3)))
        # A call of the giant may have begun before; then the small one goes at once at every step.
        assert sizes[-3:] == [1, 1, 1] and len(sizes) <= 4

    run(work)


def test_a_longer_request_shares_with_a_giant_by_evaluations(model: Model) -> None:
    async def work() -> None:
        turn = Turn()
        experts = fakes(model, turn=turn)
        small = request_for(model, 1, seed=7, **only(model, 0, steps=50))
        giant = request_for(model, GIANT, **only(model, 0, steps=STEPS))
        async with running(experts, turn=turn, max_batch=16) as engine:
            sizes = await beside_a_giant(engine, model, experts, small, giant)
        assert sizes.count(1) == 50
        of_the_giant = [size for size in sizes[1:] if size > 1]
        assert max(of_the_giant) == 8
        assert 50 - 3 * 8 <= sum(of_the_giant) <= 50 + 8

    run(work)


def test_a_giant_alone_has_full_calls(model: Model) -> None:
    async def work() -> None:
        turn = Turn()
        experts = fakes(model, turn=turn)
        async with running(experts, turn=turn, max_batch=8) as engine:
            await engine.run(request_for(model, GIANT, **only(model, 0, steps=4)))
        assert experts[0].sizes == [8] * (GIANT // 8 * 4)

    run(work)


def test_a_giant_has_its_half_however_many_small_requests_come(model: Model) -> None:
    async def work() -> None:
        turn = Turn()
        experts = fakes(model, turn=turn)
        giant = request_for(model, GIANT, **only(model, 0, steps=STEPS))
        small_nfe = 0
        async with running(experts, turn=turn, max_batch=16) as engine:
            large = asyncio.create_task(engine.run(giant))

            async def keep_asking(seed: int) -> None:
                nonlocal small_nfe
                while not giant.done.done():
                    small = request_for(model, 1, seed=seed, **only(model, 0, steps=3))
                    await engine.run(small)
                    small_nfe += 3

            async with asyncio.TaskGroup() as group:
                for seed in range(10):
                    group.create_task(keep_asking(seed))
            await large
        assert small_nfe == pytest.approx(GIANT * STEPS, rel=0.15)

    run(work)


def test_keys_advance_by_their_weights(model: Model) -> None:
    async def work() -> None:
        turn = Turn()
        experts = fakes(model, turn=turn)
        keys = [Key("three", weight=3), Key("one")]
        requests = [
            request_for(model, GIANT, seed=i, key=key, **only(model, 0, steps=STEPS))
            for i, key in enumerate(keys)
        ]
        async with running(experts, turn=turn, max_batch=16) as engine:
            tasks = [asyncio.create_task(engine.run(request)) for request in requests]
            await requests[0].done
            assert requests[1].nfe == pytest.approx(requests[0].nfe / 3, rel=0.2)
            await asyncio.gather(*tasks)
        for request in requests:
            settings = only(model, 0, steps=STEPS)
            same(images(request), model.sample(GIANT, seed=request.seed, **settings))

    run(work)
