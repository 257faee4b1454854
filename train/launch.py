"""Jobs that share nothing, run one after another here or side by side in processes of their own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

J = TypeVar("J")
R = TypeVar("R")
OnProgress = Callable[[Any], None]


def workers_for(jobs: int, device: str, asked: int | None = None) -> int:
    """How many processes: as many as asked for, else one a core on a CPU and one a GPU; never more than jobs."""
    return min(jobs, asked or ((os.cpu_count() or 1) if device == "cpu" else len(gpus())))


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def run_jobs(
    work: Callable[[J, OnProgress], R], jobs: Sequence[J], workers: int, on_progress: OnProgress
) -> list[R | Exception]:
    """`work(job, tell)` for every job: its result, or the exception it died of. What a job tells, `hear` hears, here.

    `work` and jobs are pickled where `workers` is above 1; each process then has its share of the cores, and a GPU where there
    are any, and leaves when this one is gone.
    """
    if workers == 1:
        return [_tried(work, job, on_progress) for job in jobs]
    context = multiprocessing.get_context("spawn")
    news, places = context.Queue(), context.Queue()
    for i in range(workers):
        places.put(gpus()[i % len(gpus())] if gpus() else None)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, context, _start_worker, (os.getpid(), news, threads, places)
    ) as pool:
        futures: list[Future[R]] = [pool.submit(_work, work, job) for job in jobs]
        try:
            pending = set(futures)
            while pending:
                pending = wait(pending, timeout=0.2).not_done
                while not news.empty():
                    on_progress(news.get())
        except KeyboardInterrupt:  # a job may have hours to go, and resumes from its checkpoint
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        return [
            _tried(lambda future, _: future.result(), future, on_progress) for future in futures
        ]


def _tried(
    work: Callable[[Any, OnProgress], R], job: Any, on_progress: OnProgress
) -> R | Exception:
    try:
        return work(job, on_progress)
    except Exception as error:
        return error


_on_progress: OnProgress  # in a worker process, the way to its parent


def _start_worker(parent: int, news: Any, threads: int, places: Any) -> None:
    global _on_progress
    _on_progress = news.put
    if gpu := places.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when this process first asks for CUDA
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to answer

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(work: Callable[[J, OnProgress], R], job: J) -> R:
    return work(job, _on_progress)
