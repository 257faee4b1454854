"""A run that is killed or stopped, and started again, ends with the same bytes.

Each process of training, and each of its workers, is forked from one that has imported Lightning
and scikit-learn, which takes longer than the training itself. `test_launch.py` tests how workers
are started otherwise.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ddm.artifacts import sha256
from tests.conftest import PRELOADED, SMALL
from train import stopping
from train.launch import _serve as launch_serve
from train.resume import ResumeFiles

LONGER = [
    *SMALL,
    "partition.k=2",
    "expert.steps=40",
    "router.steps=40",
    "router.switch_step=6",
]
STAGES = ("partition", "expert", "router", "bundle")
KILLS = int(os.environ.get("DDM_KILLS", "2"))
OTHER_DISK = Path("/dev/shm")

Start = Callable[..., "Training"]


class Training:
    """A process, and what it writes to standard error."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process = process
        self.log = log

    def is_running(self) -> bool:
        return self.process.exitcode is None

    def send(self, signum: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def status(self) -> int:
        """Wait for the end; the exit status, or -N for a process that signal N has killed."""
        self.process.join(600)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def error(self) -> str:
        """Standard error."""
        return self.log.read_text()

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.is_running(), f"it ended too early: {self.error()}"
            time.sleep(0.002)

    def finish(self) -> None:
        assert self.status() == 0, self.error()
        assert "Traceback" not in self.error()


def _forked(
    address: str,
    log: Path,
    temporary: Path | None,
    once_saved: tuple[Path, signal.Signals] | None,
    words: list[str],
) -> None:
    """The main function of a process: as the command `python -m train`."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    # Under `nohup`, as CI may be, children inherit that SIGHUP is ignored, and so would training.
    for signum in stopping.SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    if temporary is not None:
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None
    torch.set_num_threads(1)
    if words:
        from train.__main__ import main

        _fork_workers_too(address)
        if once_saved is not None:
            saving = _saving_then(*once_saved)
            mock.patch.object(ResumeFiles, "save_checkpoint", saving).start()
        sys.exit(main(words))
    _stay()


def _saving_then(checkpoint: Path, signum: signal.Signals) -> Callable[..., None]:
    """`ResumeFiles.save_checkpoint`, and a signal once this checkpoint is there: from outside it may come too late."""
    save = ResumeFiles.save_checkpoint

    def save_checkpoint(
        self: ResumeFiles, saved: Any, path: Any, *given: Any, **named: Any
    ) -> None:
        before = checkpoint.exists()
        save(self, saved, path, *given, **named)
        if checkpoint.exists() and not before:
            os.kill(os.getpid(), signum)

    return save_checkpoint


def _fork_workers_too(address: str) -> None:
    """Let the workers of this process come from the server that it was forked from itself."""
    server = forkserver._forkserver
    server._forkserver_address = address
    server.ensure_running = lambda: None
    context = multiprocessing.get_context("forkserver")
    mock.patch("multiprocessing.get_context", return_value=context).start()
    mock.patch("train.launch._serve", partial(_served, address)).start()


def _served(address: str, *given: Any) -> None:
    """The main function of a worker, whose ranks come from the same server, too."""
    _fork_workers_too(address)
    launch_serve(*given)


def _stay() -> None:
    """Be asked to stop inside `deferred`, and do not: only the second signal ends this."""
    with stopping.on_signals(), stopping.deferred():
        print("ready", file=sys.stderr, flush=True)
        while stopping.requested() is None:
            time.sleep(0.01)
        print("asked", file=sys.stderr, flush=True)
        time.sleep(600)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start(folder, *words, temporary=None, once_saved=None)`: a process that trains; without a folder, `_stay`.

    `once_saved=(checkpoint, signum)`: it gets this signal as soon as this file is there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    logs = tmp_path_factory.mktemp("logs")
    started: list[Training] = []

    def begin(
        folder: Path | None,
        *words: str,
        temporary: Path | None = None,
        once_saved: tuple[Path, signal.Signals] | None = None,
    ) -> Training:
        log = logs / f"{len(started)}.txt"
        log.touch()
        command = [] if folder is None else [*LONGER, f"run={folder}", *words]
        address = forkserver._forkserver._forkserver_address
        process = context.Process(
            target=_forked, args=(address, log, temporary, once_saved, command)
        )
        process.start()
        started.append(Training(process, log))
        return started[-1]

    yield begin
    for training in started:
        training.process.kill()
        training.process.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Path:
    """A run to the stage `bundle` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, *STAGES).finish()
    return folder


