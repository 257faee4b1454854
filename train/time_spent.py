"""How long networks have been trained, over all sittings, and on what: `time.json` beside each."""

import time
from pathlib import Path
from typing import NamedTuple

from ddm.artifacts import read_json, write_json
from ddm.device import device_name

FILE = "time.json"


class TimeSpent(NamedTuple):
    """Seconds of training, and the devices that it ran on, in words."""

    seconds: float
    devices: str


class Stopwatch:
    """Counts the seconds of a training in `folder` that starts now, or goes on after `done` steps.

    Nothing is written for one that was begun by a program which did not count.
    """

    def __init__(self, folder: Path, done: int, device: str) -> None:
        self.folder, self.device = folder, device_name(device)
        self.before = 0.0 if done == 0 else _seconds(folder / FILE)
        self.began = time.monotonic()

    def save(self) -> None:
        """Write the seconds until now: to be called with every checkpoint."""
        if self.before is not None:
            seconds = round(self.before + time.monotonic() - self.began, 1)
            write_json(self.folder / FILE, {"seconds": seconds, "device": self.device})


def time_spent(folder: Path) -> TimeSpent | None:
    """What the networks in a folder and in the folders in it took together; None if it is not known."""
    found = [read_json(file) for file in sorted([*folder.glob(FILE), *folder.glob(f"*/{FILE}")])]
    if not found:
        return None
    devices = dict.fromkeys(facts["device"] for facts in found)
    return TimeSpent(sum(facts["seconds"] for facts in found), ", ".join(devices))


def duration(seconds: float) -> str:
    """Seconds in the unit that is easiest to read; empty for 0."""
    if seconds == 0:
        return ""
    for unit, length in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < length:
            return f"{seconds:.2g} {unit}"
        seconds /= length if unit != "h" else 24
    return f"{seconds:.3g} days"


def _seconds(file: Path) -> float | None:
    return read_json(file)["seconds"] if file.exists() else None
