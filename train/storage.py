"""Where trainings on other machines keep their files: a folder or any URL of fsspec.

Below the storage's root, `RUN/TIME/NAME-KEY/checkpoint_…` are the checkpoints of one training, as Ray Tune numbers them, and
`RUN/TIME/inputs/NAME-KEY` what it reads. KEY is the hash of what it is trained from, so a later command finds them.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ddm.artifacts import check_sha256, read_json, replaced, sha256, write_json
from ddm.errors import ConfigError

_MANIFEST = "manifest.json"


class Storage:
    """A file system and a folder of it, for one run."""

    def __init__(self, url: str, run: str) -> None:
        """Raise `ConfigError` if the URL names no file system, or one whose package is not installed."""
        self.url = url if "://" in url or "::" in url else str(Path(url).absolute())
        try:
            self.fs, root = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            known = "s3, gs, abfs, sftp and others, if the package for it is installed"
            raise ConfigError(
                f"launch.storage must be a folder or a URL that fsspec knows ({known}), got {url!r}: {error}"
            ) from error
        self.run = f"{root.rstrip('/')}/{re.sub('[^A-Za-z0-9_.-]', '_', run)}"

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, which other machines have only if they share it."""
        return isinstance(self.fs, LocalFileSystem)

    def check_writable(self) -> None:
        """Raise `ConfigError` if nothing can be written there."""
        probe = f"{self.run}/.probe-{token_hex(8)}"  # other commands may probe as well
        try:
            self.fs.makedirs(self.run, exist_ok=True)
            self.fs.pipe_file(probe, b"ddm")
            found = self.fs.cat_file(probe)
            self.fs.rm_file(probe)
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(
                f"launch.storage must be a place that can be written, got {self.url!r}: {error or type(error).__name__}"
            ) from error
        if found != b"ddm":
            raise ConfigError(f"launch.storage must give back what is written, got {self.url!r}")

    def put(self, files: Mapping[str, Path], folder: str) -> None:
        """Write files to a folder below the run's, under the names given."""
        for name, path in files.items():
            target = f"{self.run}/{folder}/{name}"
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(path), target)

    def get(self, folder: str, target: Path) -> int:
        """Read all files of a folder, an absolute path of this storage, into a folder here; returns how many."""
        prefix = folder.rstrip("/") + "/"
        files: list[str] = self.fs.find(folder)
        for found in files:
            path = target / found.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(found, str(path))
        return len(files)

    def checkpoints(self, training: str) -> list[str]:
        """The folders of the checkpoints of a training, by all commands so far, the newest first."""
        self.fs.invalidate_cache()
        return sorted(self.fs.glob(f"{self.run}/*/{training}/checkpoint_*"), reverse=True)

    def entries(self) -> list[str]:
        """The names of the folders and files here: those of commands, and whatever else somebody has put here."""
        found: list[str] = self.fs.ls(self.run, detail=False)
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def forget(self, training: str, commands: Iterable[str]) -> None:
        """Delete the checkpoints and inputs of a training by these commands; others may be at work on the same."""
        self.fs.invalidate_cache()
        for command in commands:
            for folder in (f"{command}/{training}", f"{command}/inputs/{training}"):
                if self.fs.exists(f"{self.run}/{folder}"):
                    self.fs.rm(f"{self.run}/{folder}", recursive=True)

    def clear(self, commands: Iterable[str]) -> None:
        """Delete what these commands have left below the run, unless there are checkpoints; and the run, if nothing else is
        in it.
        """
        self.fs.invalidate_cache()
        for command in commands:
            folder = f"{self.run}/{command}"
            if self.fs.exists(folder) and not self.fs.glob(f"{folder}/*/checkpoint_*"):
                self.fs.rm(folder, recursive=True)
        with contextlib.suppress(Exception):  # each file system has errors of its own
            self.fs.rmdir(self.run)

    def for_ray(self) -> Any:
        """The file system as pyarrow's, which Ray takes."""
        import pyarrow.fs

        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.fs))


def kept_files(folder: Path) -> list[Path]:
    """What moves with a training's folder: all but scratch, locks, and the last checkpoint but one."""
    found = sorted(folder.rglob("*"))
    return [p for p in found if p.is_file() and not p.name.startswith((".", "resume.previous"))]


def pack(source: Path, target: Path) -> None:
    """Copy a training's folder, with the hash of every file, to an existing folder.

    Of its checkpoints only the newest: a storage keeps earlier ones in folders of their own.
    """
    hashes = {}
    for path in kept_files(source):
        name = path.relative_to(source).as_posix()
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy.write_bytes(path.read_bytes())
        except FileNotFoundError:  # training has just removed it
            continue
        hashes[name] = sha256(copy)
    write_json(target / _MANIFEST, hashes)


def check_packed(packed: Path) -> None:
    """Raise `ArtifactError` naming a file that `pack` wrote and that is missing or damaged."""
    for name, expected in read_json(packed / _MANIFEST).items():
        check_sha256(packed / name, expected)


def unpack(packed: Path, target: Path) -> None:
    """Copy what `pack` wrote to a training's folder. Raises `ArtifactError` naming a file that is missing or damaged."""
    check_packed(packed)
    for name in read_json(packed / _MANIFEST):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replaced(copy) as scratch:
            scratch.write_bytes((packed / name).read_bytes())
