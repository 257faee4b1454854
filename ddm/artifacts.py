"""Artifacts: what one machine gives another. Safetensors for the numbers, JSON for what they are, SHA-256 over both.

`STEM.json` holds the facts and the hash of `STEM.safetensors`; who names an artifact by the hash of its JSON has named
its weights as well. Files appear whole or not at all. Nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from ddm.errors import ArtifactError


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises `ArtifactError` where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error


def digest(facts: Any) -> str:
    """The SHA-256 of plain data (its JSON with sorted keys), in hex."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, facts: Any) -> None:
    """Write plain data, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(facts, indent=1) + "\n")
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """Read plain data. Raises `ArtifactError` naming the file where it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(
        save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )
    scratch.replace(path)


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read tensors. Raises `ArtifactError` naming the file where it is missing, damaged, or not the one expected."""
    if expected_sha256 is not None and (found := sha256(path)) != expected_sha256:
        raise ArtifactError(
            f"{path} is damaged or foreign: its SHA-256 is {found}, expected {expected_sha256}"
        )
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: it is no safetensors file ({error})") from error


def write_artifact(stem: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write `STEM.safetensors`, then `STEM.json` with the facts and the weights' hash: an artifact with JSON is complete."""
    weights = stem.with_suffix(".safetensors")
    write_tensors(weights, tensors)
    write_json(stem.with_suffix(".json"), {**facts, "sha256": sha256(weights)})


def read_artifact(
    stem: Path, expected_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of an artifact; `expected_sha256` is that of its JSON.

    Raises `ArtifactError` naming the file, the hash found and the hash expected.
    """
    path = stem.with_suffix(".json")
    if expected_sha256 is not None and (found := sha256(path)) != expected_sha256:
        raise ArtifactError(
            f"{path} is damaged or foreign: its SHA-256 is {found}, expected {expected_sha256}"
        )
    facts = read_json(path)
    if not isinstance(facts, dict) or "sha256" not in facts:
        raise ArtifactError(f"{path} is not the description of an artifact: it has no key 'sha256'")
    return read_tensors(stem.with_suffix(".safetensors"), facts["sha256"]), facts
