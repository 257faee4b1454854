"""How the mixture and the single models compare over the steps that each expert takes.

All start from the seed model of CONFIG, which is trained once, as is the router, unless
`router.data=experts`. For every number of steps the experts take it, one model takes as many as all
of them together, and another as many as one of them: equal compute, and equal time where each expert
has a machine. For CONFIG's own number of steps its own run is used, with what has been sampled for
its table. Writes curve-NAME.json, curve.md and a figure for each kind of features. If interrupted,
the same command resumes.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.cli import Parser, config_of, run
from benchmarks.lab.markdown import table
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.compute import compute
from benchmarks.table.measurements import machine, rounded, seconds
from ddm.artifacts import digest, read_json, sha256, write_json
from ddm.errors import require
from train.config import Config
from train.evaluation.measure import Measurement
from train.evaluation.plots import COLOURS, STYLE, save
from train.evaluation.results import Spread
from train.evaluation.tables import shown
from train.run_folder import copy_part, read_partition, settled
from train.stages.denoiser import seed_stem
from train.stages.monolith import train_monoliths
from train.stages.run import run as run_stages
from train.time_spent import duration

METHODS = {
    "one-model": "one model, as many steps as all experts",
    "one-model-time": "one model, as many steps as one expert",
    "switching": "mixture, switching",
}
_FACTORS = (0.125, 0.25, 0.5, 1.0)  # of expert.steps


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("curve", __doc__)
    parser.add_argument("words", nargs="+", metavar="word", help="CONFIG and key=value overrides")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="of each expert; default an eighth, a quarter, half and all of expert.steps",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder to write to; default: %(default)s"
    )
    return run(parser, _make, words)


def _make(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_of(arguments.words)
    seed = config.seed_model
    require(seed.steps > 0, "seed_model.steps", "be above 0", seed.steps)
    require(seed.above in (None, 1), "seed_model.above", "be 1 or null", seed.above)
    asked = arguments.steps or [round(factor * config.expert.steps) for factor in _FACTORS]
    steps = sorted(set(asked))
    require(steps[0] >= 1, "--steps", "be at least 1", steps[0])
    words = [*arguments.words, "--steps", *map(str, steps)]
    write(config, steps, shlex.join(["python", "-m", "benchmarks.curve", *words]), arguments.out)


def write(config: Config, steps: Sequence[int], command: str, folder: Path) -> None:
    """Measure every number of steps; write the record, the page and the figures."""
    run_stages(config, ("partition", "seed_model"))
    if config.router.data != "experts":  # every branch has the same
        run_stages(config, ("router",))
    name = config.folder.name
    points = [point(config, count) for count in steps]
    files = _figures(folder, name, points)
    record = {
        "command": command,
        "config": settled(config),
        "config_hash": digest(settled(config)),
        "machine": machine(config.device),
        "n": config.table.n,
        "points": points,
        "files": {file: sha256(folder / file) for file in files},
    }
    write_json(folder / f"curve-{name}.json", rounded(record))
    (folder / "curve.md").write_text(page(folder))
    print(page(folder))


def point(config: Config, steps: int) -> dict[str, Any]:
    """What comes of that many steps of each expert: the operations and the seconds of training, and the
    Frechet distances by features, row, and number of the sampler's steps, of each seed.
    """
    branch = config  # the same experts would come of a branch
    if steps != config.expert.steps:
        branch = replace(
            config,
            run=f"{config.folder}-curve/{steps}",
            seed_model=replace(config.seed_model, steps=0),
            expert=replace(config.expert, steps=steps, init=str(seed_stem(config))),
        )
        run_stages(branch, ("partition",))
        if config.router.data != "experts":
            copy_part("router", config, branch)
    run_stages(branch, ("expert", "router", "bundle"))
    cfg = replace(config.table, methods=list(METHODS), samplers={})
    monoliths = train_monoliths(branch, cfg)
    found = Measurement(branch, monoliths, cfg, "table").make()
    counted = replace(branch, seed_model=config.seed_model)
    flop = compute(counted, read_partition(branch), monoliths)
    before = seconds(config, {})
    seed_model = {part: before[part] for part in before.keys() & {"seed_model"}}
    spent = seconds(branch, monoliths) | seed_model

    def distances(feature: str, row: str, n: int) -> list[float]:
        cells = [cell for cell in found.cells if (cell.method, cell.steps) == (row, n)]
        return [cell.scores[feature].frechet for cell in cells]

    return {
        "steps": steps,
        "flop": _by_row(flop, monoliths),
        "seconds": _by_row(spent, monoliths),
        "frechet": {
            feature: {
                row: {str(n): distances(feature, row, n) for n in found.steps} for row in METHODS
            }
            for feature in found.features
        },
    }


def _by_row(found: Mapping[str, float], monoliths: Iterable[str]) -> dict[str, float]:
    """What the seed model, the experts and the single models took, as far as it is known."""
    rows = {"seed_model": "seed_model", "switching": "experts", **{row: row for row in monoliths}}
    return {row: found[part] for row, part in rows.items() if part in found}


def _figures(folder: Path, name: str, points: Sequence[dict[str, Any]]) -> list[str]:
    """A figure for each kind of features, at the middle number of the sampler's steps."""
    files = []
    for feature, rows in points[0]["frechet"].items():
        steps = _middle(rows)
        axis = "training steps of each expert, after the seed model"
        if _time(points[0]):
            axis += "\nand the time of all together"
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(5.2, 3.4))
            for i, (row, label) in enumerate(METHODS.items()):
                spreads = [Spread.of(each["frechet"][feature][row][steps]) for each in points]
                axes.errorbar(
                    [each["steps"] * 1.02 ** (i - 1) for each in points],  # beside each other
                    [spread.mean for spread in spreads],
                    [spread.deviation or 0 for spread in spreads],
                    fmt="o-",
                    color=COLOURS[row],
                    label=label,
                    markersize=4,
                    linewidth=1.2,
                )
            axes.set_xscale("log")
            ticks = [f"{each['steps']:,}\n{_time(each)}" for each in points]
            axes.set_xticks([each["steps"] for each in points], ticks)
            axes.set_xticks([], minor=True)
            axes.set_xlabel(axis)
            axes.set_ylabel(f"Fréchet distance, {steps} steps")
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8.5)
            files.append(f"curve-{name}-{feature}.png")
            save(folder / files[-1], figure)
    return files


