"""A run that is killed or stopped, and started again, ends with the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddm.artifacts import sha256
from tests.conftest import SMALL

LONGER = [*SMALL, "expert.steps=60", "router.steps=60", "router.switch_step=6"]
KILLS = int(os.environ.get("DDM_KILLS", "3"))
OTHER_DISK = Path("/dev/shm")


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


def test_a_signal_saves_the_experts_of_all_workers(tmp_path: Path) -> None:
    rare = ("expert.checkpoint_every=100000", "expert.steps=100000", "expert.workers=2")
    process = _start(tmp_path, "partition", "expert", *rare)
    losses = [tmp_path / "experts" / f"{k:02d}" / "losses.txt" for k in (0, 1)]
    for path in losses:
        _wait_for(path, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT
    assert error.splitlines()[-1].startswith("stopped at step ")
    assert error.splitlines()[-1].count(",") == 1  # a step for each of the two
    for path in losses:
        assert path.with_name("resume.ckpt").exists()


DEFERRED = """
import time
from train import stopping
with stopping.on_signals(), stopping.deferred():
    print("ready", flush=True)
    while stopping.requested() is None:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(600)
"""


def test_the_second_signal_leaves_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEFERRED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT


def _made(folder: Path) -> dict[str, str]:
    """The hash of every file that a run to the stage `bundle` leaves, but for logs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"]
    shown = [path for path in files if not path.name.startswith(".") and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): sha256(path) for path in shown}


@pytest.mark.skipif(not OTHER_DISK.is_dir(), reason="needs a second file system")
def test_a_run_killed_again_and_again_makes_the_same_files(tmp_path: Path) -> None:
    """`DDM_KILLS=20` for more kills; TMPDIR is on another file system, so that nothing can be renamed from it."""
    words = ("partition", "expert", "router", "bundle", "expert.workers=2")
    longer = ("expert.steps=150", "router.steps=150", "expert.checkpoint_every=5")
    _finish(tmp_path / "whole", *words, *longer)
    cut = tmp_path / "cut"
    before = set(OTHER_DISK.iterdir())
    luck = random.Random(KILLS)
    kills = 0
    while kills < KILLS and not (cut / "bundle").exists():
        process = _start(cut, *words, *longer, TMPDIR=str(OTHER_DISK))
        _wait_for_a_change(cut, process)
        time.sleep(luck.uniform(0, 1.5))
        process.kill()
        process.communicate()
        kills += 1
    _finish(cut, *words, *longer, TMPDIR=str(OTHER_DISK))
    print(f"{kills} kills")
    assert _made(cut) == _made(tmp_path / "whole")
    assert set(OTHER_DISK.iterdir()) == before


def _wait_for_a_change(folder: Path, process: "subprocess.Popen[str]") -> None:
    started = time.time()
    while process.poll() is None:
        times = [path.lstat().st_mtime for path in folder.rglob("*.*") if path.exists()]
        if times and max(times) > started:
            return
        time.sleep(0.01)
