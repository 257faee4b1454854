"""Artifacts: whole or not at all, checked by hash, never unpickled."""

import errno
import hashlib
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import ddm.artifacts
from ddm.artifacts import (
    digest,
    read_artifact,
    read_json,
    read_layout,
    read_tensors,
    replaced,
    scratch_beside,
    sha256,
    write_artifact,
    write_json,
    write_tensors,
)
from ddm.errors import ArtifactError

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor([2**40, -1])}


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        sha256(tmp_path / "abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_digest_is_that_of_sorted_json_whatever_the_order_of_the_keys() -> None:
    assert (
        digest({"b": [2], "a": 1})
        == hashlib.sha256(b'{"a": 1, "b": [2]}').hexdigest()
        == digest({"a": 1, "b": [2]})
    )
    assert digest({"a": 1, "b": [3]}) != digest({"a": 1, "b": [2]})


def test_tensors_come_back_as_they_went(tmp_path: Path) -> None:
    sent = {
        "pixels": torch.arange(24, dtype=torch.uint8)
        .reshape(1, 2, 3, 4)
        .to(memory_format=torch.channels_last),
        "view": torch.arange(6.0).reshape(2, 3).T[1:],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "learned": torch.ones(2, requires_grad=True),
        "scalar": torch.tensor(2**40),
    }
    write_tensors(tmp_path / "new" / "x.safetensors", sent)
    back = read_tensors(tmp_path / "new" / "x.safetensors")
    assert back.keys() == sent.keys()
    for name, tensor in sent.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor.detach())


def test_an_artifact_comes_back_with_its_facts_and_the_hash_of_its_weights(tmp_path: Path) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {"steps": 7, "names": ["é", "β"]})
    tensors, facts = read_artifact(tmp_path / "expert", sha256(tmp_path / "expert.json"))
    assert facts == {
        "steps": 7,
        "names": ["é", "β"],
        "sha256": sha256(tmp_path / "expert.safetensors"),
    }
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_changed_weights_are_refused_with_both_hashes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {})
    weights = tmp_path / "expert.safetensors"
    expected = sha256(weights)
    flip_last_byte(weights)
    message = (
        f"{weights} is damaged or foreign: its SHA-256 is {sha256(weights)}, expected {expected}"
    )
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_artifact(tmp_path / "expert")


def test_changed_facts_are_refused_with_both_hashes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {"steps": 7})
    path = tmp_path / "expert.json"
    expected = sha256(path)
    path.write_text(path.read_text().replace("7", "8"))
    message = f"{path} is damaged or foreign: its SHA-256 is {sha256(path)}, expected {expected}"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        read_artifact(tmp_path / "expert", expected)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {})
    (tmp_path / f"expert{suffix}").unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / 'expert'}{suffix} is missing")):
        read_artifact(tmp_path / "expert")


@pytest.mark.parametrize("read", [sha256, read_json, read_tensors])
def test_reading_a_file_that_is_not_there_names_it(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / 'nothing'} is missing")):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(
        ArtifactError, match=re.escape(f"{tmp_path / 'facts.json'} is damaged: it is not JSON")
    ):
        read_json(tmp_path / "facts.json")


@pytest.mark.parametrize("value", [None, "", "0" * 63, "0" * 65, "g" * 64, "A" * 64, 0, ["0" * 64]])
def test_a_weights_hash_that_is_no_sha256_is_refused(tmp_path: Path, value: object) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {})
    for facts in ({"sha256": value}, {"steps": 7}):
        write_json(tmp_path / "expert.json", facts)
        with pytest.raises(
            ArtifactError,
            match=re.escape(f"{tmp_path / 'expert.json'} is not the description of an artifact"),
        ):
            read_artifact(tmp_path / "expert")


@pytest.mark.parametrize("content", ["[]", "3", "null", "true", '"text"', "1.5"])
def test_json_of_another_kind_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "expert.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=re.escape(f"{path} must hold a JSON object, got")):
        read_artifact(tmp_path / "expert")


ODD_VALUES = {
    "nan": "NaN",
    "inf": "Infinity",
    "minus inf": "-Infinity",
    "1e999": "1e999",
    "65 bits": str(2**64),
    "5000 digits": "9" * 5000,
    "deep list": "[" * 5000,
    "deep object": '{"a":' * 5000,
    "4 MiB": '"' + "x" * (4 * 2**20) + '"',
}


