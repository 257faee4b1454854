"""A run that is killed or stopped, and started again, ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddm.artifacts import sha256
from tests.conftest import SMALL
from train.stopping import SIGNALS

LONGER = [*SMALL, "expert.steps=60", "router.steps=400", "router.switch_step=6"]


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Under `nohup`, as CI may be, children inherit that SIGHUP is ignored, and so would training."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if handler is signal.SIG_IGN else handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def _command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "train", *LONGER, f"run={folder}", *words]


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def _start(folder: Path, *words: str, **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        _command(folder, *words),
        env=_environment(**more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.005)


def _finish(folder: Path, *words: str, **more: str) -> str:
    """Run to the end; returns standard error."""
    process = _start(folder, *words, **more)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("stage", "checkpoint", "made", "signum"),
    [
        ("expert", "experts/01/resume.ckpt", "experts/01/expert.safetensors", signal.SIGTERM),
        ("router", "router/stage-2/resume.ckpt", "router/router.safetensors", signal.SIGHUP),
    ],
)
def test_a_killed_and_a_stopped_run_resume_to_bit_identical_weights(
    tmp_path: Path, stage: str, checkpoint: str, made: str, signum: signal.Signals
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("partition", stage, "expert.index=1")
    _finish(whole, *words)
    shutil.copytree(whole / "partition", cut / "partition")

    process = _start(cut, *words)
    _wait_for(cut / checkpoint, process)
    process.kill()
    process.communicate()

    (cut / checkpoint).rename(cut / "kept")
    (cut / "kept").rename((cut / checkpoint).with_name("resume.previous.ckpt"))
    process = _start(cut, *words)
    _wait_for(cut / checkpoint, process)
    process.send_signal(signum)
    error = process.communicate()[1]
    assert not (cut / made).exists(), "it ended before it was stopped"
    assert process.returncode == 128 + signum
    assert error.splitlines()[-1].startswith("stopped at step ")
    assert "Traceback" not in error

    _finish(cut, *words)
    assert sha256(cut / made) == sha256(whole / made)
    assert not list(cut.rglob("resume*"))
