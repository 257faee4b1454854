"""python -m serve RUN [key=value ...]

Serves a run's folder or a bundle's over HTTP on 127.0.0.1:8000: a page for people at /, the API at /docs. ctrl-C ends it;
SIGHUP looks for new weights in the same folder. Keys: serve.port=8123 serve.placement=ray serve.limits.n=16 sample.steps=50.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import torch
import uvicorn

from ddm.errors import ConfigError, DdmError
from serve.engine.metrics import Prometheus
from serve.engine.service import Service
from serve.http.app import build_app
from serve.http.middleware import LimitsMiddleware
from serve.settings import Settings, settings

log = logging.getLogger("serve")

_GRACE_S = 3.0  # for requests under way, when told to end


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 0, 2 where the user can mend what went wrong, 130 after ctrl-C."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        runs = [word for word in words if "=" not in word]
        if len(runs) != 1:
            raise ConfigError(
                f"give one run's folder or bundle, such as runs/digits, and key=value words; got {runs}"
            )
        config = settings({"run": runs[0]}, [word for word in words if "=" in word])
        if config.serve.placement == "ray":
            from serve.ray_app import serve_on_ray  # Ray takes seconds to import

            serve_on_ray(config)
        else:
            serve_here(config)
    except DdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def serve_here(config: Settings) -> None:
    """Serve from this process, until it is told to end."""
    serve, token, metrics = config.serve, config.token(), Prometheus()
    if (
        "OMP_NUM_THREADS" not in os.environ
    ):  # a core is left for the loop; without one they stop each other all the time
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    with _bound(
        serve.host, serve.port
    ) as listening:  # first, so that a port that is taken is said at once
        service = Service(config, metrics)
        gc.freeze()  # what is here now stays: collections need not look at it again
        app = LimitsMiddleware(
            build_app(service),
            token,
            serve.limits.body_bytes,
            serve.limits.body_timeout_s,
            lambda kind: metrics.count("rejections", reason=kind),
        )
        # h11 bounds the headers of a request; there are no websockets.
        _Server(
            service,
            uvicorn.Config(app, http="h11", ws="none", log_level="warning", server_header=False),
        ).run([listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens once uvicorn says so. Raises `ConfigError` where the address is not to be had."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(
            f"serve.host and serve.port must be a free address of this machine, got {host} {port}: {error.strerror}"
        ) from error
    return found


class _Server(uvicorn.Server):
    """uvicorn's, with a service: says where it listens, takes SIGHUP, and does not wait for long requests at its end."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.service, self.tasks = service, set[asyncio.Task[None]]()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._spawn, self._reload)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("http://%s  (the API: /docs; ctrl-C ends it)", address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._spawn(self._end)
        await super().shutdown(sockets)

    def _spawn(self, what: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(what())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _reload(self) -> None:
        try:
            await self.service.switch(self.service.settings.run)
        except DdmError as error:
            log.error("the old weights stay: %s", error)

    async def _end(self) -> None:
        """Requests under way have a while, then they are told: this frees uvicorn, which waits for them."""
        await asyncio.sleep(_GRACE_S)
        await self.service.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
