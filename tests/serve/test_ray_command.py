"""`ddm serve RUN serve.placement=ray`: a Ray of its own, for as long as it serves."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from benchmarks.load.child import free_port
from benchmarks.load.client import Tally, closed
from serve import load
from serve.__main__ import main
from serve.model.images import to_uint8
from serve.ray_app import server

# Without what other tests in this process set for their own clusters.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def session_processes(pid: int) -> str:
    """The processes of a session, a line each."""
    found = subprocess.run(
        ["pgrep", "-a", "-s", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout


def test_it_serves_from_a_hostile_folder_and_leaves_no_process(
    installed_ddm: Path, hostile: Path, small_run: Path
) -> None:
    port = free_port()
    run = os.path.relpath(small_run, hostile)
    child = subprocess.Popen(
        [installed_ddm, "serve", run, f"serve.port={port}", "serve.placement=ray"],
        cwd=hostile,
        env={**ENVIRONMENT, "PYTHONPATH": "."},
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
        child.communicate(timeout=120)
        assert child.returncode in (0, 130)
        ends = time.monotonic() + 60
        while session_processes(child.pid) and time.monotonic() < ends:  # Ray kills without waiting
            time.sleep(0.2)
        assert session_processes(child.pid) == ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """`refused(run, *words)`: what the command says as it refuses before it starts Ray."""
    monkeypatch.setattr("serve.ray_address._ANSWER_S", 0.5)
    before = signal.getsignal(signal.SIGHUP)

    def said(run: Path, *words: str) -> str:
        assert main([str(run), "serve.placement=ray", *words]) == 2
        return capsys.readouterr().err

    yield said
    signal.signal(signal.SIGHUP, before)
    assert not ray.is_initialized()


def test_a_missing_run_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(tmp_path / "none")


def test_an_address_where_no_ray_answers_is_refused_by_its_key(
    refused: Callable[..., str], small_run: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert refused(small_run, f"serve.ray.address={address}") == (
            "error: serve.ray.address must be the HOST:PORT of a Ray cluster that answers, "
            f"got '{address}', which did not in 0.5 s\n"
        )


def test_a_port_in_use_is_refused(refused: Callable[..., str], small_run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(small_run, f"serve.port={port}") == (
            "error: serve.host and serve.port must be a free address of this machine, "
            f"got 127.0.0.1 {port}: Address already in use\n"
        )


def test_a_cluster_that_serves_an_application_of_the_name_is_refused(
    refused: Callable[..., str], small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = SimpleNamespace(applications={"ddm": "RUNNING"})
    monkeypatch.setattr(server, "check_ray_answers", lambda *_: None)
    monkeypatch.setattr(server, "_ray", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        server, "ray_serve", SimpleNamespace(start=lambda **_: None, status=lambda: status)
    )
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    said = refused(small_run, "serve.ray.address=auto")
    assert (
        "serve.ray.address must be a cluster that serves no application 'ddm' yet, got 'auto'"
        in said
    )
    for number, handler in signals.items():
        signal.signal(number, handler)


def test_ctrl_c_ends_it_while_it_starts(
    installed_ddm: Path, hostile: Path, small_run: Path
) -> None:
    """Where no GPU is that its experts claim, Serve waits for ever."""
    words = [f"serve.port={free_port()}", "serve.placement=ray", "serve.ray.gpus=1"]
    child = subprocess.Popen(
        [installed_ddm, "serve", os.path.relpath(small_run, hostile), *words],
        cwd=hostile,
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        ends = time.monotonic() + 180
        while "ServeController" not in session_processes(child.pid) and time.monotonic() < ends:
            time.sleep(0.2)
        time.sleep(3)
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def test_a_ray_that_does_not_start_is_one_line(small_run: Path, tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 110)  # a Unix socket's path has at most 107 bytes
    too_long.mkdir()
    words = [str(small_run), "serve.placement=ray", f"serve.port={free_port()}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "serve", *words],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "RAY_TMPDIR": str(too_long)},
    )
    _, said = child.communicate(timeout=120)
    assert child.returncode == 2, said
    assert session_processes(child.pid) == ""
    assert said.splitlines()[-1].startswith("error: Ray did not start: ")
    assert "107 bytes" in said
    assert "Traceback" not in said
