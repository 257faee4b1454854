"""python -m benchmarks.ablations [CONFIG] [name ...] [--out=FOLDER]
python -m benchmarks.ablations --page=FOLDER

What each choice of a config is worth: every variant changes one thing of CONFIG (default the built-in digits), trains what that
touches anew, at equal compute, and is scored by Frechet distance from the same noise. The names are those of GROUPS; none named
means all. Writes ablations-NAME.json and ablations.md into FOLDER (default docs/results); cut off, the same command resumes.
"""

import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.lab.markdown import table
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.measurements import machine, rounded
from ddm.artifacts import digest, read_json, write_json
from ddm.errors import ConfigError, DdmError
from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import Batches
from router.targets import exact_posterior_rate
from train.config import Config, load_config
from train.evaluation.measure import Measurement
from train.evaluation.report import first_score
from train.evaluation.results import Evaluation
from train.run_folder import settled
from train.stages.run import run

log = logging.getLogger("ablations")

Words = Callable[[Config], Sequence[str]]


@dataclass(frozen=True)
class Variant:
    """A row: what is changed, as `key=value` words that may depend on the config that is changed."""

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
    """An average over `power` times as many steps."""
    return Variant(
        f"an average over {power:g} times as many steps",
        lambda config: [f"expert.ema_decay={1 - (1 - config.expert.ema_decay) / power:.6g}"],
    )


def _batches(factor: float) -> Variant:
    """As many images in batches of another size."""

    def words(config: Config) -> list[str]:
        batch, steps = round(config.expert.batch * factor), round(config.expert.steps / factor)
        return [f"expert.batch={batch}", f"expert.steps={steps}"]

    return Variant(f"expert.batch × {factor:g}, expert.steps × {1 / factor:g}", words)


@torch.inference_mode()
def energy_bands(config: Config, images: int = 256, times: int = 64) -> list[float]:
    """The two times that cut `E |d alpha/dt|^2` over [t_min, 1] into thirds, measured on the training set."""
    cut = Partition.read(config.folder / "partition")
    whole = cut.all(config.folder / "partition")
    process, batches = schedule(**config.schedule), Batches(whole["images"], images, 0)
    x0, _place = batches.x0(0)
    low = config.router.t_min
    at = low + (1 - low) * (torch.arange(times, dtype=torch.float64) + 0.5) / times
    energy = [
        exact_posterior_rate(
            x0, batches.noise(step), t, whole["images"], whole["cluster"], process, cut.k
        )[1]
        .square()
        .sum(dim=1)
        .mean()
        for step, t in enumerate(at)
    ]
    share = torch.stack(energy).double().cumsum(dim=0)
    return [float(at[(share >= share[-1] * part).nonzero()[0, 0]]) for part in (1 / 3, 2 / 3)]


GROUPS: dict[str, tuple[str, list[Variant]]] = {
    "chance": ("Chance: the same config with another seed of training", [_set("seed=1")]),
    "parameterization": (
        "What the network predicts",
        [_set("expert.parameterization=raw"), _set("expert.parameterization=preconditioned")],
    ),
    "loss": (
        "The weight of the loss over t",
        [_set(f"expert.loss_weight={kind}") for kind in ("constant", "snr", "min_snr")],
    ),
    "times": (
        "At which times an expert learns",
        [_set(f"expert.times={kind}") for kind in ("uniform", "uniform_log_snr", "logit_normal")],
    ),
    "batch": ("As many images in smaller batches", [_batches(1 / 2), _batches(1 / 4)]),
    "ema": ("The average of the weights", [_set("expert.ema_decay=0.0"), _ema(4)]),
    "flips": (
        "Mirrored images",
        [Variant("data.flip the other way", lambda config: [f"data.flip={not config.data.flip}"])],
    ),
    "dropout": ("Dropout", [_set("expert.unet.dropout=0.0"), _set("expert.unet.dropout=0.1")]),
    "clusters": (
        "Clusters",
        [
            Variant(
                "by k-means instead",
                lambda config: [
                    "partition.by=kmeans",
                    f"partition.k={Partition.read(config.folder / 'partition').k}",
                ],
            ),
            # The same number of images seen by all experts together.
            *(
                Variant(
                    f"K = {k}",
                    lambda config, k=k: [  # type: ignore[misc]
                        f"partition.k={k}",
                        f"expert.steps={config.expert.steps * Partition.read(config.folder / 'partition').k // k}",
                    ],
                )
                for k in (2, 10)
            ),
        ],
    ),
    "targets": (
        "What the posterior net learns from",
        [_set("router.posterior_weight=0.0"), _set("router.label_weight=0.0")],
    ),
    "router": (
        "The size of the router",
        [_times("router.net.channels", 0.5), _times("router.net.channels", 2)],
    ),
    "bands": (
        "The edges of the derivative nets' bands",
        [
            Variant(
                "a third of the energy of d alpha/dt each",
                lambda config: [
                    f"router.bands=[{','.join(f'{t:.3f}' for t in energy_bands(config))}]"
                ],
            )
        ],
    ),
    "temperature": (
        "Temperature of alpha",
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
            for name, grids in {
                "ddim": ("uniform_t", "uniform_log_snr", "quadratic"),
                "dpmpp_2m": ("uniform_t", "uniform_log_snr", "quadratic"),
                "unipc": ("uniform_t", "uniform_log_snr", "quadratic"),
            }.items()
            for grid in grids
        ],
    ),
}


# Which parts of a run are of the same config and images, so that a variant need not train them again.
_PARTS = {
    "partition": ("seed", "data.", "partition."),
    "experts": ("seed", "data.", "partition.", "schedule.", "expert."),
    "router": ("seed", "data.", "partition.", "schedule.", "router."),
}
METHODS = ["balanced-cv"]


