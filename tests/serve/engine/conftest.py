"""The model whose images the engine must sample, and one with other weights."""

import shutil
from pathlib import Path

import pytest

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from serve import load
from serve.model.model import Model


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.fixture(scope="module")
def other_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run's bundle with other weights, all hashes right."""
    bundle = shutil.copytree(small_run / "bundle", tmp_path_factory.mktemp("other") / "bundle")
    manifest = read_json(bundle / "manifest.json")
    for k in range(3):
        stem = bundle / f"expert-{k:02d}"
        tensors, facts = read_artifact(stem)
        changed = {
            name: tensor
            if name.startswith("gaussian.") or not tensor.is_floating_point()
            else 1.3 * tensor + 0.02
            for name, tensor in tensors.items()
        }
        write_artifact(
            stem, changed, {key: value for key, value in facts.items() if key != "sha256"}
        )
        manifest["artifacts"][stem.name] = sha256(stem.with_suffix(".json"))
    write_json(bundle / "manifest.json", manifest)
    return bundle
