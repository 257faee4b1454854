"""Outputs that are lost, cut off, refused by the system, or of the same name."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddm.artifacts import sha256
from tests.conftest import SMALL
from train.__main__ import main
from train.config import Config
from train.stages.run import run

MADE = ("partition", "expert", "router", "bundle", "sample")
SAMPLES = "samples/posterior-switching-ipndm-3-n4-seed0"


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A finished run to change."""
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.mark.parametrize(
    "file",
    [
        "partition/cluster-01.safetensors",
        "partition/partition.json",
        "partition/clusters.png",
        "partition/stage.json",
        "experts/01/expert.safetensors",
        "experts/01/expert.json",
        "router/router.safetensors",
        "router/router.json",
        "bundle/expert-01.safetensors",
        "bundle/manifest.json",
        f"{SAMPLES}.png",
        f"{SAMPLES}.safetensors",
    ],
)
def test_a_deleted_output_is_made_again_with_the_same_bytes(copy: Path, file: str) -> None:
    before = sha256(copy / file)
    (copy / file).unlink()
    assert main([*SMALL, f"run={copy}", *MADE]) == 0
    assert sha256(copy / file) == before


@pytest.mark.parametrize(
    ("file", "is_made_again"),
    [
        ("partition/cluster-01.safetensors", True),
        ("partition/clusters.png", True),
        ("partition/stage.json", False),
        ("partition/partition.json", False),
        ("experts/01/expert.safetensors", False),  # hours of training are never overwritten
        ("experts/01/expert.json", False),
        ("router/router.safetensors", False),
        ("bundle/expert-01.safetensors", True),
        ("bundle/manifest.json", True),
    ],
)
def test_a_half_written_output_is_made_again_or_named(
    copy: Path, capsys: pytest.CaptureFixture[str], file: str, is_made_again: bool
) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    status = main([*SMALL, f"run={copy}", *MADE])
    error = capsys.readouterr().err
    assert status == (0 if is_made_again else 2), error
    if is_made_again:
        assert (copy / file).read_bytes() == content
    else:
        assert error.startswith(f"error: {copy / file} is damaged")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of any file, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("stage", "size", "file"),
    [
        ("partition", 100, "cluster-00.safetensors"),
        ("expert", 10_000, "experts/00/resume.ckpt"),
        ("router", 10_000, "router/stage-1/resume.ckpt"),
        ("bundle", 10_000, "bundle"),
        ("sample", 100, "config.yaml"),
    ],
)
def test_a_full_disk_names_the_file(
    copy: Path, capsys: pytest.CaptureFixture[str], stage: str, size: int, file: str
) -> None:
    for folder in (stage, f"{stage}s"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    with largest_file(size):
        status = main([*SMALL, f"run={copy}", stage])
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith(f"error: {copy}")
    assert f"{file} cannot be written: " in error
    assert "File too large" in error


def test_a_missing_partition_is_named_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("expert", "router", "bundle"):
        assert main([*SMALL, f"run={tmp_path / 'run'}", stage]) == 2
        assert capsys.readouterr().err == (
            f"error: {tmp_path}/run/partition/partition.json is missing: run the stage 'partition' "
            f"first, as in python -m train CONFIG partition run={tmp_path}/run\n"
        )


def test_samples_of_other_settings_never_share_a_name(
    copy: Path, small: Callable[..., Config]
) -> None:
    names = [f"'{name}'" for name in ("0 + 1 + 2 + 3", "4 + 5 + 6", "7 + 8 + 9")]
    settings = [
        [],
        ["sample.temperature=0.5"],
        ["sample.temperature=0.25"],
        ["sample.temperature=2.5"],
        ["sample.t_min=0.001"],
        ["sample.t_min=0.0015"],
        [f"sample.clusters=[{names[0]}, {names[1]}]"],
        [f"sample.clusters=[{names[0]}, {names[2]}]"],
        [f"sample.clusters={{{names[0]}: 1, {names[1]}: 1}}"],
        [f"sample.clusters={{{names[0]}: 1, {names[1]}: 2}}"],
    ]
    for i, words in enumerate(settings):
        before = {path: sha256(path) for path in (copy / "samples").iterdir()}
        run(small(copy, *words), ["sample"])
        after = {path: sha256(path) for path in (copy / "samples").iterdir()}
        assert before.items() <= after.items()
        assert len(after) == len(before) + (3 if i else 0), words


def test_a_file_of_the_user_is_never_overwritten(copy: Path, small: Callable[..., Config]) -> None:
    mine = copy / "samples" / "posterior-switching-ipndm-3-n4-seed7.png"
    mine.write_bytes(b"mine")
    run(small(copy, "sample.seed=7"), ["sample"])
    assert mine.read_bytes() == b"mine"
    assert mine.with_name("posterior-switching-ipndm-3-n4-seed7-2.png").exists()


def test_experts_trained_by_one_command_each_are_those_trained_by_one(
    small_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_run / "partition", tmp_path / "partition")
    for k in (2, 0, 1):
        assert main([*SMALL, f"run={tmp_path}", "expert", f"expert.index={k}"]) == 0
    for name in ("expert.safetensors", "expert.json"):
        for k in range(3):
            file = f"experts/{k:02d}/{name}"
            assert sha256(tmp_path / file) == sha256(small_run / file)


def test_the_router_counts_the_images_of_whole_batches(
    copy: Path, small: Callable[..., Config]
) -> None:
    from ddm.artifacts import read_facts

    shutil.rmtree(copy / "router")
    (copy / "config.yaml").unlink()
    run(small(copy, "router.batch=13", "router.steps=5"), ["router"])
    assert read_facts(copy / "router" / "router")["images_seen"] == 5 * 15  # 5 for each band of t