@pytest.mark.parametrize("value", ODD_VALUES.values(), ids=ODD_VALUES.keys())
def test_json_that_cannot_be_a_fact_is_refused_by_name(tmp_path: Path, value: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(f'{{"key": {value}}}')
    with pytest.raises(ArtifactError, match=re.escape(str(path))) as error:
        read_json(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "facts.json", {"key": value})
    assert list(tmp_path.iterdir()) == []


def make_strange(path: Path, kind: str) -> None:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling link":
            path.symlink_to(path.with_name("nothing"))
        case "loop":
            path.symlink_to(path)
        case "below a file":
            path.parent.rmdir()
            path.parent.write_text("")


@pytest.mark.parametrize(
    "kind", ["fifo", "device", "folder", "dangling link", "loop", "below a file"]
)
@pytest.mark.parametrize("read", [sha256, read_json, read_tensors, read_layout])
def test_what_is_not_a_file_is_refused_by_name_without_waiting(
    tmp_path: Path, kind: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "folder" / "strange"
    path.parent.mkdir()
    make_strange(path, kind)
    signal.setitimer(signal.ITIMER_REAL, 60)  # ends the test if a read waits for ever
    try:
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            read(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("read", [sha256, read_json, read_tensors, read_layout])
def test_what_the_system_refuses_to_open_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "x"
    path.write_text("{}")

    def denied(self: Path, *arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArtifactError, match=f"^{re.escape(str(path))} cannot be read: Permission"):
        read(path)


@pytest.mark.parametrize("parent", ["file", "x" * 300])
def test_what_the_system_refuses_to_write_is_refused_by_name(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / parent / "x"
    with pytest.raises(ArtifactError, match=re.escape(f"{path} cannot be written: ")):
        write_json(path, {})
    with pytest.raises(ArtifactError, match=re.escape(f"{path} cannot be written: ")):
        write_tensors(path, TENSORS)


def test_a_header_lists_dtypes_and_shapes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {**TENSORS, "half": torch.zeros(0, 3, dtype=torch.bfloat16)})
    assert read_layout(tmp_path / "x") == {
        "weight": ("F32", (2, 3)),
        "count": ("I64", (2,)),
        "half": ("BF16", (0, 3)),
    }


def test_a_header_that_claims_to_be_large_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((50_000_000).to_bytes(8, "little") + b"{" + b" " * 50_000_000)
    for read in (read_tensors, read_layout):
        with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged")):
            read(path)


def test_a_stem_may_contain_dots(tmp_path: Path) -> None:
    for name in ("t=0.5", "t=0.7"):
        write_artifact(tmp_path / name, TENSORS, {"name": name})
    assert read_artifact(tmp_path / "t=0.5")[1]["name"] == "t=0.5"
    assert len(list(tmp_path.iterdir())) == 4


def test_an_exception_while_writing_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(scratch: Path) -> None:
        scratch.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replaced(path) as scratch:
        fail(scratch)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_files_error_while_writing_is_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), replaced(tmp_path / "x"):
        (tmp_path / "source").read_bytes()


def test_every_writer_has_its_own_scratch_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replaced(path) as first, replaced(path) as second:
        assert first != second
        assert {first.parent, second.parent} == {tmp_path}
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_scratch_of_a_killed_process_goes_with_a_later_write(tmp_path: Path) -> None:
    old, young, other = (scratch_beside(tmp_path / name) for name in ("x", "x", "y"))
    folder = scratch_beside(tmp_path / "x")
    folder.mkdir()
    (folder / "inner").write_text("")
    for scratch in (old, young, other):
        scratch.write_text("torn")
    hours_ago = time.time() - 2 * 3600
    for scratch in (old, other, folder):
        os.utime(scratch, (hours_ago, hours_ago))
    write_json(tmp_path / "x", {})
    assert set(tmp_path.iterdir()) == {tmp_path / "x", young, other}


def test_what_is_written_is_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "x", []

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((target.name if target == tmp_path else target.suffix, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, {})
    assert flushed == [(".part", False), (tmp_path.name, True)]


def write_often(path: Path, number: int, times: int) -> None:
    for _ in range(times):
        write_json(path, {"numbers": [number] * 5000})


def test_concurrent_writers_never_tear_a_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_often(path, 0, 1)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        writers = pool.starmap_async(write_often, [(path, number, 20) for number in range(3)])
        while not writers.ready():
            numbers = read_json(path)["numbers"]
            assert len(numbers) == 5000
            assert len(set(numbers)) == 1
        writers.get()
        pool.close()
        pool.join()  # a process may ignore the SIGTERM of `terminate`: Ray in this one has set a handler
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ArtifactError, match=re.escape(f"{path} is damaged: it is not a safetensors file")
    ):
        read_tensors(path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_pickle_in_the_guise_of_safetensors_is_refused_unopened(
    tmp_path: Path, by_torch: bool
) -> None:
    path, sprung = tmp_path / "expert.safetensors", tmp_path / "sprung"
    if by_torch:
        torch.save({"weight": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Trap(sprung)}))
    write_json(tmp_path / "expert.json", {"sha256": sha256(path)})
    with pytest.raises(
        ArtifactError, match=re.escape(f"{path} is damaged: it is not a safetensors file")
    ):
        read_artifact(tmp_path / "expert")
    assert not sprung.exists()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_artifact(tmp_path / "expert", TENSORS, {"steps": 7})
    with full_disk(), pytest.raises(ArtifactError, match="expert.safetensors cannot be written"):
        write_artifact(tmp_path / "expert", {"weight": torch.zeros(1000)}, {"steps": 8})
    with full_disk(), pytest.raises(ArtifactError, match="expert.json cannot be written: .*large"):
        write_json(tmp_path / "expert.json", {"steps": list(range(1000))})
    tensors, facts = read_artifact(tmp_path / "expert")
    assert facts["steps"] == 7
    assert torch.equal(tensors["weight"], TENSORS["weight"])
    assert len(list(tmp_path.iterdir())) == 2


def test_an_artifact_without_its_json_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, facts: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(ddm.artifacts, "write_json", killed)
    with pytest.raises(OSError, match="no space left"):
        write_artifact(tmp_path / "expert", TENSORS, {})
    assert (tmp_path / "expert.safetensors").exists()
    with pytest.raises(ArtifactError, match=re.escape("expert.json is missing")):
        read_artifact(tmp_path / "expert")
