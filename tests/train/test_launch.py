"""Jobs in processes of their own: how many, a GPU for each, and what one costs that dies."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from train.launch import OnProgress, WorkerDiedError, gpus, run_jobs, workers_for


def test_one_worker_per_gpu_or_core_or_as_many_as_asked_at_most_one_per_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.launch.cores", lambda: 6)
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


def test_the_gpus_are_those_that_the_environment_names(
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


def _meet(
    folder: Path, count: int, job: int, on_progress: OnProgress
) -> tuple[int, str | None, int, int]:
    """Wait until `count` processes are at work; returns what this one sees."""
    on_progress(("began", job))
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)
    return job, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), torch.get_num_threads()


def test_each_worker_has_a_gpu_and_the_threads_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    heard: list[tuple[str, int]] = []
    results = run_jobs(partial(_meet, tmp_path, 2), [0, 1], 2, heard.append, threads=3)
    found = [result for result in results if not isinstance(result, Exception)]
    assert [job for job, *_ in found] == [0, 1]  # in the order of the jobs
    assert {gpu for _, gpu, *_ in found} == {"2", "3"}
    assert len({process for *_, process, _ in found} - {os.getpid()}) == 2
    assert {threads for *_, threads in found} == {3}
    assert sorted(heard) == [("began", 0), ("began", 1)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"  # of this process, as it was


def _fail_or_die(job: int, on_progress: OnProgress) -> int:
    on_progress(job)
    if job == 1:
        raise ValueError("no such job")
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * job


def test_a_job_that_fails_costs_only_itself() -> None:
    heard: list[int] = []
    first, second, third = run_jobs(_fail_or_die, [0, 1, 3], 0, heard.append)
    assert (first, third) == (0, 30)
    assert isinstance(second, ValueError)
    assert heard == [0, 1, 3]


def test_a_killed_process_costs_only_its_job_and_is_named() -> None:
    results = run_jobs(_fail_or_die, [2, 1, 0, 3], 1, lambda _: None)
    assert results[2:] == [0, 30]
    assert isinstance(results[0], WorkerDiedError)
    assert "SIGKILL, probably because memory ran out" in str(results[0])
    assert isinstance(results[1], ValueError)
    assert "in _fail_or_die" in results[1].__notes__[0]  # the traceback of the other process


def _die_first(folder: Path, job: int, on_progress: OnProgress) -> int:
    if not (folder / str(job)).exists():
        (folder / str(job)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * job


def test_a_job_whose_process_has_died_begins_again_as_often_as_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[tuple[int, str]] = []
    results = run_jobs(
        partial(_die_first, tmp_path),
        [1, 2],
        1,
        lambda _: None,
        retries=1,
        on_state=lambda i, state, _: states.append((i, state)),
    )
    assert results == [10, 20]
    assert [state for i, state in states if i == 0] == ["running", "waiting", "running", "done"]
    assert "job 1 of 2 begins again: its process was killed by SIGKILL" in caplog.text


def test_each_job_sees_as_many_gpus_as_it_has_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert workers_for(9, "cuda", each=2) == 2
    results = run_jobs(partial(_meet, tmp_path, 2), [0, 1], 2, lambda _: None, 1, gpus_each=2)
    found = [result for result in results if not isinstance(result, Exception)]
    assert {gpus for _, gpus, *_ in found} == {"2,3", "5,7"}


class _OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd {one} {two}")


def _fail_oddly(job: int, on_progress: OnProgress) -> None:
    raise _OddError(1, 2)


def test_an_exception_that_cannot_be_unpickled_is_still_reported() -> None:
    (found,) = run_jobs(_fail_oddly, [0], 1, lambda _: None)
    assert isinstance(found, RuntimeError)
    assert "_OddError: odd 1 2" in str(found)


PARENT = """
import sys, time
from pathlib import Path
from train.launch import run_jobs

def work(job, on_progress):
    (Path(sys.argv[1]) / "pid").write_text(str(__import__("os").getpid()))
    time.sleep(600)

if __name__ == "__main__":
    run_jobs(work, [0], 1, print)
"""


def test_a_worker_leaves_when_its_parent_is_killed_and_ignores_modules_of_the_current_folder(
    tmp_path: Path,
) -> None:
    script = tmp_path / "inner" / "parent.py"
    script.parent.mkdir()
    script.write_text(PARENT)
    for name in ("struct", "socket", "train", "random"):  # the user's own
        (tmp_path / f"{name}.py").write_text(
            "raise SystemExit(f'{__name__} of the current folder')"
        )
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    for _ in range(400):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the worker is still there")
