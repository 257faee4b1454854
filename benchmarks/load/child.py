"""`python -m serve` as a child process."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.load.client import Tally, closed
from ddm.errors import DdmError


def free_port() -> int:
    """A free port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(run: str, *words: str, within_s: float = 180) -> Iterator[tuple[str, float]]:
    """A child process `python -m serve`: its address, and the seconds from its start to its first
    image.

    Raises `DdmError` if it does not start in time.
    """
    port = free_port()
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "serve", run, f"serve.port={port}", *words])
    try:
        first = Tally()
        while not first.replies or first.replies[0].status != 200:
            if child.poll() is not None or time.perf_counter() - started > within_s:
                raise DdmError(f"the server did not start within {within_s:g} s; its log is above")
            time.sleep(0.1)
            first = asyncio.run(closed(url, 1, 1, {}))
        yield url, time.perf_counter() - started
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)
