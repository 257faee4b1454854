"""How one network learns most in about the same time: a choice of the recipe in each row.

Every variant trains one network on all images of the config, on one core, for as many steps as
fit into the seconds given. Then its loss on held-out images, at times and with noise that are
the same for all, and the Fréchet distance of samples from the same noise are measured. Writes
recipe-NAME.json and recipe.md. If interrupted, the same command resumes.
"""

import argparse
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from benchmarks.speed.expert_training import BareLearning, BareStep
from benchmarks.speed.shapes import SHAPES, shown_shape
from benchmarks.speed.timing import flop_of, parameters
from benchmarks.table.__main__ import RESULTS
from benchmarks.table.measurements import machine, made_by, rounded
from benchmarks.table.results_page import earlier
from ddm.artifacts import digest, read_json, write_json
from ddm.errors import ConfigError, one_of, require
from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import Batches
from experts.denoiser import Denoiser
from experts.expert_module import ExpertLearning
from serve import load
from train.config import Config, config_file, load_config
from train.evaluation.classifier import check_classes
from train.evaluation.measure import Measurement
from train.launch import cores, run_jobs, torch_threads
from train.lock import locked
from train.run_folder import settled
from train.stages.denoiser import expert_config
from train.stages.run import run as run_stages

log = logging.getLogger("recipe")

_STEPS = [5, 10]  # of the sampler; the second is shown
_SEEDS = 2  # of samples
_HELD_OUT = 512  # images, each at a time of its own
_TIMED_S = 5.0  # of steps, in each precision
# The keys that decide how much work a step is.
_WORK = (
    "data.name",
    "data.size",
    "expert.unet",
    "expert.condition",
    "expert.batch",
    "expert.accumulate",
    "expert.optimizer",
    "expert.precision",
    "expert.compile",
)


Precision = Literal["32-true", "bf16-mixed", "16-mixed", "auto"]
Choice = tuple[str, list[str]]  # what a row is called, and its `key=value` words


def _words(*words: str) -> Choice:
    return " ".join(words), list(words)


def _shape(sizes: dict[str, Any]) -> Choice:
    sizes = {"patch": 1, **sizes}
    return shown_shape(sizes), [f"expert.unet.{key}={value}" for key, value in sizes.items()]


GROUPS: dict[str, list[Choice]] = {
    "chance": [_words("seed=1"), _words("seed=2")],
    "shape": [_shape(sizes) for sizes in SHAPES],
    "optimizer": [
        _words(f"expert.optimizer={name}", f"expert.learning_rate={rate}")
        for name, rate in (("adam", 2e-3), ("muon", 1e-3), ("muon", 2e-3), ("muon", 4e-3))
    ],
    "learning rate": [_words(f"expert.learning_rate={rate}") for rate in (5e-4, 1e-3, 2e-3, 4e-3)],
    "batch": [_words(f"expert.batch={batch}") for batch in (8, 32, 64)],
    "decay": [
        _words("expert.cooldown=0.0"),
        _words("expert.cooldown=0.8"),
        _words("expert.cooldown=1.0", "expert.cooldown_shape=cosine"),
    ],
    "average": [
        (f"expert.ema_decay={decay}", [f"expert.ema_decay={decay}", "expert.ema_also=[]"])
        for decay in (0.0, 0.98, 0.999)
    ],
    "loss and times": [
        _words("expert.loss_weight=min_snr", "expert.times=uniform_log_snr"),
        _words("expert.loss_weight=edm", "expert.times=log_normal"),
        _words("expert.loss_weight=edm", "expert.times=uniform"),
    ],
    "parameterization": [_words("expert.parameterization=raw")],
    "mirrored": [_words("data.flip=false")],
    "precision": [
        _words("expert.precision=32-true"),
        _words("expert.precision=bf16-mixed"),
    ],
}


def measured(
    path: Path, overrides: Sequence[str], seconds: float, words: Sequence[str]
) -> dict[str, Any]:
    """The figures of a variant, from its run if it is there."""
    config, took = trained(path, [*overrides, *words], seconds)
    cfg = replace(config.table, steps=_STEPS, trajectories=1, reference_steps=max(_STEPS) + 1)
    cfg = replace(cfg, samplers={}, seeds=_SEEDS)
    found = Measurement(config, {}, cfg, "recipe").make()
    model = load(config.run, device="cpu")
    network = model.experts[0].requires_grad_()
    assert isinstance(network, Denoiser)
    x = torch.zeros(1, *model.shape)
    flop = flop_of(network, x, torch.full((1,), 0.5), backward=True) * config.expert.batch
    return {
        "Mparameters": parameters(network),
        "steps": config.expert.steps,
        "seconds": took,
        "GFLOP/s": flop * config.expert.steps / took / 1e9,
        "loss": held_out_loss(config, network),
        "frechet": {
            name: [cell.scores[name].frechet for cell in found.cells if cell.steps == max(_STEPS)]
            for name in found.features
        },
    }


