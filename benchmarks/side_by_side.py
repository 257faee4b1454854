"""python -m benchmarks.side_by_side [--experts 8] [--workers 2] [--seconds 30] [--folder runs/side_by_side]

Trains K equal experts on W workers of one core each, in processes of this machine and on a Ray that is started for it, and
compares with one such expert alone in this process, for which nothing has to start: K/W of its time is what W workers need
at least. One thread each. Prints the seconds and their ratio to K/W of the one expert's, which must be at most 1.15;
exits with status 1 if one is not. --seconds: of the one expert. About (1 + 2 K/W) times that, and half a minute for Ray.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import Parser, run
from ddm.artifacts import sha256
from ddm.errors import ConfigError, require
from train.config import Config, default_config, load_config
from train.launch import cores
from train.stages.expert import train_experts
from train.stages.partition import make_partition

MOST = 1.15  # of K/W of one expert's time
_FEW = 40  # steps, to know what a step takes


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a ratio is above `MOST`."""
    parser = Parser("side_by_side", __doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/side_by_side"))
    ratios: dict[str, float] = {}
    status = run(parser, lambda arguments: ratios.update(_measure(arguments)), words)
    return status or int(any(ratio > MOST for ratio in ratios.values()))


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    k, workers, folder = arguments.experts, arguments.workers, arguments.folder
    require(2 <= k <= 10, "--experts", "be in [2, 10]: the digits are cut by label", k)
    require(1 <= workers <= cores(), "--workers", f"be in [1, {cores()}], a core each", workers)
    require(arguments.seconds > 0, "--seconds", "be above 0", arguments.seconds)
    if folder.exists():
        raise ConfigError(f"--folder must not exist yet, got {folder}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    def config(name: str, *words: str) -> Config:
        fixed = [f"run={folder / name}", "accelerator=cpu", f"partition.k={k}", "expert.threads=1"]
        return load_config(default_config(), [*fixed, *words])

    def seconds(name: str, *words: str) -> float:
        asked = config(name, *words)
        make_partition(asked)
        began = time.perf_counter()
        train_experts(asked)
        return time.perf_counter() - began

    seconds("first", "expert.index=0", "expert.steps=1", "expert.warmup_steps=0")  # imports
    each = seconds("few", "expert.index=0", f"expert.steps={_FEW}") / _FEW
    steps = f"expert.steps={max(_FEW, round(arguments.seconds / each))}"
    one = seconds("one", "expert.index=0", steps)
    side = [steps, f"expert.workers={workers}"]
    found = {
        "processes": seconds("processes", *side),
        "ray": seconds("ray", *side, "launch.backend=ray", "launch.cpus=1"),
    }
    _check_same(folder, k)
    least = k / workers * one
    ratios = {name: found[name] / least for name in found}
    print(
        f"one expert alone, {steps.removeprefix('expert.')}: {one:.1f} s; K/W of it: {least:.1f} s"
    )
    for name, ratio in ratios.items():
        print(f"{k} experts on {workers} workers, {name}: {found[name]:.1f} s, ratio {ratio:.3f}")
    record = {"experts": k, "workers": workers, "one_s": one, "seconds": found, "ratios": ratios}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("first", "few"):
        shutil.rmtree(folder / name)
    return ratios


def _check_same(folder: Path, k: int) -> None:
    """The experts are the same to the bit, however they were trained."""
    files = [f"experts/{i:02d}/expert.safetensors" for i in range(k)]
    found = [[sha256(folder / name / file) for file in files] for name in ("processes", "ray")]
    assert found[0] == found[1]
    assert sha256(folder / "one" / files[0]) == found[0][0]


if __name__ == "__main__":
    sys.exit(main())
