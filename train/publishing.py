"""Bundles at any URL of fsspec: pushed whole, pulled with every hash checked."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from fsspec.core import url_to_fs

from ddm.artifacts import check_sha256, file_of, naming, read_facts, replaced, sha256
from ddm.bundle import CARD, MANIFEST, listed_artifacts, read_bundle, signature_of
from ddm.bundle_history import HISTORY
from ddm.errors import ArtifactError, ConfigError, DdmError, require
from serve.model.signatures import check_signed

log = logging.getLogger(__name__)

# Where a file that is being written can be seen half written; object stores show whole ones alone.
_IN_PLACE = {"file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs"}
_CHUNK = 2**20
_SMALL = 2**22  # bytes, of a JSON, a card or a signature


def push(folder: Path, url: str) -> str:
    """Copy a bundle to a new folder at a URL; returns its version. The manifest comes last: without
    it there is no bundle. The same command goes on after an interruption.

    Raises `ArtifactError` if a hash does not fit, or the place refuses; `ConfigError` if something
    else is at the URL.
    """
    bundle = read_bundle(folder)
    bundle.check_weights()
    fs, root = _place(url)
    with _naming(url, "written"):
        fs.makedirs(root, exist_ok=True)
        _check_same(fs, folder / MANIFEST, root, url)  # before anything is written
        files = files_of(folder)
        for path in files:
            target = f"{root}/{path.name}"
            if not fs.exists(target):
                _put(fs, path, target)
            elif path.name in (CARD, HISTORY):
                log.info("%s  stays as it is there", path.name)
                continue
            else:
                _check_same(fs, path, root, url)
            log.info("%s  %.1f MB", path.name, path.stat().st_size / 1e6)
    if others := [path.name for path in sorted(folder.iterdir()) if path not in files]:
        log.info("not copied, for they are no part of the bundle: %s", " ".join(others))
    return bundle.version


def pull(
    url: str,
    folder: Path,
    version: str | None = None,
    signers: Path | None = None,
) -> str:
    """Copy a bundle from a URL to a new folder; returns its version. Each file is checked as it
    comes; the folder appears when all of them are there. What has come stays in a hidden folder
    beside it, from which the same command goes on.

    version: the first digits of the one that is wanted, at least 8
    signers: a public key, or a folder of them, of which one must have signed the manifest

    Raises `ArtifactError` naming the file that is missing, damaged or foreign; `ConfigError` if
    there is something else in the folder.
    """
    fs, root = _place(url)
    folder = folder.absolute()  # "." has no name
    scratch = folder.with_name(f".{folder.name}.pull")
    manifest = scratch / MANIFEST
    _get_small(fs, f"{root}/{MANIFEST}", manifest, url)
    found = sha256(manifest)
    if version is not None:
        require(len(version) >= 8, "version", "have at least 8 digits", version)
        require(found.startswith(version), "version", f"be that of {url}, {found}", version)
    if folder.is_dir() and any(folder.iterdir()):
        there = read_bundle(folder).version if (folder / MANIFEST).exists() else "no bundle"
        same = there == found
        require(same, "FOLDER", f"be new or hold {found[:12]}", f"{folder}, with {there[:12]}")
        read_bundle(folder).check_weights()
        shutil.rmtree(scratch, ignore_errors=True)
        for signature in _signatures(folder):  # which may have come later
            if not signature.exists():
                _get_optional(fs, root, signature, url)
    else:
        _get_all(fs, root, scratch, url)
        read_bundle(scratch)
        if signers is not None:
            check_signed(scratch, signers)
        with naming(folder, "written"):
            scratch.rename(folder)
    if signers is not None:
        check_signed(folder, signers)
    return found


def _check_same(fs: Any, path: Path, root: str, url: str) -> None:
    """Raise `ConfigError` if the place has another file of this name."""
    target = f"{root}/{path.name}"
    if fs.exists(target) and _remote_sha256(fs, target) != sha256(path):
        raise ConfigError(
            f"URL must be a new folder, got {url!r}: its {path.name} is of another bundle"
        )


def files_of(folder: Path) -> list[Path]:
    """The files of a bundle, its manifest last."""
    stems = [folder / name for name in listed_artifacts(folder / MANIFEST)]
    files = [file_of(stem, suffix) for stem in stems for suffix in (".json", ".safetensors")]
    beside = [folder / CARD, folder / HISTORY, *_signatures(folder)]
    return [*files, *(path for path in beside if path.exists()), folder / MANIFEST]


def _signatures(folder: Path) -> list[Path]:
    """Where the signatures of a bundle are, of those files that have one."""
    stems = [folder / name for name in listed_artifacts(folder / MANIFEST)]
    return [
        signature_of(path) for path in (*(file_of(s, ".json") for s in stems), folder / MANIFEST)
    ]


def _get_all(fs: Any, root: str, scratch: Path, url: str) -> None:
    """Get what the manifest in `scratch` lists, and what people may have put beside it."""
    artifacts = listed_artifacts(scratch / MANIFEST)
    needed = {f"{name}{suffix}" for name in artifacts for suffix in (".json", ".safetensors")}
    for path in scratch.iterdir():  # what has come of another bundle, or is fetched again below
        if path.name not in needed | {MANIFEST}:
            path.unlink()
    for name, expected in artifacts.items():
        facts, weights = scratch / f"{name}.json", scratch / f"{name}.safetensors"
        _get_small(fs, f"{root}/{facts.name}", facts, url)
        wanted = read_facts(scratch / name, expected)["sha256"]
        if not (weights.exists() and sha256(weights) == wanted):
            with replaced(weights) as part:
                with _naming(f"{url}/{weights.name}", "read"):
                    fs.get_file(f"{root}/{weights.name}", str(part))
                check_sha256(part, wanted)
        log.info("%s  %.1f MB", weights.name, weights.stat().st_size / 1e6)
    for file in (*_signatures(scratch), scratch / CARD, scratch / HISTORY):
        _get_optional(fs, root, file, url)


def _get_small(fs: Any, path: str, target: Path, url: str) -> None:
    """Get a file of at most 4 MiB, however long it is said to be."""
    with _naming(f"{url}/{target.name}", "read"), fs.open(path, "rb") as file:
        content = file.read(_SMALL + 1)
    if len(content) > _SMALL:
        raise ArtifactError(f"{url}/{target.name} must hold at most {_SMALL} bytes")
    with replaced(target) as scratch:
        scratch.write_bytes(content)


def _get_optional(fs: Any, root: str, target: Path, url: str) -> None:
    with _naming(f"{url}/{target.name}", "read"):
        there = fs.exists(f"{root}/{target.name}")
    if there:
        _get_small(fs, f"{root}/{target.name}", target, url)


def _put(fs: Any, path: Path, target: str) -> None:
    """Put a file, which is seen whole or not at all."""
    protocol = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocol & _IN_PLACE:
        fs.put_file(str(path), target)
        return
    folder, _, name = target.rpartition("/")
    part = f"{folder}/.{name}.{token_hex(4)}.part"
    try:
        fs.put_file(str(path), part)
        fs.mv(part, target)
    finally:
        if fs.exists(part):
            fs.rm_file(part)


def _remote_sha256(fs: Any, path: str) -> str:
    found = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _place(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path on it. Raises `ConfigError`."""
    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:
        known = "s3, gs, hf, https and others, if the package for it is installed"
        raise ConfigError(
            f"URL must be a folder or a URL that fsspec knows ({known}), got {url!r}: {error}"
        ) from error
    fs.invalidate_cache()
    return fs, root.rstrip("/")


@contextmanager
def _naming(place: str, what: str) -> Iterator[None]:
    """Whatever error a file system raises becomes an `ArtifactError` naming the place."""
    try:
        yield
    except (DdmError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise ArtifactError(f"{place} is missing") from error
    except Exception as error:  # each file system has errors of its own
        raise ArtifactError(f"{place} cannot be {what}: {error or type(error).__name__}") from error
