"""Fresh processes from start to end: wall and CPU seconds, each the median of three. `first image`: of
the digits' five experts, from the start of the process until it is sampled, or until `python -m serve`
has answered with it.
"""

import os
import statistics
import subprocess
import sys
import time
from functools import partial

from benchmarks.load.child import server
from benchmarks.speed.digits_run import ROOT, digits_run
from benchmarks.speed.timing import Figures, Variant, shown_range

COMMANDS = {
    "python -m train --help": ["-m", "train", "--help"],
    "python -m train digits expert.stepz=3 (a typo)": ["-m", "train", "digits", "expert.stepz=3"],
    "python -m serve --help": ["-m", "serve", "--help"],
    "import serve": ["-c", "import serve"],
    "import torch, for comparison": ["-c", "import torch"],
}


def variants(_: str) -> list[Variant]:
    """The rows of the table."""
    rows = [Variant(name, partial(process, name, words), 1) for name, words in COMMANDS.items()]
    rows.append(Variant("first image, load(RUN).sample(1)", first_image, 1, needs_s=40))
    rows.append(Variant("first image, python -m serve RUN", first_served, 1, needs_s=40))
    return rows


def first_image(repeats: int = 3) -> Figures:
    """Seconds of a process that loads a run and samples one image."""
    program = f"from serve import load; load({str(digits_run())!r}).sample(1)"
    return process("first image", ["-c", program], repeats)


def first_served(repeats: int = 3) -> Figures:
    """Seconds from the start of a server until it has answered with an image."""
    wall = []
    for _ in range(repeats):
        with server(str(digits_run())) as (_, seconds):
            wall.append(seconds)
    return {"wall s": statistics.median(wall), "wall s range": shown_range(wall)}


def process(name: str, words: list[str], repeats: int = 3) -> Figures:
    """Seconds of `python *words`, run `repeats` times.

    Raises `RuntimeError` if it ends with another exit status than it should.
    """
    expected = 2 if "typo" in name else 0
    wall, cpu = [], []
    for _ in range(repeats):
        before = os.times()
        began = time.perf_counter()
        found = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        wall.append(time.perf_counter() - began)
        after = os.times()
        cpu.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        if found.returncode != expected:
            last = (found.stderr.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"exit status {found.returncode}: {last}")
    return {
        "wall s": statistics.median(wall),
        "wall s range": shown_range(wall),
        "CPU s": statistics.median(cpu),
        "CPU s range": shown_range(cpu),
    }
