"""ddm serve RUN [key=value ...]          (in the checkout: python -m serve ...)

Serves a run's folder, a bundle's, or `demo`, the digits that come with the program, over HTTP on
127.0.0.1:8000: a page for people at /, the API at /docs. ctrl-C or SIGTERM lets requests under way
finish (serve.drain_s), a second one does not; SIGHUP loads new weights from the same folder.
Keys: serve.port=8123 serve.placement=ray serve.limits.n=16 sample.steps=50 (docs/serving.md).
"""

import logging
import os
import signal
import sys

from ddm_cli import check_packages

check_packages()  # before any of them is imported

from ddm.errors import ConfigError, DdmError  # noqa: E402


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status.

    0: done; 2: an error that the user can mend; 130: ctrl-C. Other errors are raised, and exit
    with status 1 and a traceback.
    """
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if hasattr(signal, "SIGHUP"):  # not on Windows
        # Before the imports below, which take seconds. `Server` handles it once it listens.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _serve(words)
    except (DdmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(words: list[str]) -> None:
    from serve.settings import settings

    runs = [word for word in words if "=" not in word]
    several = any(word.startswith("models") for word in words)
    if len(runs) != 1 and not (several and not runs):
        raise ConfigError(
            "give the folder of one run or bundle, such as runs/digits, or demo, and key=value words; "
            f"got {' '.join(runs) or 'none'}"
        )
    config = settings({"run": runs[0]} if runs else {}, [word for word in words if "=" in word])
    if config.serve.placement == "ray":
        if config.serve.ray.address is None:
            # No other switch keeps the ports of a Ray that is started here on this machine. It is
            # read when Ray is imported.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        from serve.ray_app.server import serve_on_ray

        serve_on_ray(config)
    else:
        from serve.http.local_server import serve_here

        serve_here(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
