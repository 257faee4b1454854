"""Stopping on SIGINT, SIGTERM and SIGHUP: training saves a checkpoint, then leaves."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_HANGUP = getattr(signal, "SIGHUP", None)  # which comes several times when a terminal is closed
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

_requested: int | None = None
_deferring = False


class Stopped(BaseException):
    """The user or the system asked this process to stop; `steps` are those at which training was saved."""

    def __init__(self, signum: int, steps: Sequence[int] = ()) -> None:
        super().__init__(signum, steps)
        self.signum, self.steps = signum, list(steps)

    def __str__(self) -> str:
        where = f" at step {', '.join(map(str, self.steps))}" if self.steps else ""
        return f"stopped{where}; the same command resumes"


@contextmanager
def on_signals(leave: bool = True) -> Iterator[None]:
    """Inside, the first signal raises `Stopped`, or is kept for `requested` inside `deferred`; the second leaves at once,
    unless it is a hangup; without `leave` it raises `KeyboardInterrupt`.

    A signal that is ignored (`nohup`, a shell's background job) stays ignored. Threads other than the main one receive
    no signals, so there nothing changes.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested = None
    before = {s: signal.getsignal(s) for s in SIGNALS}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _leave_at_the_second if leave else _raise_at_the_second)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _requested = None


def follow_parent() -> None:
    """In a worker process: SIGTERM stops it as in `on_signals`, any number of times; the parent answers the others."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)


def follow_launcher() -> None:
    """In one of several processes that train one network: each signal that is not ignored stops it, any number of times."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal raises nothing: the block asks `requested` where it can stop. At its end `Stopped` is raised."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before
    if _requested is not None and not _deferring:
        raise Stopped(_requested)


def requested() -> int | None:
    """The signal that asked this process to stop, if one did."""
    return _requested


def _stop(signum: int, _: FrameType | None) -> None:
    global _requested
    if _requested is None:
        _requested = signum
        if not _deferring:
            raise Stopped(signum)


def _leave_at_the_second(signum: int, frame: FrameType | None) -> None:
    if _requested is not None and signum != _HANGUP:
        os._exit(128 + signum)
    _stop(signum, frame)


def _raise_at_the_second(signum: int, frame: FrameType | None) -> None:
    if _requested is not None and signum != _HANGUP:
        raise KeyboardInterrupt
    _stop(signum, frame)
