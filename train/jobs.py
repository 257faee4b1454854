"""Trainings side by side, here or on a Ray cluster: the same results, the same table, the same messages."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ddm.errors import ConfigError
from train.config import Config
from train.launch import OnProgress, run_jobs
from train.live_table import LiveTable, Row
from train.ranks import run_ranks

Training = Callable[[Config, OnProgress], None]  # reports (steps done, mean loss)


@dataclass(frozen=True)
class Job:
    """One training. All that it keeps is in one folder, so it goes on wherever that folder is.

    name: in errors, such as `expert 03`
    label: in the table, such as `expert 03: cats`
    train: does it, whole or from where its folder's checkpoint stands; pickled for another process
    folder: of its checkpoints and its artifact, relative to the run's
    reads: the files that it reads besides
    key: the content hash of what it is trained from
    steps, batch: of the whole training, and images per step
    devices: processes that share each batch
    """

    name: str
    label: str
    train: Training
    folder: str
    reads: Sequence[Path]
    key: str
    steps: int
    batch: int
    devices: int = 1


def train_side_by_side(
    config: Config, jobs: Sequence[Job], workers: int, threads: int
) -> list[Exception | None]:
    """Train everything, `workers` at a time with `threads` CPU threads each; returns what became of each.

    On Ray as many run at a time as the cluster has room for, with as many threads as they claim CPUs unless
    expert.threads says otherwise. Raises `Stopped` after a signal, with checkpoints saved.
    """
    devices = max(job.devices for job in jobs)
    rows = [Row(job.label[:24], job.steps, job.batch) for job in jobs]
    with LiveTable(rows) as table:
        if config.launch.backend == "ray":
            if config.launch.address is None:
                # No other switch keeps the ports of a Ray that is started here on this machine. Read when it is imported.
                os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
            try:
                from train.ray_jobs import train_on_ray  # Ray takes seconds to import
            except ImportError as error:
                raise ConfigError(
                    f"launch.backend=ray needs Ray, here: pip install 'ray[train]' ({error})"
                ) from error
            return train_on_ray(config, jobs, table)
        return run_jobs(
            partial(_train, config, max(1, threads // devices)),
            list(enumerate(jobs)),
            workers,
            lambda news: table.step(*news),
            threads,
            config.launch.retries,
            table.state,
            devices,
        )


def _train(
    config: Config, threads: int, numbered: tuple[int, Job], on_progress: OnProgress
) -> None:
    i, job = numbered

    def tell(news: tuple[int, float]) -> None:
        on_progress((i, *news))

    if job.devices == 1:
        job.train(config, tell)
    else:
        run_ranks(partial(job.train, config), job.devices, threads, config.launch.retries, tell)
