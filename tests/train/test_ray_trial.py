"""One trial, without a cluster: what it fetches, what it keeps, and where it goes on from."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import sha256
from ddm.errors import ArtifactError
from ddm.partition import Partition
from tests.conftest import SMALL
from train.config import Config, default_config, load_config
from train.ray_trial import Training, Work, fetch, inside, name_of
from train.resume import steps
from train.stages import expert
from train.stages.run import run
from train.storage import Storage


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts 1 and 2, trained in this process."""
    folder = tmp_path_factory.mktemp("here") / "run"
    for index in (1, 2):
        words = [*SMALL, f"run={folder}", f"expert.index={index}"]
        run(load_config(default_config(), words), ["partition", "expert"])
    return folder


@pytest.fixture
def work(here: Path, small: Callable[..., Config], tmp_path: Path) -> Callable[..., Work]:
    """`work(*checkpoints)`: these experts, to be trained from a storage with checkpoints, the newest first."""
    config = small(here)
    jobs = [expert._job(config, k) for k in (1, 2)]
    where = (str(tmp_path / "storage"), "run")
    storage = Storage(*where)
    for job in jobs:
        storage.put({inside(config, path): path for path in job.reads}, f"1/inputs/{name_of(job)}")

    def made(*checkpoints: Path) -> Work:
        for n, folder in enumerate(reversed(checkpoints)):
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
            storage.put(files, f"1/{name_of(jobs[0])}/checkpoint_{n:06d}")
        return Work(config, jobs, 1, where, f"{storage.run}/1/inputs", {}, 0.02)

    return made


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Work], Training]]:
    """`trial(work)`: a trial of its first job, as Tune would make it."""
    monkeypatch.chdir(tmp_path)  # a trial changes it
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))
    made: list[Training] = []

    def make(work: Work) -> Training:
        class Here(Training):
            def setup(self, config: dict[str, Any], work: Any = work) -> None:
                super().setup(config, work)

        made.append(Here({"job": 0}))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def steps_until(trial: Training, done: Callable[[dict[str, Any]], bool]) -> list[int]:
    found = []
    while True:
        result = trial.train()
        found.append(result["steps_done"])
        assert result["error"] is None
        if done(result):
            return found


def weights(run: Path, k: int) -> str:
    return sha256(run / "experts" / f"{k:02d}" / "expert.safetensors")


def test_a_trial_trains_in_a_run_folder_with_its_own_cluster_and_is_used_again(
    work: Callable[..., Work], trial: Callable[[Work], Training], here: Path
) -> None:
    one = trial(work())
    for i, k in ((0, 1), (1, 2)):
        if i > 0:
            assert one.reset_config({"job": i})
        steps_until(one, lambda result: bool(result["done"]))
        files = [path.name for path in (one.run / "partition").iterdir()]
        assert sorted(files) == sorted([Partition.file(Path(), k).name, "partition.json"])
        assert weights(one.run, k) == weights(here, k)


