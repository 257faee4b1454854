"""Artifacts: tensors in safetensors, facts in JSON, SHA-256 over both.

`STEM.json` holds the facts and the hash of `STEM.safetensors`, so the hash of the JSON covers the
weights as well. Files are written whole or not at all, also by concurrent processes. Nothing is
ever unpickled.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddm.errors import ArtifactError, shown

_MAX_JSON_BYTES = 4 * 2**20  # also of a safetensors header; parsed JSON can take 30 times as much
_MAX_FACTS_BYTES = 2**15  # of one artifact
_STALE_S = (
    3600.0  # a scratch file that nobody has written to for so long belongs to a killed process
)
_SHA256 = re.compile("[0-9a-f]{64}")


class Layout(NamedTuple):
    """A tensor as a safetensors header describes it: dtype (`F32`, `U8` ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`; the file that the block writes there replaces `path`.

    The scratch name is unique to the process and the call. When the block ends, the file is flushed
    to disk, renamed, and the folder is flushed; when it raises, the scratch file is removed and
    `path` stays as it was.

    Raises `ArtifactError` naming `path` if the operating system refuses.
    """
    scratch = scratch_beside(path)
    try:
        yield scratch
        with naming(path, "written"):
            flush(scratch)
            scratch.replace(path)
            flush(path.parent)
    except OSError as error:
        if error.filename not in (None, str(scratch)):
            raise
        _refuse(path, "written", error)
    finally:
        scratch.unlink(missing_ok=True)


def scratch_beside(path: Path) -> Path:
    """A new name in the folder of `path`, which is created; scratch of killed processes is removed.

    Raises `ArtifactError` naming `path` if the operating system refuses.
    """
    prefix = scratch_prefix(path)
    with naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.iterdir():
            if left.name.startswith(prefix) and left.suffix == ".part":
                _remove_stale(left)
    return path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.part")


def scratch_prefix(path: Path) -> str:
    """What the names of scratch files of `path` begin with."""
    name = path.name
    if len(name) > 40:  # names have at most 255 bytes
        name = f"{name[:31]}-{digest(name)[:8]}"
    return f".{name}."


def _remove_stale(scratch: Path) -> None:
    try:
        idle_s = time.time() - scratch.lstat().st_mtime
    except FileNotFoundError:  # its process has renamed it
        return
    if idle_s < _STALE_S:
        return
    if scratch.is_dir():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file or a folder's list of names to disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """An `OSError` becomes an `ArtifactError` naming the file; `what`: "read" or "written"."""
    try:
        yield
    except OSError as error:
        _refuse(path, what, error)


def _refuse(path: Path, what: str, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError) and what == "read":
        raise ArtifactError(f"{path} is missing") from error
    raise ArtifactError(f"{path} cannot be {what}: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, open for reading.

    A fifo or a device is never opened, because that may wait for ever.

    Raises `ArtifactError` naming the file that is missing, not a regular one, or cannot be read.
    """
    check_is_file(path)
    with naming(path, "read"), path.open("rb") as file:
        yield file


def check_is_file(path: Path) -> None:
    """Raise `ArtifactError` unless there is a regular file at `path`."""
    with naming(path, "read"):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a fifo, a socket or a device"
        raise ArtifactError(f"{path} must be a file, but it is {kind}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises `ArtifactError` naming a file that cannot be read."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_sha256(path: Path, expected: str) -> None:
    """Raise `ArtifactError` naming the file unless it has that SHA-256."""
    _compare(path, sha256(path), expected)


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(
            f"{path} is damaged or foreign: its SHA-256 is {found}, expected {expected}"
        )


def digest(facts: Any) -> str:
    """The SHA-256 of plain data (its JSON with sorted keys), in hex."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write plain data, whole or not at all.

    Raises `ArtifactError`; `ValueError` for NaN and infinities.
    """
    text = json.dumps(facts, indent=1, allow_nan=False)
    with replaced(path) as scratch:
        scratch.write_text(text + "\n")


def read_json(
    path: Path, expected_sha256: str | None = None, max_bytes: int = _MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object; `expected_sha256=None` means no check.

    Raises `ArtifactError` naming the file that cannot be read, is not JSON, holds anything but an
    object, or holds a number that is not finite or above 64 bits.
    """
    with _opened(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ArtifactError(f"{path} must hold at most {max_bytes} bytes of JSON")
    if expected_sha256 is not None:
        _compare(path, hashlib.sha256(content).hexdigest(), expected_sha256)
    try:
        facts = json.loads(
            content, parse_float=_finite, parse_constant=_finite, parse_int=_within_64_bits
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON ({str(error)[:300]})") from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path} must hold a JSON object, got {shown(facts)}")
    return facts


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value


def _within_64_bits(digits: str) -> int:
    value = int(digits)
    if abs(value) >= 2**64:
        raise ValueError(f"{shown(digits)} is not a number of 64 bits")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole or not at all.

    Raises `ArtifactError` naming a file that cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as scratch:
        try:
            save_file(plain, scratch)
        except SafetensorError as error:
            raise ArtifactError(f"{path} cannot be written: {error}") from error


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read tensors; `expected_sha256=None` means no check.

    Raises `ArtifactError` naming the file that cannot be read, is damaged, or is not the one
    expected.
    """
    _check_header(path)
    if expected_sha256 is not None:
        check_sha256(path, expected_sha256)
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise _not_safetensors(path, error) from error


def read_layout(path: Path) -> dict[str, Layout]:
    """The dtypes and shapes that the header of a safetensors file lists; no tensor is read.

    Raises `ArtifactError` naming the file that cannot be read or is damaged.
    """
    _check_header(path)
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Layout(part.get_dtype(), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise _not_safetensors(path, error) from error


def _check_header(path: Path) -> None:
    """Refuse a header so long that parsing it would take more memory than an artifact should."""
    with _opened(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MAX_JSON_BYTES:
        raise _not_safetensors(path, f"its header is said to have {size} bytes")


def _not_safetensors(path: Path, reason: object) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: it is not a safetensors file ({str(reason)[:300]})")


def file_of(stem: Path, suffix: str) -> Path:
    """`STEM` + `suffix`; a stem may contain dots."""
    return stem.with_name(stem.name + suffix)


def write_artifact(stem: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write `STEM.safetensors`, then `STEM.json` with the facts and the hash.

    An artifact that has its JSON is complete.

    Raises `ArtifactError` naming a file that cannot be written.
    """
    weights = file_of(stem, ".safetensors")
    write_tensors(weights, tensors)
    write_json(file_of(stem, ".json"), {**facts, "sha256": sha256(weights)})


def read_facts(stem: Path, expected_sha256: str | None = None) -> dict[str, Any]:
    """The facts of an artifact, with the hash of its weights as `sha256`.

    `expected_sha256` is the hash of the JSON itself; None means no check.

    Raises `ArtifactError` naming the file.
    """
    path = file_of(stem, ".json")
    facts = read_json(path, expected_sha256, _MAX_FACTS_BYTES)
    if not is_sha256(facts.get("sha256")):
        raise ArtifactError(
            f"{path} is not the description of an artifact: "
            f"sha256 must be 64 hex digits, got {shown(facts.get('sha256'))}"
        )
    return facts


def read_artifact(
    stem: Path, expected_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of an artifact; `expected_sha256` is that of its JSON.

    Raises `ArtifactError` naming the file, the hash found and the hash expected.
    """
    facts = read_facts(stem, expected_sha256)
    return read_tensors(file_of(stem, ".safetensors"), facts["sha256"]), facts
