"""One process at a time on a run's folder; another one is refused, and told who is there.

The operating system holds the lock (`flock`) and drops it when its process ends, however that
ends: the lock of a dead process is taken over. The file `.lock` says who holds it.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ddm.artifacts import naming
from ddm.errors import DdmError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = ".lock"


class LockedError(DdmError):
    """Another process works on the folder."""


@contextmanager
def locked(run: Path, part: Path | None = None) -> Iterator[None]:
    """Hold a run's folder; with `part`, only that folder in it: beside the holders of other parts.

    The folders are created; those that are still empty at the end are removed. A folder that this
    process may not write to needs no lock. Raises `LockedError` naming the process that holds it.
    """
    with ExitStack() as held:
        held.enter_context(_held(run, shared=part is not None))
        if part is not None:
            held.enter_context(_held(part, shared=False))
        yield


@contextmanager
def _held(folder: Path, shared: bool) -> Iterator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    with naming(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = _locked_file(path, shared) if fcntl and os.access(folder, os.W_OK) else None
    try:
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor)
        for path in created:
            with suppress(OSError):  # it is in use
                path.rmdir()


def _locked_file(path: Path, shared: bool) -> int | None:
    """The descriptor of the locked file; None where the file system has no locks."""
    while True:
        with naming(path, "written"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LockedError(
                f"{path.parent} is in use by {_holder(path)}: wait for its end, stop it, or give "
                "run=FOLDER for another run"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s)", path, error.strerror)
            os.close(descriptor)
            return None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # its last holder has just removed it
    os.ftruncate(descriptor, 0)
    if not shared:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.write(descriptor, json.dumps(me).encode())
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):  # the others that share it go on
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _holder(path: Path) -> str:
    """Who holds a lock that is held: its file says so, or, where it is shared, those of the parts."""
    parts = [file for file in sorted(path.parent.glob(f"*/*/{NAME}")) if _is_held(file)]
    for file in (path, *parts):
        with suppress(OSError, ValueError, KeyError, TypeError):
            who = json.loads(file.read_text())
            return f"process {who['pid']} on {who['host']} since {who['since']}"
    return "another process"


def _is_held(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