def trained(path: Path, words: Sequence[str], seconds: float) -> tuple[Config, float]:
    """The config of a network that was trained for about so many seconds in a run of its own, and
    the seconds that it took: of the core's time, so that other work does not count.

    What a training that was interrupted has done is not known in seconds: it begins again.
    """
    base = load_config(path, words)
    home = Path(f"{base.folder}-recipe", _identity(base, seconds))
    precision, step_s = pace(base)
    expert = replace(
        base.expert,
        precision=precision,
        steps=max(1, round(seconds / step_s)),
        workers=0,
        threads=1,
    )
    config = replace(
        base,
        run=str(home / "run"),
        partition=replace(base.partition, k=1),
        seed_model=replace(base.seed_model, steps=0),
        expert=expert,
    )
    took = home / "seconds.json"
    with locked(home):
        if not took.exists() or "steps" not in read_json(took):
            if config.folder.exists():
                shutil.rmtree(config.folder)
            run_stages(config, ("partition",))
            began = time.process_time()
            run_stages(config, ("expert", "bundle"))
            seconds = time.process_time() - began
            write_json(took, {"seconds": seconds, "steps": expert.steps, "precision": precision})
    kept = read_json(took)
    expert = replace(expert, steps=kept["steps"], precision=kept["precision"])
    return replace(config, expert=expert), kept["seconds"]


def _identity(config: Config, seconds: float) -> str:
    """Of the network that is trained: the same for configs that train the same one."""
    others = ("table.", "seed_model.", "expert.steps")
    same = {key: value for key, value in settled(config).items() if not key.startswith(others)}
    return digest([same, seconds])[:12]


def pace(config: Config) -> tuple[Precision, float]:
    """The precision to train in, the faster one for `auto`, and the seconds of a step on one core, measured once for
    all configs whose steps are the same work, so that these take equally many.
    """
    asked: Precision = config.expert.precision
    choices: tuple[Precision, ...] = ("32-true", "bf16-mixed") if asked == "auto" else (asked,)
    found = {name: _pace(config, name) for name in choices}
    fastest = min(found, key=lambda name: found[name])
    return fastest, found[fastest]


def _pace(config: Config, precision: Precision) -> float:
    config = replace(config, expert=replace(config.expert, precision=precision))
    work = {key: value for key, value in settled(config).items() if key.startswith(_WORK)}
    file = Path(f"{config.folder}-recipe", f"pace-{digest(work)[:12]}.json")
    if not file.exists():
        images = config.data.build().images
        cfg = expert_config(config)
        denoiser = cfg.build(images.shape[1:], schedule(**config.schedule))
        batches = Batches(images, cfg.batch, 0, config.data.flip)
        with torch_threads(1):
            step_s = _step_s(BareStep(BareLearning(denoiser, batches, cfg), config.device))
        write_json(file, {"step_s": step_s})
    return float(read_json(file)["step_s"])


def _step_s(step: BareStep) -> float:
    """The seconds of a step that nothing else disturbs: the least of those within a few seconds."""
    for _ in range(3):
        step()
    found: list[float] = []
    while len(found) < 5 or sum(found) < _TIMED_S:
        began = time.process_time()
        step()
        found.append(time.process_time() - began)
    return min(found)


@torch.inference_mode()
def held_out_loss(config: Config, denoiser: Denoiser) -> float:
    """The min-SNR loss of held-out images at evenly spaced times, the same for every network."""
    folder = config.folder / "partition"
    images = Partition.read(folder).holdout(folder)["images"][:_HELD_OUT]
    cfg = replace(expert_config(config), loss_weight="min_snr", times="uniform", compile=False)
    learning = ExpertLearning(denoiser, Batches(images, len(images), 0), cfg)
    (x0, _), noise = learning.batches.x0(0), learning.batches.noise(0)
    return float(learning.losses(x0, learning.at(learning.batches.times(0)), noise).mean())


