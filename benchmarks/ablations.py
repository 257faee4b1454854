"""The effect of each choice of a config (default: the built-in digits).

Every variant changes one thing of the config, trains again what that affects, at equal compute, and
is scored by Fréchet distance from the same noise. Writes ablations-NAME.json and ablations.md. If
interrupted, the same command resumes.
"""

import argparse
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.measurements import machine, made_by, rounded
from benchmarks.table.results_page import earlier
from ddm.artifacts import digest, read_json, write_json
from ddm.errors import ConfigError, one_of
from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import Batches
from router.targets import exact_posterior_rate
from train.config import Config, config_file, default_config, load_config
from train.evaluation.measure import Measurement
from train.evaluation.results import Evaluation
from train.run_folder import BUNDLED, settled
from train.stages.run import run as run_stages

log = logging.getLogger("ablations")

Words = Callable[[Config], Sequence[str] | None]


@dataclass(frozen=True)
class Variant:
    """A row: the change as `key=value` words, which may depend on the config that is changed; None
    if it does not apply to the config.
    """

    name: str
    words: Words


def _set(*words: str) -> Variant:
    return Variant(" ".join(words), lambda _: words)


def _times(key: str, factor: float) -> Variant:
    def words(config: Config) -> list[str]:
        section, *path = key.split(".")
        value = getattr(config, section)
        for name in path:
            value = getattr(value, name)
        return [f"{key}={round(value * factor)}"]

    return Variant(f"{key} × {factor:g}", words)


def _ema(power: float) -> Variant:
    """An EMA over `power` times as many steps."""
    return Variant(
        f"an EMA over {power:g} times as many steps",
        lambda config: [f"expert.ema_decay={1 - (1 - config.expert.ema_decay) / power:.6g}"],
    )


def _batches(factor: float) -> Variant:
    """The same number of images in batches of another size."""

    def words(config: Config) -> list[str]:
        batch, steps = round(config.expert.batch * factor), round(config.expert.steps / factor)
        return [f"expert.batch={batch}", f"expert.steps={steps}"]

    return Variant(f"expert.batch × {factor:g}, expert.steps × {1 / factor:g}", words)


def _seeded(name: str, *more: str) -> Variant:
    return Variant(name, lambda config: [*_half_in_a_seed_model(config), *more])


def _half_in_a_seed_model(config: Config) -> list[str]:
    steps = _expert_steps(config) // 2
    seed_steps = steps * _clusters(config)
    return [f"seed_model.steps={seed_steps}", "seed_model.above=null", f"expert.steps={steps}"]


def _none_in_a_seed_model(config: Config) -> list[str]:
    steps = _expert_steps(config)
    return ["seed_model.steps=0", "seed_model.above=null", f"expert.steps={steps}"]


def _half_on_faces(config: Config) -> list[str] | None:
    root = config.data.root
    if config.data.name != "cifar10" or not (Path(root) / "celeba_hq").exists():
        return None
    faces = json.dumps({"name": "celeba_hq", "root": root, "size": 32, "flip": config.data.flip})
    return [*_half_in_a_seed_model(config), f"seed_model.data={faces}"]


def _expert_steps(config: Config) -> int:
    """Steps per expert at equal total compute without a seed model."""
    return config.expert.steps + config.seed_model.steps // _clusters(config)


def _clusters(config: Config) -> int:
    return Partition.read(config.folder / "partition").k


def _other_k(k: int) -> Variant:
    """Another number of clusters; all experts together see the same number of images."""

    def words(config: Config) -> list[str]:
        steps = config.expert.steps * _clusters(config) // k
        return [f"partition.k={k}", f"expert.steps={steps}"]

    return Variant(f"K = {k}", words)


