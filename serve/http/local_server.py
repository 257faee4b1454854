"""The HTTP server of placement `local`: uvicorn, with bounded connections and a drain at its end."""

import asyncio
import functools
import gc
import logging
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ddm.errors import ConfigError, DdmError
from serve.engine.metrics import Prometheus
from serve.engine.models import Models
from serve.http.app import build_app
from serve.http.limits import LimitsConfig
from serve.http.middleware import LimitsMiddleware
from serve.settings import Settings

log = logging.getLogger("serve")

_BACKLOG = 2048  # connections that the kernel keeps until they are accepted
_ACCEPTS = 64  # connections accepted at once
_RESERVED_FILES = 100  # file descriptors for everything that is not an open connection
_END_S = 5  # for the last answers to be read, when told to end

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


def serve_here(config: Settings) -> None:
    """Serve from this process until it is told to end. Raises `DdmError` and `OSError`."""
    serve, keys, metrics = config.serve, config.keys(), Prometheus()
    if "OMP_NUM_THREADS" not in os.environ:
        # A core for the event loop: it and the arithmetic would keep interrupting each other.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    with listen(serve.host, serve.port) as listener:
        models = Models(config, metrics)
        gc.freeze()  # the model stays: collections need not look at it again
        app = LimitsMiddleware(
            build_app(models),
            keys,
            serve.limits.body_bytes,
            serve.limits.body_timeout_s,
            serve.limits.upload_bytes,
            lambda kind: metrics.count("rejections", reason=kind),
            local=not serve.open,
        )
        most = min(serve.limits.connections, _open_files() - _RESERVED_FILES)
        # h11 bounds the headers of a request; there are no websockets.
        protocol: Any = functools.partial(Connection, serve.limits, max(1, most))
        server = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_level="warning",
            server_header=False,
            backlog=_ACCEPTS,
            timeout_keep_alive=serve.limits.keep_alive_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=_END_S,
        )
        Server(models, server).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `ConfigError` if the address is not free."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it would allow two servers on one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)  # now: two sockets may be bound to a port, but not listen
    except OSError as error:
        listener.close()
        raise ConfigError(
            "serve.host and serve.port must be a free address of this machine, "
            f"got {host} {port}: {error.strerror or error}"
        ) from error
    return listener


def _open_files() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 2**31
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if limit == resource.RLIM_INFINITY else limit


class Connection(H11Protocol):
    """One connection. What the client must do has a deadline, and their number is bounded.

    limits: `header_timeout_s` from accepting, or from the first byte of a later request, to the
    end of the headers; `send_timeout_s` for the client to read what waits to be sent.
    most: connections; beyond it the one that has been idle for longest is closed, or the new
    one is answered with 503 if none is idle.
    """

    def __init__(self, limits: LimitsConfig, most: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits, self.most = limits, most
        self.idle_since = 0.0
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._await_headers()
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._stop_header_timer()
        elif self._header_timer is None and not self.transport.is_closing():
            self._await_headers()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # `close` would wait for the client to read
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_headers(self) -> None:
        timeout_s = self.limits.header_timeout_s
        self._header_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _make_room(self) -> None:
        others = [
            each
            for each in self.connections
            if isinstance(each, Connection) and not each.transport.is_closing() and each is not self
        ]
        if len(others) < self.most:
            return
        idle = min((each for each in others if each.idle), key=_idle_since, default=None)
        if idle is not None:
            idle.transport.abort()
        else:
            self.transport.write(_FULL)
            self.transport.close()


def _idle_since(connection: Connection) -> float:
    return connection.idle_since


class Server(uvicorn.Server):
    """uvicorn's server, with a service: SIGHUP switches its weights, the end drains its requests.

    The first SIGTERM or ctrl-C: new requests get 503, those under way have `serve.drain_s`.
    The second: the end.
    """

    def __init__(self, models: Models, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.models = models
        self.drain_s = models.settings.serve.drain_s
        self._drain_until: float | None = None
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            sys.exit(1)  # uvicorn has logged the traceback, and its own status would be 3
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # uvicorn made it _ACCEPTS
        if hasattr(signal, "SIGHUP"):  # not on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start_reload)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("http://%s  (the API: /docs; ctrl-C ends it)", address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called on SIGTERM and SIGINT."""
        self._captured_signals.append(sig)  # uvicorn raises them again at the end
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self.drain_s
            self.models.drain()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to end."""
        leave = await super().on_tick(counter)
        if self._drain_until is None:
            return leave
        return leave or not self.server_state.tasks or time.monotonic() >= self._drain_until

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.models.stop()  # requests under way end with an error
        await super().shutdown(sockets)

    def _start_reload(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self.models.reload()
        except (DdmError, OSError) as error:
            log.error("the old weights stay: %s", error)