def _time(point: dict[str, Any]) -> str:
    """How long all experts were trained; empty if it is not known."""
    return duration(point.get("seconds", {}).get("switching", 0))


def _middle(rows: dict[str, dict[str, Any]]) -> str:
    steps = list(rows["switching"])
    return steps[len(steps) // 2]


_INTRODUCTION = """# The curve

Fréchet distances over the steps that each expert takes after the seed model: where the lines cross,
a mixture overtakes one model.
One model takes as many steps as all experts together (equal compute), another as many as one of
them (equal time, where each expert has a machine). Mean and deviation over the seeds of the
samples; training has one seed. All have the config's average and warm-up, which shorter trainings
profit less from: an EMA of 0.995 still has 29 % of what a training of 250 steps begins with, and
0.2 % after the 1,250 of the one model of equal compute. PFLOP, and time where the record has it,
are of all experts one after another, without the seed model's: the one model of equal compute costs
as much."""


def page(folder: Path) -> str:
    """`curve.md`, from the records in the folder."""
    parts = [_INTRODUCTION]
    for file in sorted(folder.glob("curve-*.json")):
        record = read_json(file)
        points = record["points"]
        time = duration(points[0].get("seconds", {}).get("seed_model", 0))
        seed = f"{points[0]['flop']['seed_model'] / 1e15:.3g} PFLOP"
        if time:
            seed += f", {time}"
        parts += [
            f"## {file.stem.removeprefix('curve-')}",
            f"    {record['command']}",
            f"The seed model: {seed}. {record['n']} images per seed.",
        ]
        for feature, rows in points[0]["frechet"].items():
            name = f"curve-{file.stem.removeprefix('curve-')}-{feature}.png"
            parts.append(f"![{feature}: distance over steps, a line per row]({name})")
            head = [f"{feature}, after N steps of the sampler", "N", *METHODS.values(), "PFLOP"]
            if _time(points[0]):
                head.append("time")
            parts.append(table(head, _rows(points, feature, list(rows["switching"]))))
    return "\n\n".join(parts) + "\n"


def _rows(
    points: Sequence[dict[str, Any]], feature: str, numbers: Sequence[str]
) -> list[list[str]]:
    timed = bool(_time(points[0]))
    return [
        [
            f"{each['steps']:,} steps of each expert",
            n,
            *(shown(Spread.of(each["frechet"][feature][row][n]), ".2f") for row in METHODS),
            f"{each['flop']['switching'] / 1e15:.3g}",
            *([_time(each)] if timed else []),
        ]
        for each in points
        for n in numbers
    ]


if __name__ == "__main__":
    sys.exit(main())