@torch.inference_mode()
def energy_bands(config: Config, images: int = 256, times: int = 64) -> list[float]:
    """The two times that divide `E |d alpha/dt|^2` over [t_min, 1] into thirds, measured on the
    training set.
    """
    cut = Partition.read(config.folder / "partition")
    whole = cut.all(config.folder / "partition")
    data = (whole["images"], whole["cluster"], schedule(**config.schedule), cut.k)
    batches = Batches(whole["images"], images, 0)
    x0, _place = batches.x0(0)
    low = config.router.t_min
    at = low + (1 - low) * (torch.arange(times, dtype=torch.float64) + 0.5) / times
    energy = []
    for step, t in enumerate(at):
        _, rate = exact_posterior_rate(x0, batches.noise(step), t, *data)
        energy.append(rate.square().sum(dim=1).mean())
    total = torch.stack(energy).double().cumsum(dim=0)
    return [float(at[(total >= total[-1] * part).nonzero()[0, 0]]) for part in (1 / 3, 2 / 3)]


def _bands(config: Config) -> list[str]:
    edges = ",".join(f"{t:.3f}" for t in energy_bands(config))
    return [f"router.bands=[{edges}]"]


_GRIDS = ("uniform_t", "uniform_log_snr", "quadratic")
GROUPS: dict[str, tuple[str, list[Variant]]] = {
    "chance": ("Chance: the same config with another training seed", [_set("seed=1")]),
    "parameterization": (
        "What the network predicts",
        [_set("expert.parameterization=raw"), _set("expert.parameterization=preconditioned")],
    ),
    "loss": (
        "The weight of the loss over t",
        [_set(f"expert.loss_weight={kind}") for kind in ("constant", "snr", "min_snr")],
    ),
    "times": (
        "The distribution of training times",
        [_set(f"expert.times={kind}") for kind in ("uniform", "uniform_log_snr", "logit_normal")],
    ),
    "batch": ("The same number of images in smaller batches", [_batches(1 / 2), _batches(1 / 4)]),
    "ema": ("The EMA of the weights", [_set("expert.ema_decay=0.0"), _ema(4)]),
    "flips": (
        "Mirrored images",
        [Variant("data.flip inverted", lambda config: [f"data.flip={not config.data.flip}"])],
    ),
    "seed": (
        "A seed model of half of the compute; at high noise, too; and experts of the rest alone",
        [
            _seeded("half of the steps in a seed model"),
            *(
                _seeded(" ".join(more), *more)
                for more in (
                    ("seed_model.above=0.6",),
                    ("seed_model.above=0.6", "expert.t_max=0.6"),
                    ("seed_model.above=0.3", "expert.t_max=0.3"),
                )
            ),
        ],
    ),
    "images of the seed model": (
        "What a seed model of half of the compute has seen",
        [
            _seeded("the images of all clusters"),
            Variant("other images: faces", _half_on_faces),
            _seeded("noisy ones alone", "seed_model.t_min=0.6"),
            _seeded(
                "noisy ones alone; it moves images at these t, and experts learn the others",
                "seed_model.t_min=0.6",
                "seed_model.above=0.6",
                "expert.t_max=0.6",
            ),
            Variant("no seed model", _none_in_a_seed_model),
        ],
    ),
    "dropout": ("Dropout", [_set("expert.unet.dropout=0.0"), _set("expert.unet.dropout=0.1")]),
    "clusters": (
        "Clusters",
        [
            Variant(
                "by k-means",
                lambda config: ["partition.by=kmeans", f"partition.k={_clusters(config)}"],
            ),
            _other_k(2),
            _other_k(10),
        ],
    ),
    "targets": (
        "The targets of the posterior net",
        [_set("router.posterior_weight=0.0"), _set("router.label_weight=0.0")],
    ),
    "router": (
        "The size of the router",
        [_times("router.net.channels", 0.5), _times("router.net.channels", 2)],
    ),
    "bands": (
        "The edges of the derivative nets' bands",
        [Variant("a third of the energy of d alpha/dt in each", _bands)],
    ),
    "temperature": (
        "The temperature of alpha",
        [_set(f"sample.temperature={value}") for value in (0.5, 0.8, 1.25)],
    ),
    "source": (
        "Where alpha comes from",
        [_set(f"sample.source={name}") for name in ("posterior", "analytic", "prior")],
    ),
    "sampler": (
        "Sampler and grid",
        [
            _set(f"sample.sampler={name}", f"sample.grid={grid}")
            for name, grid in product(("ddim", "dpmpp_2m", "unipc"), _GRIDS)
        ],
    ),
}


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
        target = config.folder / part
        source = base.folder / part
        both = [key for key in here | there if _is_of(key, keys) and key != BUNDLED]
        same = all(here.get(key) == there.get(key) for key in both)
        if same and source.exists() and not target.exists():
            shutil.copytree(source, target)


