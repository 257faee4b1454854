"""The lock of a run's folder: who is refused, by which words, and who is not."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from train.config import Config
from train.lock import LockedError, locked
from train.stages.run import run

_HOLD = """
import sys
from pathlib import Path
from train.lock import locked
run, *part = map(Path, sys.argv[1:])
with locked(run, *part):
    print("held", flush=True)
    sys.stdin.read()
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """`hold(run)`, `hold(run, part)`: another process that holds them until its input ends."""
    with ExitStack() as started:

        def begin(*folders: Path) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-c", _HOLD, *map(str, folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            started.enter_context(process)
            started.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return process

        yield begin


def test_the_second_process_on_a_run_is_told_who_is_there(tmp_path: Path, hold: Hold) -> None:
    holder = hold(tmp_path)
    words = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 20"
    for part in (None, tmp_path / "experts" / "00"):
        with pytest.raises(LockedError, match=words), locked(tmp_path, part):
            pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path, hold: Hold) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_experts_alone_share_a_run_but_not_an_expert(tmp_path: Path, hold: Hold) -> None:
    parts = [tmp_path / "experts" / f"{k:02d}" for k in range(3)]
    dead = hold(tmp_path, parts[0])
    dead.kill()
    dead.wait()
    holder = hold(tmp_path, parts[1])
    with locked(tmp_path, parts[2]):
        pass
    assert not parts[2].exists()
    with (
        pytest.raises(LockedError, match=f"01 is in use by process {holder.pid} on"),
        locked(tmp_path, parts[1]),
    ):
        pass
    with (
        pytest.raises(LockedError, match=f"{tmp_path} is in use by process {holder.pid} on"),
        locked(tmp_path),
    ):
        pass


def test_a_run_is_refused_before_its_first_output_and_sampling_is_not(
    tmp_path: Path, hold: Hold, small: Callable[..., Config]
) -> None:
    folder = tmp_path / "run"
    hold(folder)
    for stages in (["partition"], ["expert", "router"], ["evaluate"]):
        with pytest.raises(LockedError, match="wait for its end, stop it, or give run=FOLDER"):
            run(small(folder), stages)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with pytest.raises(Exception, match=r"manifest.json|bundle"):
        run(small(folder), ["sample"])


def test_what_ends_without_an_output_leaves_no_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", tmp_path / "a" / "b" / "experts" / "03"):
        pass
    assert not list(tmp_path.iterdir())
