"""`python -m serve RUN serve.placement=ray`: a Ray of its own, for as long as it serves."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.load.client import Tally, closed
from benchmarks.load.server import free_port
from serve import load
from serve.model.images import to_uint8


def test_the_command_serves_on_ray_of_its_own_and_leaves_no_process_behind(small_run: Path) -> None:
    port = free_port()
    words = [str(small_run), f"serve.port={port}", "serve.placement=ray"]
    child = subprocess.Popen(
        [sys.executable, "-m", "serve", *words], start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        tally, ends = Tally(), time.monotonic() + 180
        while not tally.replies or tally.replies[0].status != 200:
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < ends
            time.sleep(0.2)
            tally = asyncio.run(closed(f"http://127.0.0.1:{port}", 1, 1, {}))
        image = tally.replies[0].image
        assert image is not None
        assert (image == to_uint8(load(small_run).sample(1))[0, 0].numpy()).all()
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
        assert child.returncode in (0, 130)
        left = subprocess.run(
            ["pgrep", "-a", "-s", str(child.pid)], capture_output=True, text=True, check=False
        ).stdout
        assert left == ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def test_what_is_wrong_is_said_before_ray_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve", str(tmp_path / "none"), "serve.placement=ray"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "is not a folder" in done.stderr
