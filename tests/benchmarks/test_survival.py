"""What `benchmarks.survival` calls a fault."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import survival
from benchmarks.survival import (
    Tally,
    _compare,
    _note_processes,
    _note_resumes,
    _outputs,
    _State,
)
from train.resume import ResumeFiles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one expert whose checkpoint is of step 40 and that has reached 47."""
    folder = tmp_path / "0"
    (folder / "experts" / "00").mkdir(parents=True)
    (folder / "experts" / "00" / "losses.txt").write_text("40 1.0\n47 0.9\n")
    return folder


def seen(run: Path, log: str, since: float, made: dict[Path, int] | None = None) -> Tally:
    tally = Tally()
    run.with_name("0.log").write_text(log)
    expert = run / "experts" / "00"
    _note_resumes(run, _State({expert: 40}, {expert: 47}, made or {}), since, tally)
    return tally


def test_a_network_must_resume_at_its_checkpoint(run: Path) -> None:
    good = seen(run, f"words\n{run}/experts/00 resumes at step 40\n", 0)
    assert (good.faults, good.resumed, good.repeated) == ([], 1, [7])
    bad = seen(run, f"{run}/experts/00 resumes at step 30\n", 0)
    assert bad.faults == [f"{run}/experts/00 resumed at 30, saved was 40"]
    anew = seen(run, "", time.time() - 3600)
    assert anew.faults == [f"{run}/experts/00 was trained anew, saved was 40"]
    assert seen(run, "", time.time() + 3600).faults == []  # killed before it was its turn


def test_a_finished_network_must_stay(run: Path) -> None:
    path = run / "experts" / "00" / "expert.json"
    path.write_text("{}")
    written = path.stat().st_mtime_ns
    os.utime(path, ns=(written, written - 1))
    assert seen(run, f"{run}/experts/00 resumes at step 40", 0, {path: written}).faults == [
        f"{path} was made again"
    ]


def test_other_bytes_and_missing_files_are_faults(tmp_path: Path) -> None:
    tally = Tally()
    _compare({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, tmp_path, tally)
    assert [fault.split()[0] for fault in tally.faults] == [f"{tmp_path}/b", f"{tmp_path}/c"]


def test_checkpoints_are_compared_by_what_they_hold_and_scratch_is_not(tmp_path: Path) -> None:
    weights = torch.arange(4.0)
    twice, once = ["a" * 300] * 2, ["a" * 300, "".join(["a"] * 300)]
    for folder, words, shift in (("1", twice, 0.0), ("2", once, 0.0), ("3", twice, 1.0)):
        content = {"state_dict": {"w": weights + shift}, "words": words, "step": torch.tensor(3)}
        ResumeFiles(None, "").save_checkpoint(content, tmp_path / folder / "resume.ckpt")
        (tmp_path / folder / ".bundle.1.part").mkdir()
        (tmp_path / folder / ".bundle.1.part" / "expert.json").write_text(folder)
    one, two, three = (_outputs(tmp_path / name) for name in "123")
    files = [(tmp_path / name / "resume.ckpt").read_bytes() for name in "12"]
    assert files[0] != files[1]
    assert one == two != three
    assert list(one) == ["resume.ckpt"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_stays_is_a_fault_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survival, "_LEAVE_S", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        tally = Tally()
        _note_processes(process.pid, tally)
    assert tally.faults == [f"processes [{process.pid}] were left by {process.pid}"]
    tally = Tally()
    _note_processes(process.pid, tally)
    assert tally.faults == []
