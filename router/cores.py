"""Calls of experts on a CPU, side by side on its cores.

One operation on a few images does not keep several cores busy, and one on many leaves their caches.
So each core takes pieces of the batch through a whole network.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

Expert = Callable[..., Tensor]
Call = tuple[Expert, Tensor, Tensor]  # an expert, its images [B, ...] and their times, [] or [B]

_IMAGES = 16  # of a piece: with more of them a core computes no faster


def side_by_side(
    answer: Callable[[Expert, Tensor, Tensor], Tensor], calls: Sequence[Call]
) -> Tensor:
    """The answers to all calls, `[M, ...]`, one after another.

    On a CPU of which torch uses several threads, and where no gradient is kept, each of them
    answers for pieces of the calls: what an image gets must not depend on the images beside it.
    """
    threads, n = torch.get_num_threads(), sum(len(images) for _, images, _ in calls)
    alone = threads == 1 or n < threads or calls[0][1].device.type != "cpu"
    if alone or torch.is_grad_enabled():
        return torch.cat([answer(*call) for call in calls])
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(call: Call) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled):  # not inherited
            return answer(*call)

    pieces = _pieces(calls, min(_IMAGES, math.ceil(n / threads)))
    return torch.cat(list(_threads(threads).map(work, pieces)))


def _pieces(calls: Sequence[Call], most: int) -> list[Call]:
    """The same calls, each for at most so many images."""
    pieces: list[Call] = []
    for expert, images, times in calls:
        parts = images.split(most)
        t = times.split(most) if times.ndim else [times] * len(parts)
        pieces += [(expert, *part) for part in zip(parts, t, strict=True)]
    return pieces


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """That many threads, of which each computes alone."""
    pool = ThreadPoolExecutor(count, "expert", torch.set_num_threads, (1,))
    started = Barrier(count)
    list(pool.map(lambda _: started.wait(), range(count)))
    torch.set_num_threads(count)  # a part of that setting is the process's: back to what it was
    return pool
