"""The effect of each choice of a config (default: the built-in digits).

Every variant changes one thing of the config, trains again what that affects, at equal compute, and
is scored by Fréchet distance from the same noise. Writes ablations-NAME.json and ablations.md. If
interrupted, the same command resumes.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ablations.ablations_page import write_page
from benchmarks.ablations.variants import GROUPS
from benchmarks.cli import Parser, run
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.measurements import machine, made_by, rounded
from ddm.artifacts import digest, read_json, write_json
from ddm.errors import ConfigError, one_of
from train.config import Config, config_file, default_config, load_config
from train.evaluation.measure import Measurement
from train.evaluation.results import Evaluation
from train.run_folder import BUNDLED, copy_part, settled
from train.stages.run import run as run_stages

log = logging.getLogger("ablations")

# The keys that each part of a run depends on: a variant that changes none of them copies the part.
_IMAGES = ("seed", "data.", "partition.")
_NETWORKS = (*_IMAGES, "schedule.", "expert.", "seed_model.")
_PARTS = {
    "partition": _IMAGES,
    "seed_model": _NETWORKS,
    "experts": _NETWORKS,
    "router": (*_IMAGES, "schedule.", "router."),
}
METHODS = ["switching"]


def measured(path: Path, words: Sequence[str], base: Config | None) -> Evaluation:
    """The figures of a variant; parts of its run that equal the base's are copied from there."""
    config = load_config(path, words)
    steps = config.table.steps[:2]
    cfg = replace(config.table, methods=METHODS, samplers={}, steps=steps)
    # The trajectory error is not used: make it cheap.
    cfg = replace(cfg, trajectories=1, reference_steps=max(steps) + 1)
    if base is not None:
        _copy_same_parts(config, base)
    run_stages(config, ("partition", "seed_model", "expert", "router", "bundle"))
    return Measurement(config, {}, cfg, "ablation").make()


def _copy_same_parts(config: Config, base: Config) -> None:
    here = settled(config)
    there = settled(base)
    for part, keys in _PARTS.items():
        of_experts = part == "router" and "experts" in (config.router.data, base.router.data)
        on = (*keys, *_NETWORKS) if of_experts else keys
        both = [key for key in here | there if _is_of(key, on) and key != BUNDLED]
        same = all(here.get(key) == there.get(key) for key in both)
        if same:
            copy_part(part, base, config)


def _is_of(key: str, keys: Sequence[str]) -> bool:
    return any(key.startswith(of) if of.endswith(".") else key == of for of in keys)


def make(path: Path, names: Sequence[str], overrides: Sequence[str], folder: Path) -> Path:
    """Measure groups of ablations and return the record `folder/ablations-NAME.json`; its other
    groups stay.
    """
    base = load_config(path, overrides)
    run_stages(base, ("partition",))
    asked = {name: _asked(name, path, overrides, base) for name in names or GROUPS}
    _check_features(base, asked)
    evaluation = measured(path, overrides, None)
    home = base.folder.with_name(f"{base.folder.name}-ablations")
    file = folder / f"ablations-{base.folder.name}.json"
    before = read_json(file) if file.exists() else None
    rows: dict[str, Any] = {}
    if before is not None and made_by(before, base):
        rows = {name: before["groups"][name] for name in GROUPS if name in before["groups"]}
    for name, variants in asked.items():
        rows[name] = []
        for title, words in variants.items():
            if settled(load_config(path, [*overrides, *words])) == settled(base):
                rows[name].append({"name": title, "words": words, "default": True})
                continue
            log.info("%s: %s", name, title)
            run = f"run={home / digest(words)[:8]}"
            found = measured(path, [*overrides, *words, run], base)
            rows[name].append({"name": title, "words": words, "cells": _cells(found)})
        record = {
            "command": shlex.join(
                ["python", "-m", "benchmarks.ablations", str(path), *_named(rows), *overrides]
            ),
            "config": settled(base),
            "config_hash": digest(settled(base)),
            "features": "; ".join(of.what for of in evaluation.features.values()),
            "n": evaluation.n,
            "seeds": evaluation.seeds,
            "sampler": base.sample.sampler,
            "images_seen": evaluation.images_seen[METHODS[0]],
            "machine": machine(base.device),
            "base": _cells(evaluation),
            "groups": {group: rows[group] for group in GROUPS if group in rows},
        }
        write_json(file, rounded(record))
    return file


def _asked(name: str, path: Path, overrides: Sequence[str], base: Config) -> dict[str, list[str]]:
    """The words of the variants of a group that apply to the config, by their titles.

    Raises `ConfigError` if one of them makes no config, before any is trained.
    """
    found = {}
    for variant in GROUPS[name][1]:
        words = variant.words(base)
        if words is None:
            log.info("%s: left out: %s", name, variant.name)
            continue
        load_config(path, [*overrides, *words])
        found[variant.name] = list(words)
    return found


def _check_features(base: Config, asked: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Raise `ConfigError` for a classifier of clusters that a variant changes: distances would be of other features."""
    if "classifier" not in base.table.features or base.data.build().labels is not None:
        return
    for variants in asked.values():
        for title, words in variants.items():
            if any(word.startswith(("seed=", "partition.")) for word in words):
                raise ConfigError(
                    "table.features must be without classifier for images without labels, whose clusters "
                    f"{title!r} changes, got {' '.join(base.table.features)}",
                    "table.features",
                )


def _named(rows: Collection[str]) -> list[str]:
    """The groups that a command must name to measure these."""
    return [] if set(rows) == set(GROUPS) else [name for name in GROUPS if name in rows]


def _cells(evaluation: Evaluation) -> dict[str, list[float]]:
    """Fréchet distances, one per seed, by `METHOD-STEPS`, and `METHOD-STEPS-FEATURES` for all but
    the first features.
    """
    found: dict[str, list[float]] = {}
    first, *others = evaluation.features
    for features in (first, *others):
        suffix = "" if features == first else f"-{features}"
        for cell in evaluation.cells:
            column = f"{cell.method}-{cell.steps}{suffix}"
            found.setdefault(column, []).append(cell.scores[features].frechet)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    groups = ", ".join(f"'{name}'" if " " in name else name for name in GROUPS)
    parser = Parser("ablations", f"{__doc__}\nGroups: {groups}")
    help_text = (
        "CONFIG, a YAML file or a shipped name; names of groups, default all; key=value overrides"
    )
    parser.add_argument("words", nargs="*", metavar="word", help=help_text)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder to write to; default: %(default)s"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="only write ablations.md from the records there"
    )
    return run(parser, _make_all, words)


def _make_all(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [word for word in arguments.words if "=" in word]
    plain = [word for word in arguments.words if "=" not in word]
    paths = [path for word in plain if (path := config_file(word)) is not None]
    groups = [word for word in plain if config_file(word) is None]
    if len(paths) > 1 or (arguments.page is not None and arguments.words):
        raise ConfigError("give at most one config, groups and key=value words, or --page alone")
    for group in groups:
        if group not in GROUPS:
            raise one_of("group", group, tuple(GROUPS))
    if arguments.page is not None:
        write_page(arguments.page)
        return
    make(paths[0] if paths else default_config(), groups, overrides, arguments.out)
    write_page(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
