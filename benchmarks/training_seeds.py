"""What training with another seed changes: the table of CONFIG for several training seeds.

The table of the config's own seed is NAME.json in the folder of results, if it is this config's.
The others are made: in RUN/table for the own seed, in RUN-SEED/table for another, which trains in
RUN-SEED. Writes training-seeds-NAME.json and training-seeds.md. If interrupted, the same command
resumes.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cli import Parser, config_of, run
from benchmarks.lab.markdown import table
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.measurements import made_by, make, rounded
from benchmarks.table.results_page import COMPARISONS, signed, write_page
from ddm.artifacts import digest, read_json, write_json
from ddm.errors import require
from train.config import Config
from train.evaluation.results import Evaluation, Spread
from train.evaluation.tables import shown
from train.run_folder import settled


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("training_seeds", __doc__)
    parser.add_argument("words", nargs="+", metavar="word", help="CONFIG and key=value overrides")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of the training, the key `seed`; default: 0 1 2",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder to write to; default: %(default)s"
    )
    return run(parser, _make, words)


def _make(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = config_of(arguments.words)
    seeds = sorted(set(arguments.seeds))
    require(len(seeds) > 1, "--seeds", "be two or more different ones", arguments.seeds)
    require(seeds[0] >= 0, "--seeds", "be 0 or more", seeds[0])
    records = [_record(config, seed, arguments.words, arguments.out) for seed in seeds]
    name = config.folder.name
    record = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.training_seeds", *arguments.words, "--seeds"]
            + [str(seed) for seed in seeds]
        ),
        "config": settled(config),
        "config_hash": digest(settled(config)),
        "machines": [each["machine"] for each in records],
        "training_precisions": [each["training_precision"] for each in records],
        "training_seeds": seeds,
        **_distances([Evaluation.of(each) for each in records]),
    }
    write_json(arguments.out / f"training-seeds-{name}.json", rounded(record))
    text = page(arguments.out)
    (arguments.out / "training-seeds.md").write_text(text)
    print(text)


def _record(config: Config, seed: int, words: Sequence[str], out: Path) -> dict[str, Any]:
    """The table's record of one training seed, measured unless it is there."""
    more: list[str] = []
    if seed != config.seed:
        config = replace(config, seed=seed, run=f"{config.folder}-{seed}")
        more = [f"seed={seed}", f"run={config.folder}"]
    name, own = f"{config.folder.name}.json", config.folder / "table"
    for path in (out / name, own / name):
        if _is_whole(path, config):
            return read_json(path)
    command = shlex.join(["python", "-m", "benchmarks.table", *words, *more])
    path = make(config, command, own)
    write_page(path)
    return read_json(path)


def _is_whole(path: Path, config: Config) -> bool:
    """Whether a table's record is there with its page, and the config's as the program now is."""
    if not path.exists() or not path.with_suffix(".md").exists():
        return False
    record = read_json(path)
    return not record.get("earlier") and made_by(record, config)


def _distances(tables: Sequence[Evaluation]) -> dict[str, Any]:
    """The Frechet distances by features, sampler, row, and number of the sampler's steps: for each
    training seed those of the samples' seeds.
    """
    first = tables[0]

    def of(feature: str, sampler: str, row: str, steps: int) -> list[list[float]]:
        wanted = (sampler, row, steps)
        return [
            [
                cell.scores[feature].frechet
                for cell in each.cells
                if (cell.sampler, cell.method, cell.steps) == wanted
            ]
            for each in tables
        ]

    return {
        "n": first.n,
        "floor": {
            feature: [each.features[feature].floor for each in tables] for feature in first.features
        },
        "frechet": {
            feature: {
                sampler: {
                    row: {
                        str(steps): of(feature, sampler, row, steps)
                        for steps in first.steps
                        if of(feature, sampler, row, steps)[0]
                    }
                    for row in first.versions
                }
                for sampler in first.samplers
            }
            for feature in first.features
        },
    }


_INTRODUCTION = """# Training seeds

Everything is trained again with other seeds: the seed model, the experts, the router and the single
models, on other held-out images and, with k-means, other clusters. Every figure is the mean over
the training seeds, ± the standard deviation over them, of what `python -m benchmarks.table`
measures: Fréchet distances, each the mean over seeds of samples. The noise of the samples is the
same for all rows and training seeds."""


def page(folder: Path) -> str:
    """`training-seeds.md`, from the records in the folder."""
    parts = [_INTRODUCTION]
    for file in sorted(folder.glob("training-seeds-*.json")):
        record = read_json(file)
        seeds = record["training_seeds"]
        *before, last = map(str, seeds)
        parts += [
            f"## {file.stem.removeprefix('training-seeds-')}",
            f"    {record['command']}",
            f"Training seeds {', '.join(before)} and {last}; {record['n']} images per seed of samples;"
            f" {_conditions(record)}.",
        ]
        for feature, samplers in record["frechet"].items():
            for sampler, rows in samplers.items():
                steps = sorted({n for row in rows.values() for n in row}, key=int)
                titles = [f"{n} steps" for n in steps]
                floors = [mean(each) for each in record["floor"][feature] if each]
                floor = shown(Spread.of(floors), ".2f") if floors else "–"
                parts += [
                    f"### {feature}, {sampler}",
                    table(["", *titles], [[row, *_means(rows[row], steps)] for row in rows]),
                    f"{record['n']} real images have {floor}.",
                    "Differences, below 0 the first is better; ± the standard deviation over the"
                    " training seeds / over the seeds of samples, whose noise all trainings share; in"
                    " brackets the difference of each training seed:",
                    table(["", *titles], _differences(rows, steps)),
                ]
    return "\n\n".join(parts) + "\n"


def _conditions(record: dict[str, Any]) -> str:
    """The machines and the precisions of the trainings, each one once."""
    devices = {each["device"] for each in record["machines"]}
    return f"{', '.join(sorted({*record['training_precisions']}))} on {', '.join(sorted(devices))}"


def _means(row: dict[str, list[list[float]]], steps: Sequence[str]) -> list[str]:
    return [
        shown(Spread.of([mean(each) for each in row[n]]), ".2f") if n in row else "–" for n in steps
    ]


def _differences(
    rows: dict[str, dict[str, list[list[float]]]], steps: Sequence[str]
) -> list[list[str]]:
    """A line for each comparison of the table whose two rows were measured."""
    return [
        [f"{a} − {b}", *(_difference(rows[a], rows[b], n) for n in steps)]
        for a, b, _ in COMPARISONS
        if a in rows and b in rows
    ]


def _difference(
    a: dict[str, list[list[float]]], b: dict[str, list[list[float]]], steps: str
) -> str:
    if steps not in a or steps not in b:
        return "–"
    apart = [
        [one - other for one, other in zip(first, second, strict=True)]
        for first, second in zip(a[steps], b[steps], strict=True)
    ]
    each = [mean(values) for values in apart]
    of_samples = Spread.of([mean(values) for values in zip(*apart, strict=True)])
    beside = "" if of_samples.deviation is None else f" / {of_samples.deviation:.2f}"
    return f"{signed(Spread.of(each))}{beside} ({', '.join(f'{value:+.2f}' for value in each)})"


if __name__ == "__main__":
    sys.exit(main())
