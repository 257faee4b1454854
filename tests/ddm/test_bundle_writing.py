"""A bundle is replaced whole: after a failed write, a kill, or among several writers."""

import multiprocessing
import os
import re
import shutil
from pathlib import Path

import pytest

from ddm.artifacts import scratch_beside
from ddm.bundle import read_bundle
from ddm.bundle_writing import Parts, write_bundle
from ddm.errors import ArtifactError
from tests.ddm.bundles import SCHEDULE, Run, read_whole


def test_a_failed_write_leaves_the_old_bundle(run: Run) -> None:
    before = {path.name: path.read_bytes() for path in run.bundle.iterdir()}
    run.train(0, weight=0.5)
    run.train(1, weight=0.5, cluster="0" * 64)
    with pytest.raises(ArtifactError):
        run.write()
    assert {path.name: path.read_bytes() for path in run.bundle.iterdir()} == before
    assert len(read_bundle(run.bundle).experts) == 2


def test_a_new_bundle_replaces_the_old_and_takes_nothing_from_a_failed_one(run: Run) -> None:
    leftover = scratch_beside(run.bundle)
    leftover.mkdir()
    (leftover / "expert-07.json").write_text("{}")
    os.utime(leftover, (0, 0))
    for name in (
        "expert-07.json",
        "expert-07.safetensors",
        "old-router.json",
        "router.json.minisig",
    ):
        (run.bundle / name).write_text("{}")  # of the old bundle, and in no new one
    run.write()
    names = {
        f"{name}{suffix}"
        for name in ("expert-00", "expert-01", "router")
        for suffix in (".json", ".safetensors")
    }
    others = {"manifest.json", "history.json"}
    assert {path.name for path in run.bundle.iterdir()} == names | others
    assert not leftover.exists()


def test_what_else_is_in_the_folder_stays(run: Run) -> None:
    (run.bundle / "LICENSE").write_text("mine")
    (run.bundle / ".git" / "refs").mkdir(parents=True)
    (run.bundle / ".git" / "HEAD").write_text("ref")
    (run.bundle / "latest").symlink_to("LICENSE")
    (run.bundle / "expert-00.png").write_text("mine")
    (run.bundle / "router").mkdir()
    signature = run.bundle / "manifest.json.minisig"
    signature.write_text("signed")
    run.write()
    assert (run.bundle / "LICENSE").read_text() == "mine"
    assert (run.bundle / ".git" / "HEAD").read_text() == "ref"
    assert (run.bundle / ".git" / "refs").is_dir() and (run.bundle / "latest").is_symlink()
    assert signature.read_text() == "signed"  # the manifest is the same
    run.train(0, weight=0.5)
    run.write()
    assert not signature.exists() and (run.bundle / "LICENSE").exists()
    assert (run.bundle / "expert-00.png").exists() and (run.bundle / "router").is_dir()


@pytest.mark.parametrize(("name", "other"), [("cats", "cats.v2"), ("c" * 41, "c" * 42)])
def test_a_bundle_moved_aside_is_not_taken_for_another_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    run.bundle = run.bundle.rename(run.bundle.with_name(other))
    old = read_bundle(run.bundle).version
    killed_while_replacing(run, monkeypatch, renames=1)
    with pytest.raises(ArtifactError, match="is missing"):
        read_bundle(run.bundle.with_name(name))
    assert read_bundle(run.bundle).version == old


def killed_while_replacing(run: Run, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Write a new bundle, and stop as a kill would at the rename after so many of the folder."""
    rename, done = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        moved = rename(self, target)
        done.append(target)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            run.write()


def test_a_kill_between_the_renames_loses_no_bundle(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read_bundle(run.bundle).version
    (run.bundle / "LICENSE").write_text("mine")
    run.train(0, weight=0.5)
    killed_while_replacing(run, monkeypatch, renames=1)
    assert not run.bundle.exists()
    assert read_bundle(run.bundle).version == old
    killed_while_replacing(run, monkeypatch, renames=1)
    run.write()
    assert float(read_whole(run.bundle).experts[0].tensors["weight"]) == 0.5
    assert (run.bundle / "LICENSE").read_text() == "mine"
    assert not [path for path in run.folder.iterdir() if path.suffix == ".old"]


def write_often(run: Run, folder: Path, experts: int) -> None:
    mine = Run(folder / f"run-{experts}")
    mine.bundle = run.bundle
    for turn in range(10):
        mine.train(1, weight=float(10 * experts + turn))
        mine.write()


def test_concurrent_writers_leave_one_whole_bundle(run: Run, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(write_often, [(run, tmp_path, writer) for writer in range(3)])
        pool.close()
        pool.join()  # as in test_artifacts
    weight = float(read_whole(run.bundle).experts[1].tensors["weight"])
    assert weight in {1.0 + 10 * writer + 9 for writer in range(3)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_linked_bundle_is_replaced_where_the_link_leads(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    run.bundle.rename(target)
    run.bundle.symlink_to(target)
    run.train(1, weight=0.5)
    run.write()
    assert run.bundle.is_symlink()
    assert float(read_whole(target).experts[1].tensors["weight"]) == 1.5


def test_a_bundle_in_place_of_a_file_is_refused_by_name(run: Run) -> None:
    shutil.rmtree(run.bundle)
    run.bundle.write_text("mine")
    with pytest.raises(ArtifactError, match=re.escape(f"{run.bundle} cannot be written: Not a")):
        run.write()
    assert run.bundle.read_text() == "mine"


def test_too_few_experts_are_refused_and_leave_the_old_bundle(run: Run) -> None:
    version = read_bundle(run.bundle).version
    few = Parts(run.partition.mixture, SCHEDULE, {"expert-00": run.experts[0]})
    with pytest.raises(
        ArtifactError, match=re.escape("manifest.json lists 1 experts, but has 2 clusters")
    ):
        write_bundle(run.bundle, few, "test")
    assert read_bundle(run.bundle).version == version