def test_a_trial_goes_on_elsewhere_from_its_last_checkpoint(
    work: Callable[..., Work],
    trial: Callable[[Work], Training],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted = _interrupted(work, trial, monkeypatch, tmp_path)
    second = trial(work())
    second.load_checkpoint(str(interrupted))
    seen = steps_until(second, lambda result: bool(result["done"]))
    assert min(step for step in seen if step > 0) >= 4
    assert weights(second.run, 1) == weights(here, 1)
    assert second.run != trial(work()).run


def test_a_later_command_starts_from_the_newest_whole_checkpoint(
    work: Callable[..., Work],
    trial: Callable[[Work], Training],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = _interrupted(work, trial, monkeypatch, tmp_path)
    half = tmp_path / "half"
    half.mkdir()
    (half / "manifest.json").write_text('{"resume.ckpt": "' + "0" * 64 + '"}')
    second = trial(work(half, whole))
    seen = steps_until(second, lambda result: bool(result["done"]))
    assert min(step for step in seen if step > 0) >= 4
    assert "resume.ckpt is missing; an earlier checkpoint is used" in caplog.text
    assert weights(second.run, 1) == weights(here, 1)


def _interrupted(
    work: Callable[..., Work],
    trial: Callable[[Work], Training],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """The checkpoint of a trial whose training ends after 6 steps; the last checkpoint is at step 4."""

    def cut(config: Config, on_progress: Callable[[Any], None], k: int) -> None:
        def until(news: tuple[int, int, float]) -> None:
            on_progress(news[1:])
            if news[1] == 6:
                raise EOFError

        with suppress(EOFError):
            expert.train_expert(config, k, until)

    given = work()
    job = replace(given.jobs[0], train=partial(cut, k=1))
    first = trial(replace(given, jobs=[job]))
    steps_until(first, lambda result: bool(result["done"]))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    first.save_checkpoint(str(checkpoint))
    return checkpoint


def test_an_error_of_training_is_a_result_with_its_traceback(
    work: Callable[..., Work], trial: Callable[[Work], Training]
) -> None:
    given = work()
    storage = Storage(*given.storage)
    inputs = f"{given.inputs}/{name_of(given.jobs[0])}/partition/cluster-01.safetensors"
    storage.fs.pipe_file(inputs, b"damaged")
    one = trial(given)
    while not (result := one.train())["done"]:
        pass
    assert "cluster-01.safetensors is damaged" in str(result["error"])
    assert "in train_expert" in result["error"].__notes__[0]


def test_what_the_run_has_of_a_later_step_is_kept(
    work: Callable[..., Work],
    trial: Callable[[Work], Training],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    earlier = _interrupted(work, trial, monkeypatch, tmp_path)
    given = work(earlier)
    own = {"experts/01/resume.ckpt": tmp_path / "own"}
    (tmp_path / "own").write_bytes(b"later")
    Storage(*given.storage).put(own, f"1/inputs/{name_of(given.jobs[0])}")
    monkeypatch.setattr(
        "train.ray_trial.steps", lambda folder: 9 if "experts" in folder.parts else 4
    )
    fetch(given, given.jobs[0], tmp_path / "run", None)
    assert (tmp_path / "run" / "experts" / "01" / "resume.ckpt").read_bytes() == b"later"


def test_a_later_step_is_known_by_its_checkpoint(
    work: Callable[..., Work],
    trial: Callable[[Work], Training],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = _interrupted(work, trial, monkeypatch, tmp_path)
    assert steps(folder) == steps(tmp_path / "none") + 4
    (folder / "resume.ckpt").write_bytes(b"damaged")
    assert steps(folder) == 0


def test_inputs_that_have_been_deleted_are_named(work: Callable[..., Work], tmp_path: Path) -> None:
    given = work()
    storage = Storage(*given.storage)
    storage.fs.rm(f"{given.inputs}/{name_of(given.jobs[0])}", recursive=True)
    with pytest.raises(ArtifactError, match="is missing: something has deleted it from"):
        fetch(given, given.jobs[0], tmp_path / "run", None)


def test_a_process_that_has_lost_its_gpu_ends(
    work: Callable[..., Work], trial: Callable[[Work], Training]
) -> None:
    def lose(config: Config, on_progress: Callable[[Any], None]) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    given = work()
    one = trial(replace(given, jobs=[replace(given.jobs[0], train=lose)]))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        steps_until(one, lambda result: bool(result["done"]))


def test_what_is_read_lies_beside_it_elsewhere(small: Callable[..., Config]) -> None:
    config = small("runs/x", "expert.shard=shards/owner", "expert.init=seeds/seed_model")
    for path, there in (
        ("shards/owner/cluster-00.safetensors", "shard/cluster-00.safetensors"),
        ("runs/x/seed_model/seed_model.json", "seed_model/seed_model.json"),
        ("seeds/seed_model.json", "init/seed_model.json"),
    ):
        assert inside(config, Path(path)) == there
