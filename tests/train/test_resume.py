"""A run killed with SIGKILL and started again ends with the same bits."""

import os
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


def _command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "train", *words, *LONGER, f"run={folder}"]


@pytest.mark.parametrize(
    ("stage", "checkpoint", "made"),
    [
        ("expert", "experts/01/resume.ckpt", "experts/01/expert.safetensors"),
        ("router", "router/stage-2/resume.ckpt", "router/router.safetensors"),
    ],
)
def test_a_killed_run_resumes_to_bit_identical_weights(
    tmp_path: Path, stage: str, checkpoint: str, made: str
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("partition", stage, "expert.index=1")
    subprocess.run(_command(whole, *words), check=True, env=environment, capture_output=True)
    shutil.copytree(whole / "partition", cut / "partition")

    process = subprocess.Popen(
        _command(cut, *words), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (cut / checkpoint).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / made).exists(), "it ended before it was killed"

    again = subprocess.run(
        _command(cut, *words), check=True, env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in again.stderr
    assert sha256(cut / made) == sha256(whole / made)
