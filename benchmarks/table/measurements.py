"""Making a table: train, sample, score; then the record, with the hash of everything the figures
depend on.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.table import contact_sheets
from benchmarks.table.compute import compute
from ddm.artifacts import digest, read_json, sha256, write_json
from ddm.device import device_name
from train.config import Config
from train.evaluation.measure import Measurement
from train.model_card import write_cards
from train.precision import with_precision
from train.run_folder import settled
from train.stages.monolith import train_monoliths
from train.stages.run import run
from train.time_spent import time_spent


def make(config: Config, command: str, folder: Path) -> Path:
    """Write the record of a config's table and its images, and return the record's path
    `folder/NAME.json`.

    `command` is recorded as the way to reproduce it. Raises a `DdmError` that says what to fix.
    """
    cfg = config.table
    cfg.check_files("table")
    config.samplers(cfg, "table")
    run(config, ("partition", "seed_model", "expert", "router", "bundle"))
    monoliths = train_monoliths(config, cfg)
    measured = Measurement(config, monoliths, cfg, "table")
    evaluation = measured.make()
    write_cards(config)
    name = config.folder.name
    shown = contact_sheets.write(folder, name, config, measured, evaluation)
    facts = asdict(evaluation)
    del facts["config"]
    record = {
        "command": command,
        "config": settled(config),
        "config_hash": digest(settled(config)),
        "data": {
            "images": sum(measured.cut.sizes),
            "shape": measured.cut.shape,
            "partition": measured.cut.hash,
        },
        "clusters": dict(zip(measured.cut.names, measured.cut.sizes, strict=True)),
        "compute": compute(config, measured.cut, monoliths),
        "seconds": seconds(config, monoliths),
        "machine": machine(config.device),
        "training_precision": with_precision(config).expert.precision,
        "shown": contact_sheets.shown_method(evaluation),
        **rounded(facts),
        "files": {file: sha256(folder / file) for file in shown},
    }
    write_json(folder / f"{name}.json", record)
    return folder / f"{name}.json"


def made_by(record: dict[str, Any], config: Config) -> bool:
    """Whether this config made the record; a key that it lacks, of an older program, has its default.

    A record that has been overtaken says so itself, and why, under the key `earlier`: its page
    begins with that.
    """
    return {**settled(Config()), **record["config"]} == settled(config)


def seconds(config: Config, monoliths: Mapping[str, Config]) -> dict[str, float]:
    """How long the seed model, the experts, the router and the single models were trained, by the
    names of `compute`: the seconds of each network's own process, added up. Without those that were
    not trained, or whose time is not known.
    """
    folders = {name: config.folder / name for name in ("seed_model", "experts", "router")}
    folders |= {row: monolith.folder / "experts" for row, monolith in monoliths.items()}
    found = {name: time_spent(folder) for name, folder in folders.items()}
    return {name: spent.seconds for name, spent in found.items() if spent is not None}


def machine(device: str) -> dict[str, Any]:
    """The hardware and the versions of the packages."""
    packages = {name: version(name) for name in ("torch", "lightning", "torchmetrics")}
    return {"device": device_name(device), "python": platform.python_version(), **packages}


def rounded(facts: Any) -> Any:
    """Plain data with floats rounded to six digits, which is below the error of any of them."""
    if isinstance(facts, dict):
        return {key: rounded(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [rounded(value) for value in facts]
    return float(f"{facts:.6g}") if isinstance(facts, float) else facts


def read(path: Path) -> dict[str, Any]:
    """A record. Raises `ArtifactError` if it is missing or not JSON."""
    found: dict[str, Any] = read_json(path)
    return found