@pytest.mark.parametrize(
    ("stage", "checkpoint", "made", "signum"),
    [
        ("expert", "experts/01/resume.ckpt", "experts/01/expert.safetensors", signal.SIGTERM),
        ("router", "router/stage-2/resume.ckpt", "router/router.safetensors", signal.SIGHUP),
    ],
)
def test_a_killed_and_a_stopped_run_resume_to_bit_identical_weights(
    tmp_path: Path,
    start: Start,
    whole: Path,
    stage: str,
    checkpoint: str,
    made: str,
    signum: signal.Signals,
) -> None:
    words = (stage, "expert.index=1")
    shutil.copytree(whole / "partition", tmp_path / "partition")
    saved = tmp_path / checkpoint

    killed = start(tmp_path, *words, once_saved=(saved, signal.SIGKILL))
    assert killed.status() == -signal.SIGKILL

    saved.rename(saved.with_name("resume.previous.ckpt"))
    stopped = start(tmp_path, *words, once_saved=(saved, signum))
    assert stopped.status() == 128 + signum
    assert saved.exists() and not (tmp_path / made).exists()
    assert stopped.error().splitlines()[-1].startswith("stopped at step ")
    assert "Traceback" not in stopped.error()

    start(tmp_path, *words).finish()
    assert sha256(tmp_path / made) == sha256(whole / made)
    left = [tmp_path / checkpoint] if stage == "expert" else []  # to go on to more steps from
    assert list(tmp_path.rglob("resume*")) == left


def test_ctrl_c_saves_the_experts_of_all_workers(tmp_path: Path, start: Start, whole: Path) -> None:
    shutil.copytree(whole / "partition", tmp_path / "partition")
    rarely = ("expert.checkpoint_every=20000", "expert.steps=20000", "expert.workers=2")
    training = start(tmp_path, "expert", *rarely)
    folders = [tmp_path / "experts" / f"{k:02d}" for k in (0, 1)]
    for folder in folders:
        training.wait_for(folder / "losses.txt")
    training.send(signal.SIGINT)
    assert training.status() == 128 + signal.SIGINT
    words = training.error().splitlines()[-1].split(";")[0]
    assert words.startswith("stopped at step ")
    steps = [int(step) for step in words.removeprefix("stopped at step ").split(", ")]
    assert len(steps) == 2
    saved = [torch.load(folder / "resume.ckpt", weights_only=True) for folder in folders]
    assert sorted(checkpoint["global_step"] for checkpoint in saved) == sorted(steps)


@pytest.mark.parametrize("words", [["expert.index=1"], ["expert.workers=1"]])
def test_ctrl_c_saves_an_expert_that_two_processes_train(
    tmp_path: Path, start: Start, whole: Path, words: list[str]
) -> None:
    shutil.copytree(whole / "partition", tmp_path / "partition")
    rarely = ("expert.checkpoint_every=20000", "expert.steps=20000", "expert.devices=2")
    training = start(tmp_path, "expert", *rarely, *words)
    folder = tmp_path / "experts" / ("01" if "expert.index=1" in words else "00")
    training.wait_for(folder / "losses.txt")
    training.send(signal.SIGINT)
    assert training.status() == 128 + signal.SIGINT
    step = torch.load(folder / "resume.ckpt", weights_only=True)["global_step"]
    assert "Traceback" not in training.error()
    said = training.error().splitlines()[-1]
    assert said == f"stopped at step {step}; the same command resumes"


def test_the_second_signal_leaves_at_once_even_where_signals_are_deferred(start: Start) -> None:
    training = start(None)

    def wait_for_word(word: str) -> None:
        while word not in training.error():
            assert training.is_running()
            time.sleep(0.002)

    wait_for_word("ready")
    training.send(signal.SIGTERM)
    wait_for_word("asked")
    training.send(signal.SIGHUP)  # which a closed terminal sends several times
    training.send(signal.SIGINT)
    assert training.status() == 128 + signal.SIGINT


def _artifacts(folder: Path) -> dict[str, str]:
    """The hash of every file that a run to the stage `bundle` leaves, but for logs and scratch."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [
        path
        for path in files
        if path.suffix not in (".txt", ".ckpt")  # pickling writes the same in several ways
        and path.name not in ("config.yaml", "history.json", "README.md", "time.json")  # of times
        and not path.name.startswith(".")
    ]
    return {str(path.relative_to(folder)): sha256(path) for path in kept}


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another file system, from which nothing can be renamed into a run's folder."""
    if not OTHER_DISK.is_dir():
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=OTHER_DISK) as folder:
        yield Path(folder)


def test_a_run_killed_again_and_again_makes_the_same_files(
    tmp_path: Path, start: Start, whole: Path, other_disk: Path
) -> None:
    """`DDM_KILLS=20` kills it more often (with `-o faulthandler_timeout=0`); a run that ends before that is compared
    and begun anew.
    """
    expected = _artifacts(whole)
    delays = random.Random(KILLS)
    kills = 0
    runs = 0
    folder = tmp_path / "0"
    while True:
        began = time.time()
        training = start(folder, *STAGES, "expert.workers=2", temporary=other_disk)
        if kills < KILLS:
            _wait_for_a_change(folder, training, began)
            time.sleep(delays.uniform(0, 1.5))
            with suppress(ProcessLookupError):  # it has just ended
                training.send(signal.SIGKILL)
        status = training.status()
        if status == -signal.SIGKILL:
            kills += 1
            continue
        training.finish()
        assert _artifacts(folder) == expected
        runs += 1
        if kills == KILLS:
            break
        folder = tmp_path / str(runs)
    print(f"{kills} kills, {runs} runs, {len(expected)} files the same in each")
    assert not list(other_disk.iterdir())


def _wait_for_a_change(folder: Path, training: Training, since: float) -> None:
    """Wait until a file in the folder is changed, or the process has ended."""
    while training.is_running():
        if any(_changed(path) > since for path in folder.rglob("*")):
            return
        time.sleep(0.01)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
