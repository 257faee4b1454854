"""A trial of Ray Tune: one training in a process on a node."""

import contextlib
import logging
import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune

from ddm.errors import ArtifactError
from train.config import Config
from train.jobs import Job
from train.launch import picklable
from train.resume import steps
from train.storage import Storage, check_packed, pack, unpack

log = logging.getLogger(__name__)

KEPT = 2  # checkpoints of a trial


@dataclass
class Work:
    """What all trials share: the jobs, and how each is trained.

    storage: its URL and the run's name. inputs: the folder of what the jobs read. claims: what a process claims of Ray.
    news_s: seconds between two reports of a trial
    """

    config: Config
    jobs: Sequence[Job]
    threads: int
    storage: tuple[str, str]
    inputs: str
    claims: dict[str, float]
    news_s: float


class Training(tune.Trainable):
    """One job, in a thread of this process: `step` only waits for its news, and a checkpoint is copied meanwhile."""

    def setup(self, config: dict[str, Any], work: Any = None) -> None:
        self.work: Work = work
        self._prepare(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._prepare(new_config["job"])
        return True

    def _prepare(self, i: int) -> None:
        self.job = self.work.jobs[i]
        assert self.logdir is not None
        self.scratch = tempfile.TemporaryDirectory(dir=self.logdir, ignore_cleanup_errors=True)
        self.run = Path(self.scratch.name)
        self.folder = self.run / self.job.folder
        self.given: Path | None = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        self.news: tuple[int, float] = (0, math.nan)
        self.error: Exception | None = None
        self.saved = stamp(self.folder)

    def step(self) -> dict[str, Any]:
        if self.thread is None:
            fetch(self.work, self.job, self.run, self.given)
            self.thread = threading.Thread(target=self._train, daemon=True)
            self.thread.start()
        self.ended.wait(self.work.news_s)
        ended = self.ended.is_set()
        if isinstance(self.error, torch.AcceleratorError):
            raise self.error  # this process has lost its GPU, another may have one
        now = stamp(self.folder)
        new = now != self.saved
        self.saved = now
        step, loss = self.news
        found = {"steps_done": step, "loss": loss, "done": ended, "should_checkpoint": new}
        return found | {"error": self.error}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pack(self.folder, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.given = self.run / ".given"
        shutil.copytree(checkpoint, self.given)

    def cleanup(self) -> None:
        self.scratch.cleanup()

    def _train(self) -> None:
        torch.set_num_threads(self.work.threads)

        def on_progress(news: tuple[int, float]) -> None:
            self.news = news

        try:
            self.job.train(moved(self.work.config, self.run), on_progress)
        except torch.AcceleratorError as error:
            self.error = error
        except Exception as error:  # it would be raised on another node as well
            self.error = picklable(error)
        self.ended.set()


def stamp(folder: Path) -> list[tuple[str, int]]:
    """What of a training's folder changes with a checkpoint or an artifact."""
    kept = [*folder.rglob("resume.ckpt"), *folder.glob("*.json")]
    with contextlib.suppress(FileNotFoundError):
        return sorted((str(path), path.stat().st_mtime_ns) for path in kept)
    return []


def fetch(work: Work, job: Job, run: Path, given: Path | None) -> None:
    """Fetch what a job reads to the folder of a run, and what it goes on from: the packed folder given, or else the newest
    whole checkpoint in the storage, unless the run's own, which is among what it reads, is of a later step.

    Raises `ArtifactError` if the storage no longer has what it reads.
    """
    storage = Storage(*work.storage)
    inputs = f"{work.inputs}/{name_of(job)}"
    if storage.get(inputs, run) == 0:
        raise ArtifactError(f"{inputs} is missing: something has deleted it from {storage.url}")
    if given is not None and _unpacked(job, given, run):
        return
    for checkpoint in storage.checkpoints(name_of(job)):
        with tempfile.TemporaryDirectory(dir=run) as scratch:
            storage.get(checkpoint, Path(scratch))
            if _unpacked(job, Path(scratch), run):
                return


def _unpacked(job: Job, packed: Path, run: Path) -> bool:
    """Whether the run's folder now holds what is packed, or had what is of a later step."""
    folder = run / job.folder
    try:
        check_packed(packed)
        done = any(packed.glob("*.safetensors")) and not any(folder.glob("*.safetensors"))
        if done or steps(folder) <= steps(packed):
            unpack(packed, folder)
    except ArtifactError as error:
        log.warning("%s: %s; an earlier checkpoint is used", job.name, error)
        return False
    return True


def name_of(job: Job) -> str:
    """The folder of a job in the storage."""
    return f"{job.name.replace(' ', '-')}-{job.key[:16]}"


def inside(config: Config, path: Path) -> str:
    """Where a file that is read lies in a run folder elsewhere."""
    shard = config.expert.shard
    if shard is not None and path.is_relative_to(shard):
        return f"shard/{path.name}"
    if path.is_relative_to(config.folder):
        return path.relative_to(config.folder).as_posix()
    return f"init/{path.name}"


def moved(config: Config, run: Path) -> Config:
    """The config for a run folder elsewhere, with its files at `inside`."""
    expert = config.expert
    init = None if expert.init is None else str(run / inside(config, Path(expert.init)))
    shard = None if expert.shard is None else str(run / "shard")
    return replace(config, run=str(run), expert=replace(expert, init=init, shard=shard))
