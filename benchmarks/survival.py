"""python -m benchmarks.survival [CONFIG] [--kills 20] [--seed 0] [--folder runs/survival] [key=value ...]

Kills a run from partition to bundle at random moments with SIGKILL, starts it again each time, and
compares: its files with those of a run that nothing interrupted; the step at which each network
resumes with its last checkpoint; and no process may be left. A run that ends before the last kill is compared
and begun anew. Exits with status 1 if anything differs. About ten minutes on two cores.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cli import Parser, run
from ddm.artifacts import digest, sha256
from ddm.errors import ConfigError, DdmError, require
from train.lock import NAME as LOCK
from train.resume import NEWEST, read_resume

STAGES = ("partition", "expert", "router", "bundle")
_CONFIG = (
    "digits",
    "expert.steps=150",
    "expert.batch=32",
    "expert.checkpoint_every=10",
    "router.steps=120",
    "router.switch_step=40",
    "router.batch=48",
    "router.checkpoint_every=10",
)
_LEAVE_S = 30.0  # for the workers of a killed process
_RESUMES = re.compile(r"^(.*) resumes at step (\d+)$", re.MULTILINE)


@dataclass
class Tally:
    """What was seen in all runs."""

    kills: int = 0
    runs: int = 0
    resumed: int = 0
    repeated: list[int] = field(default_factory=list)  # steps after a checkpoint, trained again
    faults: list[str] = field(default_factory=list)
    slowest_exit_s: float = 0.0


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("survival", __doc__)
    parser.add_argument("words", nargs="*", help="a config and key=value, as for python -m train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/survival"))
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    if not Path("/proc/self/stat").exists():
        raise ConfigError(
            "this benchmark finds the processes that are left in /proc: it needs Linux"
        )
    require(arguments.kills >= 1, "--kills", "be at least 1", arguments.kills)
    words = arguments.words or [*_CONFIG]
    base: Path = arguments.folder
    if base.exists():
        raise ConfigError(f"--folder must not exist yet, got {base}")
    delays, tally = random.Random(arguments.seed), Tally()
    began = time.monotonic()
    _finished(_start(base / "whole", words), base / "whole")
    whole_s = time.monotonic() - began
    longest_s = 3 * whole_s / max(1, arguments.kills)  # from the first change to the kill
    expected = _outputs(base / "whole")
    folder = base / "0"
    while True:
        before = _state(folder)
        began = time.time()
        process = _start(folder, words)
        if tally.kills < arguments.kills:
            _wait_for_a_change(folder, process, began)
            _wait(process, delays.uniform(0, longest_s))
            process.kill()
        killed = process.wait() == -signal.SIGKILL
        _note_processes(process.pid, tally)
        _note_resumes(folder, before, began, tally)
        if killed:
            tally.kills += 1
            continue
        _finished(process, folder)
        tally.runs += 1
        _compare(_outputs(folder), expected, folder, tally)
        if tally.kills >= arguments.kills:
            break
        shutil.rmtree(folder)
        folder = base / str(tally.runs)
    print(
        f"{tally.kills} kills, {tally.runs} runs, {len(expected)} files in each; networks resumed "
        f"{tally.resumed} times; steps trained again after a checkpoint: {sum(tally.repeated)} in all, "
        f"at most {max(tally.repeated, default=0)} after one kill; the last process was gone "
        f"{tally.slowest_exit_s:.1f} s after the kill at the latest; {len(tally.faults)} faults"
    )
    if tally.faults:
        raise DdmError("; ".join(tally.faults))


def _start(folder: Path, words: list[str]) -> "subprocess.Popen[bytes]":
    """The command as a user gives it, in a process group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "train", *words, *STAGES, f"run={folder}"],
            stderr=log,
            stdout=log,
            start_new_session=True,
        )


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _finished(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    try:
        process.wait()
    finally:
        process.kill()  # ctrl-C does not reach its process group
    if process.returncode != 0:
        raise DdmError(
            f"training ended with status {process.returncode}: {_log(folder).read_text()}"
        )


def _outputs(folder: Path) -> dict[str, str]:
    """The hash of every file that a run leaves, but for its config, scratch, and what tells times and losses.

    That of a checkpoint is over what it holds: pickling writes the same in several ways.
    """
    passed_over = ("config.yaml", "losses.txt", "time.json", "history.json", "README.md")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and path.name not in passed_over and not hidden:
            resume = path.name == NEWEST
            found[str(name)] = (
                digest(_content(read_resume(path.parent))) if resume else sha256(path)
            )
    return found


def _content(value: Any) -> Any:
    """What a checkpoint holds, as plain data."""
    if isinstance(value, Tensor):
        return hashlib.sha256(
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    if isinstance(value, dict):
        return [[str(key), _content(part)] for key, part in sorted(value.items(), key=str)]
    if isinstance(value, list | tuple):
        return [_content(part) for part in value]
    return repr(value)


def _compare(found: dict[str, str], expected: dict[str, str], folder: Path, tally: Tally) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            tally.faults.append(f"{folder / name} is not that of the run without kills")
    print(f"run {tally.runs} has ended after {tally.kills} kills in all", flush=True)


@dataclass
class _State:
    """What a killed run has: the step of each network's checkpoint, its last step, and what is made."""

    saved: dict[Path, int]
    last: dict[Path, int]
    made: dict[Path, int]  # when it was written, in ns


def _state(folder: Path) -> _State:
    saved: dict[Path, int] = {}
    for place in {path.parent for path in folder.rglob("resume*.ckpt")}:
        checkpoint = read_resume(place)
        assert checkpoint is not None
        saved[place] = int(checkpoint["global_step"])
    last = {}
    for losses in folder.rglob("losses.txt"):
        lines = losses.read_text().splitlines()
        last[losses.parent] = int(lines[-1].split()[0]) if lines else 0
    networks = [*folder.glob("experts/*/expert.json"), *folder.glob("router/router.json")]
    made = {path: path.stat().st_mtime_ns for path in networks}
    return _State(saved, last, made)


def _note_resumes(folder: Path, before: _State, began: float, tally: Tally) -> None:
    """Compare what the process that has just ended trained with what there was before it."""
    log = _log(folder).read_text()
    resumed = {Path(place): int(step) for place, step in _RESUMES.findall(log)}
    for place, step in resumed.items():
        tally.resumed += 1
        if step != before.saved.get(place):
            tally.faults.append(f"{place} resumed at {step}, saved was {before.saved.get(place)}")
        tally.repeated.append(max(0, before.last.get(place, 0) - step))
    for place in before.saved.keys() - resumed.keys():
        losses = place / "losses.txt"
        if losses.exists() and losses.stat().st_mtime > began:
            tally.faults.append(f"{place} was trained anew, saved was {before.saved[place]}")
    for path, written in before.made.items():
        if not path.exists() or path.stat().st_mtime_ns != written:
            tally.faults.append(f"{path} was made again")


def _note_processes(group: int, tally: Tally) -> None:
    """Wait for all processes of a group to end; one that stays is a fault."""
    began = time.monotonic()
    while left := _alive(group):
        if time.monotonic() - began > _LEAVE_S:
            tally.faults.append(f"processes {left} were left by {group}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)
    tally.slowest_exit_s = max(tally.slowest_exit_s, time.monotonic() - began)


def _alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(owner) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def _wait_for_a_change(folder: Path, process: "subprocess.Popen[bytes]", since: float) -> None:
    while process.poll() is None and not any(_changed(path) > since for path in folder.rglob("*")):
        time.sleep(0.02)


def _changed(path: Path) -> float:
    # The lock is taken before there is anything to lose.
    try:
        return path.stat().st_mtime if path.is_file() and path.name != LOCK else 0.0
    except FileNotFoundError:
        return 0.0


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


if __name__ == "__main__":
    sys.exit(main())
