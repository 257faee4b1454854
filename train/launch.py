"""Independent jobs, one after another in this process or side by side in processes of their own."""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from ddm.errors import DdmError
from train import stopping
from train.stopping import Stopped

J = TypeVar("J")
R = TypeVar("R")
OnProgress = Callable[[Any], None]
OnState = Callable[[int, str, str | None], None]  # (index of the job, its state, where it runs)
Work = Callable[[J, OnProgress], R]

log = logging.getLogger(__name__)

_POLL_S = 0.5  # how often a waiting parent looks for a signal
_GRACE_S = 60.0  # for workers to save a checkpoint after a signal
_LEAVE_S = 10.0  # for a worker without a job to end


class WorkerDiedError(DdmError):
    """The process of a job ended without a result, such as one killed for its memory."""


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def workers_for(jobs: int, device: str, asked: int | None = None, each: int = 1) -> int:
    """The number of jobs at a time: as many as asked for, else one per `each` GPUs or CPU cores; at most all."""
    if asked is None:
        asked = max(1, (cores() if device == "cpu" else len(gpus())) // each)
    return min(jobs, asked)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with that many threads for torch's CPU operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_jobs(
    work: Work[J, R],
    jobs: Sequence[J],
    workers: int,
    on_progress: OnProgress,
    threads: int | None = None,
    retries: int = 0,
    on_state: OnState = lambda *_: None,
    gpus_each: int = 1,
) -> list[R | Exception]:
    """Call `work(job, on_progress)` for every job; returns its result or its exception, in the order of the jobs.

    workers: the number of processes; 0 runs the jobs here, one after another
    on_progress: called in this process with what the jobs report
    threads: of torch's CPU operations in a job; None for an even share of the cores
    retries: how often a job begins again, in a new process, whose process has died
    gpus_each: GPUs that a job sees, if there are any
    on_state: called in this process when a job is `running`, `waiting` again, `done`, `stopped` or `failed`

    In processes of their own (`work`, the jobs and their results are then pickled), a job whose process dies costs only
    itself: without a retry left its result is a `WorkerDiedError`. Each process has its own of the GPUs, if there are any,
    and leaves with this one. After a signal, jobs get time to save a checkpoint, then `Stopped` is raised.
    """
    if threads is None:
        threads = max(1, cores() // max(1, workers))
    if workers == 0:
        with torch_threads(threads):
            return [
                _attempt(work, *numbered, on_progress, on_state) for numbered in enumerate(jobs)
            ]
    return _Pool(work, jobs, threads, on_progress, retries, on_state, gpus_each).run(workers)


def _attempt(
    work: Work[J, R], i: int, job: J, on_progress: OnProgress, on_state: OnState
) -> R | Exception:
    on_state(i, "running", "this process")
    try:
        result = work(job, on_progress)
    except Exception as error:
        on_state(i, "failed", None)
        return error
    on_state(i, "done", None)
    return result


@dataclass(eq=False)
class _Worker:
    """A process, its GPUs, this side's end of its pipe, and the index of its job."""

    process: BaseProcess
    gpu: str | None
    pipe: Connection
    job: int = -1


class _Pool:
    """The processes and the results of one `run_jobs`."""

    def __init__(
        self,
        work: Work[Any, Any],
        jobs: Sequence[Any],
        threads: int,
        on_progress: OnProgress,
        retries: int,
        on_state: OnState,
        gpus_each: int,
    ) -> None:
        self.gpus_each = gpus_each
        self.work, self.jobs = work, jobs
        self.threads, self.on_progress, self.on_state = threads, on_progress, on_state
        self.retries = [retries] * len(jobs)
        self.waiting = list(range(len(jobs)))
        self.results: dict[int, Any] = {}
        self.workers: list[_Worker] = []

    def run(self, count: int) -> list[Any]:
        """Every job's result, from `count` processes at a time."""
        with stopping.deferred():
            try:
                while len(self.results) < len(self.jobs):
                    if (signum := stopping.requested()) is not None:
                        raise Stopped(signum, self._stop())
                    while self.waiting and len(self.workers) < count:
                        self._start()
                    self._listen(_POLL_S)
            finally:
                for worker in self.workers:
                    worker.process.kill()
                    worker.process.join()
        return [self.results[i] for i in range(len(self.jobs))]

    def _start(self) -> None:
        """Start a process and give it the next job."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        gpu = self._free_gpus()
        process = context.Process(target=_serve, args=(theirs, self.work, self.threads, gpu))
        with _starting():
            process.start()
        theirs.close()
        worker = _Worker(process, gpu, ours)
        self.workers.append(worker)
        self._give(worker, self.waiting.pop(0))

    def _free_gpus(self) -> str | None:
        """The GPUs that have the fewest of the workers, as many as a job sees; None without GPUs."""
        busy = [gpu for worker in self.workers for gpu in (worker.gpu or "").split(",")]
        least = sorted(gpus(), key=busy.count)[: self.gpus_each]
        return ",".join(least) or None

    def _listen(self, timeout_s: float) -> None:
        """Handle what the workers have sent, waiting for at most `timeout_s`."""
        ready = wait([worker.pipe for worker in self.workers], timeout_s)
        for worker in [worker for worker in self.workers if worker.pipe in ready]:
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                kind, value = "died", WorkerDiedError(_cause(worker.process.exitcode))
            if kind == "progress":
                self.on_progress(value)
                continue
            self._end(worker.job, kind, value)
            # After an error its GPU may be lost to this process.
            if kind == "result" and not isinstance(value, Exception) and self.waiting:
                self._give(worker, self.waiting.pop(0))
            else:
                worker.pipe.close()  # on which the process leaves
                worker.process.join(_LEAVE_S)
                self.workers.remove(worker)

    def _end(self, job: int, kind: str, value: Any) -> None:
        """A job has ended: for good, unless its process has died and a retry is left."""
        if kind == "died" and self.retries[job] > 0 and stopping.requested() is None:
            self.retries[job] -= 1
            log.warning("job %d of %d begins again: %s", job + 1, len(self.jobs), value)
            self.waiting.append(job)
            self.on_state(job, "waiting", None)
            return
        self.results[job] = value
        failed = "failed" if isinstance(value, Exception) else "done"
        self.on_state(job, "stopped" if kind == "stopped" else failed, None)

    def _give(self, worker: _Worker, job: int) -> None:
        worker.job = job
        gpu = "" if worker.gpu is None else f", GPU {worker.gpu}"
        self.on_state(job, "running", f"process {worker.process.pid}{gpu}")
        with suppress(OSError):  # it has died, as the next _listen finds out
            worker.pipe.send(self.jobs[job])

    def _stop(self) -> list[int]:
        """Ask every worker to stop and wait for it; returns the steps at which they saved their checkpoints."""
        for worker in self.workers:
            worker.process.terminate()
        self.waiting.clear()
        deadline = time.monotonic() + _GRACE_S
        while self.workers and time.monotonic() < deadline:
            self._listen(_POLL_S)
        stopped = [result for result in self.results.values() if isinstance(result, Stopped)]
        return [step for result in stopped for step in result.steps]


@contextmanager
def _starting() -> Iterator[None]:
    """Start a process that ignores ctrl-C and imports what this process does, not what the current folder holds."""
    masked = (
        set(stopping.SIGNALS) - {signal.SIGTERM} if hasattr(signal, "pthread_sigmask") else None
    )
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    if masked is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, masked)
    try:
        yield
    finally:
        if masked is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, masked)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _cause(status: int | None) -> str:
    """Why a process ended without a result, from its exit status."""
    if status is None or status >= 0:
        return f"its process ended with status {status}"
    name = signal.Signals(-status).name
    reason = ", probably because memory ran out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{reason}"


def _serve(pipe: Connection, work: Work[Any, Any], threads: int, gpu: str | None) -> None:
    """The main function of a worker: receive a job, send its progress and its result, until the pipe is closed."""
    stopping.follow_parent()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    level = logging.WARNING if sys.stderr.isatty() else logging.INFO  # the parent has bars there
    logging.basicConfig(level=level, format="%(message)s")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when this process first uses CUDA
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError, Stopped):
        while True:
            pipe.send(_outcome(work, pipe.recv(), lambda news: pipe.send(("progress", news))))


def _outcome(work: Work[Any, Any], job: Any, on_progress: OnProgress) -> tuple[str, Any]:
    try:
        return "result", work(job, on_progress)
    except Stopped as stop:
        return "stopped", stop
    except Exception as error:
        return "result", picklable(error)


def picklable(error: Exception) -> Exception:
    """An error that another process can be sent, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))  # pickling drops the traceback
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception with arguments of its own need not survive it
        return RuntimeError(f"{type(error).__name__}: {error}", *error.__notes__)
    return error


def leave_with_parent() -> None:
    """End this process when its parent has ended: to be called in a thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
