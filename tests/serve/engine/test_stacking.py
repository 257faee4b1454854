"""Rows of stacked tensors, and that a step of many images takes no more operations than of few."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine.advance import advance
from serve.engine.stacking import Row, stacked
from serve.engine.state import ImageState
from serve.model.model import Model
from tests.serve.engine.harness import only, request_for, run


class Pair(NamedTuple):
    x: Tensor
    rest: tuple[Tensor, ...]
    missing: None = None


def pair(low: int, high: int) -> Pair:
    x = torch.arange(low, high)
    return Pair(x, (x.double()[:, None], -x))


def test_rows_of_several_stacks_are_stacked_in_their_order() -> None:
    a, b = pair(0, 4), pair(10, 13)
    found = stacked([Row(b, 2), Row(a, 1), Row(b, 0), Row(a, 3)])
    expected = torch.tensor([12, 1, 10, 3])
    assert isinstance(found, Pair)
    assert found.missing is None
    assert found.x.equal(expected)
    assert found.rest[0].equal(expected.double()[:, None])
    assert found.rest[1].equal(-expected)


def test_a_whole_stack_in_its_order_is_not_copied() -> None:
    a = pair(0, 4)
    assert stacked([Row(a, i) for i in range(4)]).x is a.x
    assert stacked([Row(a, i) for i in range(3)]).x.equal(a.x[:3])
    assert stacked([Row(a, i) for i in (1, 0, 2, 3)]).x.equal(a.x[[1, 0, 2, 3]])
    assert stacked([Row(a.x, 2), Row(a.x, 2)]).equal(torch.tensor([2, 2]))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "accelerated_sde"])
def test_the_operations_of_a_step_do_not_grow_with_the_images(model: Model, sampler: str) -> None:
    def operations(images: int) -> list[int]:
        counts = list[int]()
        request = request_for(model, images, sampler=sampler, **only(model, 1))
        states, failed = advance([ImageState(request, place) for place in range(images)], None)
        while states[0].image is None:
            answers = torch.zeros(images, *model.shape)
            for i, state in enumerate(states):
                state.answers[state.experts[0]] = Row(answers, i)
            with Operations() as counted:
                states, failed = advance(states, None)
            assert not failed
            counts.append(counted.count)
        return counts

    async def work() -> None:
        operations(1)  # after which the schedule is cached
        assert operations(2) == operations(30)

    run(work)
