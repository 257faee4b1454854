"""Rows of stacked tensors: an image's own among those of the images it was last computed with."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


class Row(NamedTuple, Generic[S]):
    """Row i of a stack: a tensor, or a tuple of stacks, of as many rows each."""

    stack: S
    i: int


def stacked(rows: Sequence[Row[S]]) -> S:
    """The rows as one stack, in their order: one gather from each stack that holds some, so that
    the number of tensor operations does not depend on that of the rows.
    """
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(id(row.stack), []).append(place)
    stacks = [rows[of[0]].stack for of in places.values()]
    indices = [_Index([rows[place].i for place in of]) for of in places.values()]
    order = [place for of in places.values() for place in of]
    inverse = [0] * len(order)
    for i, place in enumerate(order):
        inverse[place] = i
    return _gathered(stacks, indices, _Index(inverse))


class _Index:
    """Rows to take from tensors."""

    def __init__(self, rows: list[int]) -> None:
        self.length = len(rows)
        self.all = rows == list(range(len(rows)))  # of a tensor of that length
        self.rows = torch.tensor(rows)

    def of(self, tensor: Tensor) -> Tensor:
        if self.all and tensor.shape[0] == self.length:
            return tensor
        return tensor.index_select(0, self.rows.to(tensor.device))


def _gathered(stacks: list[Any], indices: list[_Index], order: _Index) -> Any:
    first = stacks[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        parts = [index.of(stack) for index, stack in zip(indices, stacks, strict=True)]
        return order.of(parts[0] if len(parts) == 1 else torch.cat(parts))
    fields = [_gathered(list(each), indices, order) for each in zip(*stacks, strict=True)]
    return first._make(fields) if hasattr(first, "_make") else tuple(fields)
