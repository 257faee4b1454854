"""Trainings as trials of Ray Tune, on one machine or on a cluster.

Tune runs the trials side by side, queues what has no room, starts a trial again from its last checkpoint on any node
after its process or its node is lost, and keeps the checkpoints in the storage. One process per trial is reused for the
next. `Tuner.restore`, which goes on after the driver itself was lost, unpickles what it finds in the storage and wants the
same trials with the same settings; so a later command starts new trials from the checkpoints of the same key instead.
"""

import contextlib
import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.util.queue import Empty, Queue

from ddm.errors import DdmError
from train import stopping
from train.config import Config
from train.jobs import Job
from train.live_table import LiveTable
from train.ray_nodes import check_room, check_shared, claims, connected, processes_at_once
from train.ray_trial import KEPT, Training, Work, inside, name_of
from train.stages.denoiser import artifact_stem
from train.stopping import Stopped
from train.storage import Storage, kept_files, unpack

log = logging.getLogger(__name__)

_NEWS_S = 0.5  # between two reports of a trial
_COMMAND = re.compile(r"\d{8}-\d{6}-\d{6}")  # in a storage, by when it began


class Listener:
    """What this process does with the news of trials: the table, the log, and the artifacts that are fetched."""

    def __init__(
        self, config: Config, jobs: Sequence[Job], table: LiveTable, storage: Storage
    ) -> None:
        self.config, self.jobs, self.table, self.storage = config, jobs, table, storage
        self.results: list[Exception | None] = [RuntimeError("Ray ended before it")] * len(jobs)
        self.unfinished = set(range(len(jobs)))
        self.where = [""] * len(jobs)
        # In the storage: what these have of a job is deleted when it is done.
        self.commands: set[str] = set()
        self.saved = [0] * len(jobs)

    def hear(self, i: int, kind: str, *news: Any) -> None:
        """News of job i: `began`, `step` (where, step, loss), `saved` (step), `lost` (why), `done` (checkpoint), or
        `failed` (error).
        """
        match kind, *news:
            case ("began",):
                self.where[i] = ""
            case "step", where, step, loss:
                if where != self.where[i]:
                    self.where[i] = where
                    self.table.state(i, "running", where)
                self.table.step(i, step, loss)
            case "saved", step:
                self.saved[i] = step
            case "lost", why:
                self.table.state(i, "waiting")
                name, step = self.jobs[i].name, self.saved[i]
                log.warning("%s: %s (%s); it resumes from step %d", name, why, self.where[i], step)
            case "done", checkpoint:
                self._fetch(i, checkpoint)
            case "failed", error:
                self.unfinished.discard(i)
                self.results[i] = error
                self.table.state(i, "failed")
            case _:
                raise AssertionError((kind, news))

    def _fetch(self, i: int, checkpoint: str) -> None:
        """Fetch an artifact to the run's folder."""
        job = self.jobs[i]
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self.storage.get(checkpoint, Path(scratch))
                unpack(Path(scratch), self.config.folder / job.folder)
        except Exception as error:  # each file system has errors of its own
            self.hear(i, "failed", DdmError(f"it is trained, but cannot be fetched: {error}"))
            return
        self.unfinished.discard(i)
        self.results[i] = None
        self.table.state(i, "done")
        with contextlib.suppress(Exception):  # it costs only room
            self.storage.forget(name_of(job), self.commands)


class _Link:
    """From Tune's loop to the listener: a call, or queues where the loop runs on a cluster (`ray://`)."""

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener
        # On the head, where the loop is: a lost worker node must not take them along.
        head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        self.news = Queue(actor_options=head) if listener is None else None
        self.stop = Queue(actor_options=head) if listener is None else None

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles its callbacks
        return {**vars(self), "listener": None}

    def tell(self, *news: Any) -> None:
        if self.listener is not None:
            self.listener.hear(*news)
        elif self.news is not None:
            self.news.put(news)

    def stopping(self) -> bool:
        return stopping.requested() is not None if self.stop is None else not self.stop.empty()


