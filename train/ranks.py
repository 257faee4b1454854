"""Several processes that train one network: each has a part of every batch, and all have the mean of their gradients."""

import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from ddm.errors import DdmError
from train import stopping
from train.stopping import Stopped

OnProgress = Callable[[Any], None]

_REPORT_S = 10  # for the first rank to report an error that all meet
_GRACE_S = 50  # for ranks to save a checkpoint after a signal; less than `train.launch` gives


class RankDiedError(DdmError):
    """One of the processes that train a network ended without a result."""


@dataclass(frozen=True)
class Ranks:
    """Which of `size` processes this one is, and how Lightning reaches the others.

    strategy, devices: as `pl.Trainer` takes them. environment: the plugin that knows the ranks. prepare: done to the trainer
    """

    rank: int = 0
    size: int = 1
    strategy: Any = "auto"
    devices: int | str = 1
    # One process trains one network, also where srun or torchrun have started several.
    environment: Any = field(default_factory=LightningEnvironment)
    prepare: Callable[[Any], Any] = lambda trainer: trainer


_current: Ranks | None = None


def current() -> Ranks:
    """Who this process is: the only one, unless it is `among` others."""
    return _current or Ranks()


@contextmanager
def among(ranks: Ranks) -> Iterator[None]:
    """Inside, this process is one of several."""
    global _current
    _current = ranks
    try:
        yield
    finally:
        _current = None


def run_ranks(
    work: Callable[[OnProgress], None],
    size: int,
    threads: int,
    retries: int,
    on_progress: OnProgress,
) -> None:
    """Call `work` in `size` processes of this machine, by torch's elastic launcher; rank 0 reports.

    Each has a GPU of its own, if there are any. When one dies all begin again, up to `retries` times. Raises what rank 0
    raised, `RankDiedError` if one died too often, and `Stopped` after a signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=retries,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle=",".join(
            number.name for number, handler in before.items() if handler is not signal.SIG_IGN
        ),
        shutdown_timeout=_GRACE_S,
    )
    given_up = get_context("spawn").Event()  # after an error that would come again
    errors: list[Exception] = []
    steps: list[int] = []
    signum: int | None = None
    failed: ChildFailedError | None = None

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, value = ours.recv()
                if kind == "progress":
                    on_progress(value)
                elif kind == "began":
                    errors.clear()  # of processes before a retry
                elif kind == "stopped":
                    steps[:] = value
                else:
                    errors.append(value)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        elastic_launch(config, _rank)(work, size, threads, theirs, given_up)
    except SignalException as stop:
        signum = stop.sigval
    except ChildFailedError as error:
        signum, failed = stopping.requested(), error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
        theirs.close()
        listener.join(1.0)
        ours.close()
    if signum is not None:
        raise Stopped(signum, steps)
    if errors:
        raise errors[0]
    if failed is not None:
        code = failed.get_first_failure()[1].exitcode
        raise RankDiedError(f"one of its {size} processes ended with status {code}") from failed


def _rank(
    work: Callable[[OnProgress], None], size: int, threads: int, pipe: Connection, given_up: Event
) -> None:
    """The main function of one of the processes."""
    if given_up.is_set():
        return  # the launcher starts all again
    from lightning.pytorch.strategies import DDPStrategy

    from train.launch import leave_with_parent, picklable

    stopping.follow_launcher()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    rank = int(os.environ["RANK"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the others are on this machine
    strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    ranks = Ranks(rank, size, strategy, size, TorchElasticEnvironment())
    tell = partial(_tell, pipe) if rank == 0 else _ignore
    if rank == 0:
        pipe.send(("began", None))
    try:
        with among(ranks):
            work(tell)
    except Stopped as stopped:
        if rank == 0:
            pipe.send(("stopped", stopped.steps))
        sys.exit(128 + stopped.signum)
    except Exception as error:
        ours = isinstance(error, DdmError)
        if rank == 0:
            pipe.send(("error", picklable(error)))
            if ours:
                given_up.set()
        elif ours and not given_up.wait(_REPORT_S):  # the first has not met it
            print(f"rank {rank}: {error}", file=sys.stderr)
        if ours:
            sys.exit(1)  # on which the others, which may wait for this one, are ended
        raise


def _tell(pipe: Connection, news: Any) -> None:
    pipe.send(("progress", news))


def _ignore(_: Any) -> None:
    pass