def _is_of(key: str, keys: Sequence[str]) -> bool:
    return any(key.startswith(of) if of.endswith(".") else key == of for of in keys)


def make(path: Path, names: Sequence[str], overrides: Sequence[str], folder: Path) -> Path:
    """Measure groups of ablations and return the record `folder/ablations-NAME.json`; its other
    groups stay.
    """
    base = load_config(path, overrides)
    run_stages(base, ("partition",))
    asked = {name: _asked(name, path, overrides, base) for name in names or GROUPS}
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


_INTRODUCTION = """# Ablations

The effect of each choice: one thing of a config is changed, and what it affects is trained again on
the same number of images. Fréchet distances, lower is better; in parentheses the difference from the
config as it is, per seed (below 0 is better). Chance, where it is measured, is another training seed:
for what is trained again, a smaller difference means nothing."""


def write_page(folder: Path) -> None:
    """Write `ablations.md` from the records in the folder."""
    (folder / "ablations.md").write_text(page(folder))
    print(page(folder))


def page(folder: Path) -> str:
    """`ablations.md`, from the records in the folder."""
    parts = [_INTRODUCTION]
    for file in sorted(folder.glob("ablations-*.json")):
        parts.append(_section(file.stem.removeprefix("ablations-"), read_json(file)))
    return "\n\n".join(parts) + "\n"


def _section(name: str, record: dict[str, Any]) -> str:
    base = record["base"]
    columns = list(base)
    steps = []
    for column in columns:
        steps.append(_column_title(column))
    values = [f"{mean(base[column]):.2f} ± {_deviation(base[column]):.2f}" for column in columns]
    parts = [
        f"## {name}\n\n    {record['command']}",
        *([earlier(record).strip()] if record.get("earlier") else []),
        f"{record['n']} images per cell and seed, {record['seeds']} seeds, "
        f"`sampler={record['sampler']}`; features: {record['features']}. "
        f"All experts together saw {record['images_seen']:,} images.",
        table(["", *steps], [["the config as it is", *values]]),
    ]
    for group, variants in record["groups"].items():
        rows = [_row(variant, base) for variant in variants]
        parts.append(table([GROUPS[group][0], *steps], rows))
    return "\n\n".join(parts)


def _column_title(column: str) -> str:
    """`balanced-cv, 10 steps` of `balanced-cv-10`; with `, pixels` of `balanced-cv-10-pixels`."""
    found = re.fullmatch(r"(.+)-(\d+)(?:-(.+))?", column)
    assert found is not None
    method, count, features = found.groups()
    return f"{method}, {count} steps" + (f", {features}" if features else "")


def _row(variant: dict[str, Any], base: dict[str, list[float]]) -> list[str]:
    """A variant's name, and its distance and difference from the base in each column."""
    if "default" in variant:
        return [f"{variant['name']} (as it is)", *("" for _ in base)]
    row = [variant["name"]]
    for column, before in base.items():
        after = variant["cells"][column]
        change = [b - a for a, b in zip(before, after, strict=True)]
        row.append(f"{mean(after):.2f} ({mean(change):+.2f} ± {_deviation(change):.2f})")
    return row


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


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
