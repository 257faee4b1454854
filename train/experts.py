"""The stage `expert`: K experts, each alone on its cluster's file, in this process or in several side by side."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ddm.artifacts import digest, read_json, write_artifact
from ddm.errors import ArtifactError, ConfigError, DdmError
from ddm.learning import Batches
from ddm.partition import Partition
from ddm.randomness import Use, seed_of
from ddm.schedules import schedule
from experts.learning import ExpertConfig, ExpertLearning
from train.config import Config, plain
from train.fit import Report, fit
from train.progress import bars

log = logging.getLogger(__name__)


def expert_stem(config: Config, k: int) -> Path:
    """Where the artifact of expert k lies, without its suffix."""
    return config.folder / "experts" / f"{k:02d}" / "expert"


def _key(config: Config, partition: Partition, k: int) -> str:
    """The content hash of all that makes expert k what it is."""
    return digest([plain(_own(config)), config.schedule, config.seed, config.data.flip, partition.hash, partition.hashes[k]])


def _own(config: Config) -> ExpertConfig:
    return ExpertConfig(**{field.name: getattr(config.expert, field.name) for field in fields(ExpertConfig)})


def train_experts(config: Config) -> None:
    """Train every expert that is not up to date, or `expert.index` alone.

    An expert that fails costs only itself: the others are trained first, then `DdmError` names it.
    """
    partition = Partition.read(config.folder / "partition")
    index = config.expert.index
    if index is not None and index >= partition.k:
        raise ConfigError(f"expert.index must be in [0, {partition.k - 1}], the clusters of {config.folder}, got {index}")
    wanted = range(partition.k) if index is None else [index]
    todo = [k for k in wanted if not _up_to_date(config, partition, k)]
    if len(todo) < len(wanted):
        log.info("expert     up to date: %d of %d", len(wanted) - len(todo), len(wanted))
    if not todo:
        return
    began = time.monotonic()
    workers = min(len(todo), config.expert.workers or (os.cpu_count() or 1 if config.device == "cpu" else 1))
    with bars() as progress:
        tasks = {k: progress.add_task(f"expert {k:02d} {partition.names[k]}"[:24], total=config.expert.steps, note="") for k in todo}

        def show(k: int, step: int, loss: float) -> None:
            progress.update(tasks[k], completed=step, note=f"loss {loss:.4f}")

        failed = _here(config, todo, show) if workers == 1 else _side_by_side(config, todo, workers, show)
    if failed:
        k, error = failed[0]
        raise DdmError(f"expert {k:02d} of {config.folder} failed: {error}. Run the same command again to resume") from error
    log.info("expert     trained %d of %d in %.0f s", len(todo), partition.k, time.monotonic() - began)


def _up_to_date(config: Config, partition: Partition, k: int) -> bool:
    """Whether expert k is there and made of the same; one made of something else is refused, never overwritten."""
    path = expert_stem(config, k).with_suffix(".json")
    if not path.exists():
        return False
    if read_json(path).get("key") != _key(config, partition, k):
        raise ArtifactError(f"{path} was made by another config or from other pictures: move {path.parent} away to train it anew")
    return True


def train_expert(config: Config, k: int, report: Report) -> None:
    """Train expert k from its cluster's file, and nothing else, and write its artifact."""
    partition = Partition.read(config.folder / "partition")
    images = partition.cluster(config.folder / "partition", k)["images"]
    own, stem = _own(config), expert_stem(config, k)
    seed = seed_of(config.seed, Use.EXPERT, k)
    torch.manual_seed(seed)
    denoiser = own.build(partition.shape, schedule(**config.schedule))
    learning = ExpertLearning(denoiser, Batches(images, own.batch, seed, config.data.flip), own)
    fit(learning, own.steps, own, stem.parent, config.accelerator, report)
    facts = {
        "kind": "expert",
        "index": k,
        "name": partition.names[k],
        "key": _key(config, partition, k),
        "config": plain(own),
        "shape": partition.shape,
        "schedule": config.schedule,
        "partition": partition.hash,
        "steps": own.steps,
        "pictures_seen": own.steps * own.batch,
        "weights": "ema" if own.ema_decay > 0 else "raw",
    }
    write_artifact(stem, denoiser.state_dict(), facts)
    (stem.parent / "resume.ckpt").unlink(missing_ok=True)


Show = Callable[[int, int, float], None]
Failures = list[tuple[int, BaseException]]


def _here(config: Config, todo: Sequence[int], show: Show) -> Failures:
    failed: Failures = []
    for k in todo:
        try:
            train_expert(config, k, lambda step, loss, k=k: show(k, step, loss))
        except (DdmError, RuntimeError) as error:
            failed.append((k, error))
    return failed


def _side_by_side(config: Config, todo: Sequence[int], workers: int, show: Show) -> Failures:
    """Train in processes of their own, which share nothing but the machine and a queue for progress."""
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (news, threads)) as pool:
        futures = {pool.submit(_work, config, k): k for k in todo}
        pending: set[Future[None]] = set(futures)
        while pending:
            _, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            while not news.empty():
                show(*news.get())
        return [(k, error) for future, k in futures.items() if (error := future.exception())]


_news: Any = None  # in a worker, where progress is told


def _start_worker(news: Any, threads: int) -> None:
    global _news
    _news = news
    torch.set_num_threads(threads)
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(config: Config, k: int) -> None:
    train_expert(config, k, lambda step, loss: _news.put((k, step, loss)))