def measured(path: Path, words: Sequence[str], base: Config | None) -> tuple[Config, Evaluation]:
    """A variant's config and figures: a run beside the base's, with what is the same copied from it."""
    config = load_config(path, words)
    steps = config.table.steps[:2]
    cfg = replace(config.table, methods=METHODS, samplers={}, steps=steps)
    cfg = replace(
        cfg, trajectories=1, reference_steps=max(steps) + 1
    )  # nobody asks for the trajectory error
    if base is not None:
        here, there = settled(config), settled(base)
        for part, keys in _PARTS.items():
            same = all(here[key] == there.get(key) for key in here if key.startswith(keys))
            if same and not (config.folder / part).exists() and (base.folder / part).exists():
                shutil.copytree(base.folder / part, config.folder / part)
    run(config, ("partition", "expert", "router", "bundle"))
    return config, Measurement(config, None, cfg, "ablation").make()


def make(path: Path, names: Sequence[str], overrides: Sequence[str], folder: Path) -> Path:
    """The record of the ablations of a config: `folder/ablations-NAME.json`; what it holds of other groups stays."""
    usual = load_config(path, overrides)
    home = usual.folder.with_name(f"{usual.folder.name}-ablations")
    base, evaluation = measured(path, overrides, None)
    file = folder / f"ablations-{usual.folder.name}.json"
    kept = read_json(file)["groups"] if file.exists() else {}
    rows: dict[str, Any] = {name: kept[name] for name in GROUPS if name in kept}
    if file.exists() and read_json(file)["config_hash"] != digest(settled(base)):
        rows = {}
    for name in names or GROUPS:
        rows[name] = []
        for variant in GROUPS[name][1]:
            words = list(variant.words(base))
            if settled(load_config(path, [*overrides, *words])) == settled(base):
                rows[name].append({"name": variant.name, "words": words, "default": True})
                continue
            log.info("%s: %s", name, variant.name)
            slug = digest(words)[:8]
            _config, found = measured(
                path, [*overrides, *words, f"run={home / f'{name}-{slug}'}"], base
            )
            rows[name].append({"name": variant.name, "words": words, "cells": _cells(found)})
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.ablations", str(path), *overrides]),
            "config_hash": digest(settled(base)),
            "features": next(iter(evaluation.features.values())).what,
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


def _cells(evaluation: Evaluation) -> dict[str, list[float]]:
    """Frechet distances by the first features, a number a seed, by `METHOD-STEPS`."""
    found: dict[str, list[float]] = {}
    for cell in evaluation.cells:
        found.setdefault(f"{cell.method}-{cell.steps}", []).append(first_score(cell).frechet)
    return found


def write_page(folder: Path) -> None:
    """Write `ablations.md` from the records that lie in the folder."""
    (folder / "ablations.md").write_text(page(folder))
    print(page(folder))


def page(folder: Path) -> str:
    """`ablations.md`, from the records in the folder."""
    parts = [
        "# Ablations",
        "What each choice is worth: one thing of a config changed, trained anew where that touches it, with as many images "
        "seen. Fréchet distances, lower is better; behind each the difference to the config as it is, seed by seed (below 0: "
        "better). Chance, where it is measured, is another seed of training: of what is trained anew, a smaller difference means "
        "nothing.",
    ]
    for file in sorted(folder.glob("ablations-*.json")):
        parts.append(_section(file.stem.removeprefix("ablations-"), read_json(file)))
    return "\n\n".join(parts) + "\n"


def _section(name: str, record: dict[str, Any]) -> str:
    base, columns = record["base"], list(record["base"])
    head = ["", *(column.replace("-", ", ") + " steps" for column in columns)]
    parts = [
        f"## {name}\n\n    {record['command']}\n\n{record['n']} images a cell and seed, {record['seeds']} seeds, "
        f"`sampler={record['sampler']}`; features: {record['features']}. "
        f"All experts together saw {record['images_seen']:,} images.",
        table(
            head,
            [
                [
                    "the config as it is",
                    *(f"{mean(base[c]):.2f} ± {_deviation(base[c]):.2f}" for c in columns),
                ]
            ],
        ),
    ]
    for group, rows in record["groups"].items():
        body = []
        for row in rows:
            if "default" in row:
                body.append([f"{row['name']} (as it is)", *("" for _ in columns)])
                continue
            cells = []
            for c in columns:
                change = [b - a for a, b in zip(base[c], row["cells"][c], strict=True)]
                cells.append(
                    f"{mean(row['cells'][c]):.2f} ({mean(change):+.2f} ± {_deviation(change):.2f})"
                )
            body.append([row["name"], *cells])
        parts.append(table([GROUPS[group][0], *head[1:]], body))
    return "\n\n".join(parts)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main(words: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nGROUPS: {' '.join(GROUPS)}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    rest = [word for word in words if not word.startswith("--")]
    paths = [Path(word) for word in rest if "=" not in word and word.endswith((".yaml", ".yml"))]
    names = [word for word in rest if "=" not in word and not word.endswith((".yaml", ".yml"))]
    try:
        if (
            not set(options) <= {"--out", "--page"}
            or len(rest) + len(options) != len(words)
            or len(paths) > 1
        ):
            raise ConfigError(
                f"give at most one config, names of groups, key=value words, --out or --page; got {words}"
            )
        if unknown := [name for name in names if name not in GROUPS]:
            raise ConfigError(f"a group must be one of {' '.join(GROUPS)}, got {unknown[0]!r}")
        folder = Path(options.get("--page", options.get("--out", RESULTS)))
        if "--page" not in options:
            make(
                paths[0] if paths else Path("configs/digits.yaml"),
                names,
                [word for word in rest if "=" in word],
                folder,
            )
        write_page(folder)
    except DdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
