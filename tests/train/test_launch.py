"""Jobs side by side: how many workers there are, and a GPU for each."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from train.launch import OnProgress, gpus, run_jobs, workers_for


def test_there_are_as_many_workers_as_gpus_or_cores_or_as_asked_for_and_never_more_than_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1", "2"]
    assert (workers_for(10, "cuda"), workers_for(10, "cpu")) == (3, 6)
    assert (workers_for(2, "cuda"), workers_for(2, "cpu")) == (2, 2)
    assert (workers_for(10, "cuda", 5), workers_for(10, "cpu", 5), workers_for(4, "cuda", 5)) == (
        5,
        5,
        4,
    )


def test_the_gpus_are_those_that_the_environment_leaves_by_the_names_it_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for named, expected in (
        ("2,3", ["2", "3"]),
        ("GPU-5a,MIG-7", ["GPU-5a", "MIG-7"]),
        ("", ["0"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert gpus() == expected
        assert workers_for(9, "cuda") == len(expected)


def _meet(folder: Path, job: int, on_progress: OnProgress) -> tuple[int, str | None, int, int]:
    """Wait until two processes are at work, and say what this one sees."""
    on_progress(("began", job))
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return job, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), torch.get_num_threads()


def test_each_of_two_workers_has_a_gpu_of_its_own_and_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    heard: list[tuple[str, int]] = []
    results = run_jobs(partial(_meet, tmp_path), [0, 1], 2, heard.append)
    found = [result for result in results if not isinstance(result, Exception)]
    assert [job for job, *_ in found] == [0, 1]  # in the order of the jobs
    assert {gpu for _, gpu, *_ in found} == {"2", "3"}
    assert len({process for *_, process, _ in found} - {os.getpid()}) == 2
    assert {threads for *_, threads in found} == {max(1, (os.cpu_count() or 1) // 2)}
    assert sorted(heard) == [("began", 0), ("began", 1)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"  # of this process, as it was


def _fail_at_one(job: int, on_progress: OnProgress) -> int:
    on_progress(job)
    if job == 1:
        raise ValueError("no such job")
    return 10 * job


def test_a_job_that_fails_costs_only_itself() -> None:
    heard: list[int] = []
    first, second, third = run_jobs(_fail_at_one, [0, 1, 2], 1, heard.append)
    assert (first, third) == (0, 20)
    assert isinstance(second, ValueError)
    assert heard == [0, 1, 2]
