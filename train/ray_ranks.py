"""A trial of Ray Tune whose training has several processes: Ray Train starts them, and Lightning trains in them.

Ray Train places the processes together, connects them, starts all again from the last checkpoint when one is lost, and keeps
the checkpoints in the storage; Tune still queues the trials and hears their news.
"""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from ddm.errors import ConfigError
from train.fit import NotFiniteError
from train.launch import picklable
from train.ranks import Ranks, among
from train.ray_trial import KEPT, Work, fetch, moved, name_of, stamp
from train.storage import Storage, pack

_EVERY_S = 10.0  # between two reports without a checkpoint


def train_ranks(config: dict[str, Any], work: Work) -> None:
    """A trial: train job `config["job"]` in as many processes as it asks for."""
    job = work.jobs[config["job"]]
    storage = Storage(*work.storage)
    TorchTrainer(
        _rank,
        train_loop_config={"job": config["job"], "work": work},
        scaling_config=ScalingConfig(
            num_workers=job.devices,
            use_gpu=work.claims["GPU"] > 0,
            resources_per_worker=work.claims,
        ),
        torch_config=TorchConfig(backend="nccl" if work.claims["GPU"] > 0 else "gloo"),
        run_config=RunConfig(
            name=name_of(job),
            storage_path=f"{work.inputs.rpartition('/')[0]}-ranks",
            storage_filesystem=storage.for_ray(),
            failure_config=FailureConfig(max_failures=work.config.launch.retries),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
        ),
    ).fit()


def _rank(config: dict[str, Any]) -> None:
    """The main function of one of the processes."""
    work: Work = config["work"]
    job = work.jobs[config["job"]]
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(work.threads)
    strategy = RayDDPStrategy(gradient_as_bucket_view=True)
    ranks = Ranks(rank, size, strategy, "auto", RayLightningEnvironment(), prepare_trainer)
    where = f"{ray.util.get_node_ip_address()} and others, process {os.getpid()}"
    with tempfile.TemporaryDirectory() as scratch, among(ranks):
        run = Path(scratch)
        folder = run / job.folder
        last = ray.train.get_checkpoint()
        with contextlib.nullcontext() if last is None else last.as_directory() as packed:
            fetch(work, job, run, None if packed is None else Path(packed))
        tell = _teller(folder, rank, where)
        error: Exception | None = None
        try:
            job.train(moved(work.config, run), tell)
        except (ConfigError, NotFiniteError) as raised:  # all raise these, others perhaps one alone
            error = picklable(raised)
        tell((job.steps, math.nan), last=True)
        if error is not None:  # Ray Train keeps the news beside a checkpoint as JSON
            tell((job.steps, math.nan), error, last=True)


def _teller(folder: Path, rank: int, where: str) -> Callable[..., None]:
    """Reports news to Ray Train, which takes it seconds, and what is new in the folder as a checkpoint.

    All processes report or none does: rank 0 says when.
    """
    saved, told = stamp(folder), -math.inf

    def tell(news: tuple[int, float], error: Exception | None = None, last: bool = False) -> None:
        nonlocal saved, told
        found = {"steps_done": news[0], "loss": news[1], "where": where, "error": error}
        new = rank == 0 and stamp(folder) != saved
        if not last and not _agreed(new or time.monotonic() - told >= _EVERY_S):
            return
        if not new:
            ray.train.report(found)
        else:
            saved = stamp(folder)
            with tempfile.TemporaryDirectory() as packed:
                pack(folder, Path(packed))
                ray.train.report(found, checkpoint=ray.train.Checkpoint.from_directory(packed))
        told = time.monotonic()

    return tell


def _agreed(due: bool) -> bool:
    """What rank 0 says, in all processes."""
    said = torch.tensor([int(due)], device=ray.train.torch.get_device())
    torch.distributed.broadcast(said, 0)
    return bool(said)