class _Tell(tune.Callback):
    """What Tune does, told to the listener."""

    def __init__(self, link: _Link) -> None:
        self.link = link

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.link.tell(trial.config["job"], "began")

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "steps_done" not in result:
            return  # the end of a trial of several processes, which repeats the last result
        where = result.get("where") or f"{result['node_ip']}, process {result['pid']}"
        news = where, result["steps_done"], result["loss"]
        self.link.tell(trial.config["job"], "step", *news)
        if result.get("checkpoint_path"):  # kept by Ray Train
            self.link.tell(trial.config["job"], "saved", result["steps_done"])

    def on_checkpoint(
        self, iteration: int, trials: Any, trial: Any, checkpoint: Any, **_: Any
    ) -> None:
        self.link.tell(trial.config["job"], "saved", trial.last_result["steps_done"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.link.tell(trial.config["job"], "lost", _why(trial))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        last = trial.last_result
        if last.get("error") is not None:
            self.link.tell(trial.config["job"], "failed", last["error"])
        elif last.get("done"):
            kept = trial.checkpoint.path if trial.checkpoint else last["checkpoint_path"]
            self.link.tell(trial.config["job"], "done", kept)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        error = DdmError(f"{_why(trial)}, more often than launch.retries")
        self.link.tell(trial.config["job"], "failed", error)


def _why(trial: Any) -> str:
    """Why a trial has failed, from what Tune has noted."""
    path = trial.error_file
    text = Path(path).read_text().strip() if path and Path(path).exists() else ""
    text = text.rpartition("Failure #")[2]  # of the last one
    last = text.splitlines()[-1] if text else "it failed"
    if re.search("[Aa]ctor (died|is dead|.* is unavailable)|(Died|Unavailable)Error", text):
        return f"its process died or its node was lost: {last}"
    return last


class _Stop(tune.Stopper):
    """Stops all trials after a signal."""

    def __init__(self, link: _Link) -> None:
        self.link = link

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.link.stopping()


def train_on_ray(config: Config, jobs: Sequence[Job], table: LiveTable) -> list[Exception | None]:
    """Train everything on a Ray cluster; returns what became of each. Artifacts are fetched as they are made.

    Raises `ConfigError` naming a key that does not fit the cluster, `RayStartError`, and `Stopped` after a signal.
    """
    url = config.launch.storage or str(config.folder / "ray")
    storage = Storage(url, config.folder.absolute().name)
    storage.check_writable()
    listener = Listener(config, jobs, table, storage)
    if config.expert.init is not None:  # which nodes cannot look for
        init = str(artifact_stem(config.expert.init))
        config = replace(config, expert=replace(config.expert, init=init))
    with stopping.deferred(), connected(config):
        claimed = claims(config)
        check_room(claimed, max(job.devices for job in jobs))
        check_shared(storage)
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        earlier = [path for job in jobs for path in storage.checkpoints(name_of(job))]
        resumed = {path.removeprefix(f"{storage.run}/").partition("/")[0] for path in earlier}
        began = {re.sub(r"(-ranks|_\d+)$", "", command) for command in resumed}  # have the inputs
        if config.launch.storage is None:  # the run's own, which no other command is at work on
            began.update(filter(_COMMAND.match, storage.entries()))
        listener.commands = {name, f"{name}-ranks", *resumed, *began}
        for job in jobs:
            if (signum := stopping.requested()) is not None:
                storage.clear(listener.commands)
                raise Stopped(signum, [])
            kept = kept_files(config.folder / job.folder)
            files = {inside(config, path): path for path in [*job.reads, *kept]}
            storage.put(files, f"{name}/inputs/{name_of(job)}")
        inputs = f"{storage.run}/{name}/inputs"
        threads = config.expert.threads or max(1, int(config.launch.cpus))
        where = (url, config.folder.absolute().name)
        work = Work(config, jobs, threads, where, inputs, claimed, _NEWS_S)
        is_client = ray.util.client.ray.is_connected()
        _fit(config, work, _Link(None if is_client else listener), storage, name, listener)
        storage.clear(listener.commands)
        if (signum := stopping.requested()) is not None:
            left = [i for i, result in enumerate(listener.results) if result is not None]
            raise Stopped(signum, [listener.saved[i] for i in left if listener.saved[i] > 0])
    if config.launch.storage is None:
        with contextlib.suppress(OSError):  # there are checkpoints
            (config.folder / "ray").rmdir()
    return listener.results


def _fit(
    config: Config, work: Work, link: _Link, storage: Storage, name: str, listener: Listener
) -> None:
    """Run the trials. Ray's memory monitor ends a process with an error that Tune does not know as a loss, and ends
    all: they begin again from their checkpoints, up to `launch.retries` times.
    """
    retries = config.launch.retries
    for attempt in range(retries + 1):
        of_attempt = f"{name}_{attempt}" if attempt else name  # in the order of their names
        listener.commands.add(of_attempt)
        left = sorted(listener.unfinished)
        try:
            with _relayed(link, listener):  # whose end leaves no news unheard
                _tuner(config, work, link, storage, of_attempt, left).fit()
            return
        except RuntimeError as error:
            ours = isinstance(error.__cause__, OutOfMemoryError)
            if not ours and OutOfMemoryError.__name__ not in str(error):  # from a cluster, as text
                raise
            for i in sorted(listener.unfinished):
                if attempt < retries:
                    if listener.where[i]:  # it has begun
                        listener.hear(i, "lost", "memory ran out on a node")
                else:
                    why = DdmError("memory ran out on a node, more often than launch.retries")
                    listener.hear(i, "failed", why)


def _tuner(
    config: Config, work: Work, link: _Link, storage: Storage, name: str, left: Sequence[int]
) -> tune.Tuner:
    """Trials of the jobs of these numbers."""
    claimed, at_once = work.claims, config.expert.workers or None
    kind: Any = Training
    if (devices := max(job.devices for job in work.jobs)) > 1:
        from train.ray_ranks import train_ranks as kind

        # Ray Train claims what its processes need: Tune must not start more trials than have room.
        room = processes_at_once(claimed) // devices
        # On the head: lost with a worker node, what it has placed would stay until the command ends.
        claimed, at_once = {"node:__internal_head__": 0.001}, min(at_once or room, room)
    trainable = tune.with_parameters(kind, work=work)
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([claimed])),
        param_space={"job": tune.grid_search(list(left))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: name_of(work.jobs[trial.config["job"]]),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage.run,
            storage_filesystem=storage.for_ray(),
            callbacks=[_Tell(link)],
            stop=_Stop(link),
            failure_config=tune.FailureConfig(max_failures=config.launch.retries),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT),
            verbose=0,
        ),
    )


@contextlib.contextmanager
def _relayed(link: _Link, listener: Listener) -> Iterator[None]:
    """Inside, a thread hands the news of a loop elsewhere to the listener, and signals to the loop."""
    over = threading.Event()
    news, stop = link.news, link.stop
    if news is None or stop is None:  # the loop is here
        yield
        return

    def relay() -> None:
        while True:
            ended = over.is_set()
            try:
                listener.hear(*news.get(block=not ended, timeout=_NEWS_S))
            except Empty:
                if ended:
                    return
            if stopping.requested() is not None and stop.empty():
                stop.put(True)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
