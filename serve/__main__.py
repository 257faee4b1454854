"""python -m serve RUN [key=value ...]

Serves a run's folder or a bundle's over HTTP on 127.0.0.1:8000: a page for people at /, the API at /docs. ctrl-C ends it;
SIGHUP looks for new weights in the same folder. Keys: serve.port=8123 serve.placement=ray serve.limits.n=16 sample.steps=50.
"""

import asyncio
import logging
import signal
import sys

import uvicorn

from ddm.errors import ConfigError, DdmError
from serve.api import build_app
from serve.config import Settings, settings
from serve.guard import Guard
from serve.metrics import Prometheus
from serve.service import Service

log = logging.getLogger("serve")


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        runs = [word for word in words if "=" not in word]
        if len(runs) != 1:
            raise ConfigError(f"give one run's folder or bundle, such as runs/digits, and key=value words; got {runs}")
        config = settings({"run": runs[0]}, [word for word in words if "=" in word])
        if config.serve.placement == "ray":
            from serve.deployments import serve_on_ray  # Ray takes seconds to import

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
    serve, token = config.serve, config.token()
    service = Service(config, Prometheus())

    def ready() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.append(loop.create_task(_reload(service))))
        log.info("http://%s:%d  (the API: /docs; ctrl-C ends it)", serve.host, serve.port)

    tasks: list[asyncio.Task[None]] = []
    app = Guard(build_app(service, ready), token, serve.limits.body_bytes, serve.limits.body_timeout_s)
    uvicorn.run(
        app,
        host=serve.host,
        port=serve.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
        server_header=False,
    )


async def _reload(service: Service) -> None:
    try:
        await service.switch(service.settings.run)
    except DdmError as error:
        log.error("the old weights stay: %s", error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
