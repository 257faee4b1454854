"""`resume.ckpt`: the checkpoint that training resumes from, and the one before it.

A file is a Lightning checkpoint followed by the 32 bytes of its SHA-256. It is written beside its target, flushed and
renamed, so a kill at any moment leaves a whole file.
"""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from ddm.artifacts import flush, replaced
from ddm.errors import ArtifactError
from train.ranks import current

log = logging.getLogger(__name__)

NEWEST, PREVIOUS = "resume.ckpt", "resume.previous.ckpt"
_HASH_BYTES = 32
_OF = "trained_from"


class ResumeFiles(CheckpointIO):
    """How Lightning saves to a folder's `resume.ckpt`, and gets what `read_resume` has read; `of` is the hash of what
    is trained from.
    """

    def __init__(self, saved: dict[str, Any] | None, of: str) -> None:
        self.saved, self.of = saved, of

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        with replaced(path) as scratch:
            with scratch.open("wb") as file:
                hashing = _Hashing(file)
                try:
                    torch.save({**checkpoint, _OF: self.of}, hashing)  # type: ignore[arg-type]  # it only writes
                except RuntimeError as error:  # torch hides what the system refused
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from None
                    raise
                file.write(hashing.sha256.digest())
            if path.exists():
                flush(scratch)  # it takes long: a kill meanwhile must find the newest in its place
                path.replace(path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        assert self.saved is not None
        return self.saved

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Hashing(io.BufferedIOBase):
    """A file opened for writing, and the SHA-256 of what was written."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def read_resume(folder: Path, of: str | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint in a folder, None if there is none; a damaged one is named in a warning.

    Raises `ArtifactError` if there are checkpoints and all are damaged, or it was not trained from what `of` is the hash of.
    """
    newest, previous = folder / NEWEST, folder / PREVIOUS
    present = [path for path in (newest, previous) if path.exists()]
    # The newest once more: another process may have put the previous one in its place by then.
    for path in (newest, previous, newest):
        saved = _read(path)
        if saved is None:
            continue
        if path is previous and newest.exists() and current().rank == 0:
            log.warning("%s is damaged; training resumes from %s", newest, previous)
            previous.replace(newest)  # so that the next save does not replace the whole one
        if of not in (None, saved.get(_OF)):
            raise ArtifactError(
                f"{path} was made by another config or from other images: move {folder} away to train it anew"
            )
        return saved
    if present:
        names = " and ".join(str(path) for path in present)
        verb, them = ("is", "it") if len(present) == 1 else ("are", "them")
        raise ArtifactError(f"{names} {verb} damaged: delete {them} to train anew from step 0")
    return None


def steps(folder: Path) -> int:
    """How many steps the whole checkpoints below a folder are of, all networks together."""
    saved = [_read(path) for path in folder.rglob(NEWEST)]
    return sum(int(one["global_step"]) for one in saved if one is not None)


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint on the CPU; None if the file is damaged or missing."""
    try:
        content = memoryview(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        return None
    body, expected = content[:-_HASH_BYTES], content[-_HASH_BYTES:]
    if hashlib.sha256(body).digest() != expected:
        return None
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def drop_resume(folder: Path, keep_newest: bool = False) -> None:
    """Delete a folder's checkpoints: what they led to is written; the newest may go on to more steps."""
    for pattern in (*([] if keep_newest else [NEWEST]), PREVIOUS, f".{NEWEST}.*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
