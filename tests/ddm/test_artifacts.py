"""Artifacts: whole or not at all, checked by hash, never unpickled."""

import hashlib
import pickle
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import ddm.artifacts
from ddm.artifacts import (
    digest,
    read_artifact,
    read_json,
    read_tensors,
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


@pytest.mark.parametrize("content", ["[]", '{"steps": 7}', "3"])
def test_json_that_describes_no_artifact_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "expert.json").write_text(content)
    with pytest.raises(
        ArtifactError,
        match=re.escape(f"{tmp_path / 'expert.json'} is not the description of an artifact"),
    ):
        read_artifact(tmp_path / "expert")


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ArtifactError, match=re.escape(f"{path} is damaged: it is no safetensors file")
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
        ArtifactError, match=re.escape(f"{path} is damaged: it is no safetensors file")
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
    with full_disk(), pytest.raises((OSError, SafetensorError), match="too large"):
        write_artifact(tmp_path / "expert", {"weight": torch.zeros(1000)}, {"steps": 8})
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_json(tmp_path / "expert.json", {"steps": list(range(1000))})
    tensors, facts = read_artifact(tmp_path / "expert")
    assert facts["steps"] == 7
    assert torch.equal(tensors["weight"], TENSORS["weight"])


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
