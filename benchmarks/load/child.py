"""`python -m serve` as a child process."""

import asyncio
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from benchmarks.load.client import Tally, closed
from ddm.errors import DdmError


def free_port() -> int:
    """A free port on 127.0.0.1, below those that the system gives to connections meanwhile."""
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


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
