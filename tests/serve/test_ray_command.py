"""`ddm serve RUN serve.placement=ray`: a Ray of its own, for as long as it serves."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.load.child import free_port
from benchmarks.load.client import Tally, closed
from serve import load
from serve.model.images import to_uint8


def session_processes(pid: int) -> str:
    """The processes of a session, a line each."""
    found = subprocess.run(
        ["pgrep", "-a", "-s", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout


def refused(run: Path, *words: str, **environment: str) -> str:
    """What `python -m serve` says when it exits with status 2 and leaves no process."""
    child = subprocess.Popen(
        [sys.executable, "-m", "serve", str(run), "serve.placement=ray", *words],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    _, said = child.communicate(timeout=120)
    assert child.returncode == 2, said
    assert session_processes(child.pid) == ""
    return said


def test_it_serves_from_a_hostile_folder_and_leaves_no_process(
    installed_ddm: Path, hostile: Path, small_run: Path
) -> None:
    port = free_port()
    run = os.path.relpath(small_run, hostile)
    child = subprocess.Popen(
        [installed_ddm, "serve", run, f"serve.port={port}", "serve.placement=ray"],
        cwd=hostile,
        env={**os.environ, "PYTHONPATH": "."},
        start_new_session=True,
        stderr=subprocess.PIPE,
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
        assert session_processes(child.pid) == ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def test_a_missing_run_is_refused_before_ray_starts(tmp_path: Path) -> None:
    said = refused(tmp_path / "none")
    assert str(tmp_path / "none") in said
    assert "starting Ray" not in said


def test_an_address_where_no_ray_answers_is_refused_by_its_key(small_run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert refused(small_run, f"serve.ray.address={address}") == (
            "error: serve.ray.address must be the HOST:PORT of a Ray cluster that answers, "
            f"got '{address}', which did not in 10 s\n"
        )


def test_a_port_in_use_is_refused_before_ray_starts(small_run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(small_run, f"serve.port={port}") == (
            "error: serve.host and serve.port must be a free address of this machine, "
            f"got 127.0.0.1 {port}: Address already in use\n"
        )


def test_a_ray_that_does_not_start_is_one_line(small_run: Path, tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 110)  # a Unix socket's path has at most 107 bytes
    too_long.mkdir()
    said = refused(small_run, f"serve.port={free_port()}", RAY_TMPDIR=str(too_long))
    assert said.splitlines()[-1].startswith("error: Ray did not start: ")
    assert "107 bytes" in said
    assert "Traceback" not in said