def make(
    name: str, names: Sequence[str], overrides: Sequence[str], seconds: float, folder: Path
) -> None:
    """Measure groups of variants of the config of that name or file, as many at a time as there are
    cores; write `recipe-NAME.json`, whose other groups stay, and `recipe.md`.
    """
    path = config_file(name)
    if path is None:
        raise ConfigError(f"the first word must be a config, got {name!r}")
    base = load_config(path, overrides)
    if "classifier" in base.table.features:
        labels = base.data.build().labels
        check_classes(torch.zeros(1) if labels is None else labels, "table.features")
    require(base.partition.holdout > 0, "partition.holdout", "be above 0", base.partition.holdout)
    file = folder / f"recipe-{base.folder.name}.json"
    rows: dict[str, Any] = {}
    if file.exists():
        before = read_json(file)
        if made_by(before, base) and before["seconds"] == seconds:
            rows = before["groups"]
    asked: dict[str, list[Choice]] = {"": [("the config as it is", [])]}
    asked |= {name: GROUPS[name] for name in names or GROUPS}

    def identity(words: list[str]) -> str:
        return _identity(load_config(path, [*overrides, *words]), seconds)

    variants = {identity(words): words for group in asked.values() for _, words in group}
    for words in variants.values():  # before others keep the cores busy
        pace(load_config(path, [*overrides, *words]))
    work = partial(_work, path, list(overrides), seconds)
    jobs = list(variants.values())
    done = run_jobs(work, jobs, min(cores(), len(jobs)), log.info, threads=1)
    figures = dict(zip(variants, done, strict=True))
    for kind, group in asked.items():
        rows[kind] = []
        for title, words in group:
            found = figures[identity(words)]
            if isinstance(found, Exception):
                raise found
            rows[kind].append({"name": title, "words": words, **found})
    measured = [kind for kind in GROUPS if kind in rows]
    some = measured if len(measured) < len(GROUPS) else []
    record = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.recipe", name, *some, *overrides, f"--seconds={seconds:g}"]
        ),
        "config": settled(base),
        "config_hash": digest(settled(base)),
        "seconds": seconds,
        "n": base.table.n,
        "machine": machine(base.device),
        "groups": {kind: rows[kind] for kind in ("", *measured)},
    }
    write_json(file, rounded(record))
    (folder / "recipe.md").write_text(page(folder))
    print(page(folder))


def _work(
    path: Path,
    overrides: list[str],
    seconds: float,
    words: list[str],
    tell: Callable[[str], object],
) -> dict[str, Any]:
    found = measured(path, overrides, seconds, words)
    tell(f"{' '.join(words) or 'the config as it is'}: loss {found['loss']:.5f}")
    return found


_INTRODUCTION = """# The recipe

What one network learns in about the same time on one core (column s): each row changes one thing of a
config.
The loss is that of held-out images, weighted by min-SNR at evenly spaced times; the Fréchet
distances are of samples in 10 steps, mean and deviation over two seeds. Lower is better. Chance is
another seed, of training and of which images are held out: a smaller difference means nothing."""


def page(folder: Path) -> str:
    """`recipe.md`, from the records in the folder."""
    parts = [_INTRODUCTION]
    for file in sorted(folder.glob("recipe-*.json")):
        record = read_json(file)
        parts += [f"## {file.stem.removeprefix('recipe-')}", f"    {record['command']}"]
        parts += [earlier(record).strip()] if record.get("earlier") else []
        parts.append(
            f"{record['seconds']:g} seconds of a core each; {record['n']} images per seed."
        )
        (base,) = record["groups"][""]
        for name, rows in record["groups"].items():
            if name:
                parts.append(_table(name, [base, *rows]))
    return "\n\n".join(parts) + "\n"


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    features = list(rows[0]["frechet"])
    head = [name, "M parameters", "steps", "s", "ms per step", "GFLOP/s", "loss", *features]
    cells = [
        [
            row["name"],
            f"{row['Mparameters']:.2f}",
            f"{row['steps']:,}",
            f"{row['seconds']:.0f}",
            f"{1000 * row['seconds'] / row['steps']:.0f}",
            f"{row['GFLOP/s']:.0f}",
            f"{row['loss']:.5f}",
            *(_spread(row["frechet"][name]) for name in features),
        ]
        for row in rows
    ]
    return table(head, cells)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    groups = ", ".join(f"'{name}'" if " " in name else name for name in GROUPS)
    parser = Parser("recipe", f"{__doc__}\nGroups: {groups}")
    help_text = "CONFIG, a file or a shipped one's name; groups, default all; key=value overrides"
    parser.add_argument("words", nargs="+", metavar="word", help=help_text)
    parser.add_argument("--seconds", type=float, default=300, help="per variant; default 300")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the folder to write to; default docs/results"
    )
    return run(parser, _make_all, words)


def _make_all(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = [word for word in arguments.words[1:] if "=" in word]
    groups = [word for word in arguments.words[1:] if "=" not in word]
    for group in groups:
        if group not in GROUPS:
            raise one_of("group", group, tuple(GROUPS))
    require(arguments.seconds > 0, "--seconds", "be above 0", arguments.seconds)
    make(arguments.words[0], groups, overrides, arguments.seconds, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
