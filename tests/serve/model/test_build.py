"""Networks are built as the weights' file allows, and nothing else a bundle's JSON asks for is allocated."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.errors import ArtifactError
from serve import load
from serve.model import build
from serve.model.loading import load_experts

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture
def change(small_run: Path, tmp_path: Path) -> Callable[[str, Change], Path]:
    """`change(NAME, CHANGE)`: a copy of the small bundle with one artifact changed and all hashes redone."""

    def made(name: str, apply: Change) -> Path:
        bundle = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
        tensors, facts = read_artifact(bundle / name)
        apply(tensors, facts)
        write_artifact(bundle / name, tensors, facts)
        manifest = read_json(bundle / "manifest.json")
        manifest["artifacts"][name] = sha256(bundle / f"{name}.json")
        write_json(bundle / "manifest.json", manifest)
        return bundle

    return made


@pytest.fixture
def only_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a network allocates memory."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        assert parameter is None or parameter.is_meta
        register(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", registered)
    monkeypatch.setattr(build, "_copy", lambda *_, **__: pytest.fail("memory is allocated"))


@pytest.mark.usefixtures("only_meta")
@pytest.mark.parametrize(
    ("unet", "file"),
    [
        ({"channels": 8192}, "expert-00.safetensors"),
        ({"channels": 12}, "expert-00.safetensors"),
        ({"blocks": 32}, "expert-00.safetensors"),
        ({"multipliers": [64, 64]}, "expert-00.safetensors"),
        ({"channels": 2**40}, "expert-00.json"),
        ({"channels": -4}, "expert-00.json"),
        ({"channels": 8.5}, "expert-00.json"),
        ({"channels": None}, "expert-00.json"),
        ({"blocks": 10**6}, "expert-00.json"),
        ({"blocks": "many"}, "expert-00.json"),
        ({"multipliers": []}, "expert-00.json"),
        ({"multipliers": [[1], 2]}, "expert-00.json"),
        ({"multipliers": [1] * 64}, "expert-00.json"),
        ({"multipliers": [10**9]}, "expert-00.json"),
        ({"attention": {"4": 1}}, "expert-00.json"),
        ({"dropout": 1e300}, "expert-00.json"),
        ({"width": 8}, "expert-00.json"),
        ({"dropout": "${oc.env:HOME}"}, "expert-00.json"),
    ],
)
def test_a_network_that_the_weights_do_not_fit_is_refused_before_it_takes_memory(
    change: Callable[[str, Change], Path], unet: dict[str, Any], file: str
) -> None:
    bundle = change("expert-00", lambda _, facts: facts["config"]["unet"].update(unet))
    for read in (load, lambda folder: load_experts(folder, [0])):
        with pytest.raises(ArtifactError, match=f"{file} does not (fit|describe)"):
            read(bundle)


@pytest.mark.usefixtures("only_meta")
@pytest.mark.parametrize("config", [None, [], [1], 1.5, "x", {"unet": 3}, {"x": {}}])
def test_a_config_of_another_kind_is_refused_by_file(
    change: Callable[[str, Change], Path], config: object
) -> None:
    bundle = change("expert-00", lambda _, facts: facts.update(config=config))
    with pytest.raises(ArtifactError, match="expert-00.json does not describe a network"):
        load(bundle)


def replace(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    assert name in tensors
    tensors[name] = tensor


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (lambda t, _: t.update(extra=torch.zeros(1)), "it has the tensor 'extra'"),
        (lambda t, _: t.pop("network.head.2.bias"), "it has no tensor network.head.2.bias"),
        (
            lambda t, _: replace(t, "network.head.2.bias", torch.zeros(1, dtype=torch.int64)),
            r"network.head.2.bias must be one of F32 F16 BF16 of shape \[1\], got I64 of \[1\]",
        ),
        (
            lambda t, _: replace(t, "network.head.2.bias", torch.zeros(1, 1)),
            r"network.head.2.bias must be one of .* of shape \[1\], got F32 of \[1, 1\]",
        ),
        (
            lambda t, _: replace(t, "gaussian.mean", torch.zeros(64)),
            r"gaussian.mean must be one of .* of shape \[1, 8, 8\], got F32 of \[64\]",
        ),
    ],
)
def test_weights_of_another_layout_are_refused_by_file(
    change: Callable[[str, Change], Path], apply: Change, said: str
) -> None:
    bundle = change("expert-01", apply)
    with pytest.raises(
        ArtifactError, match=rf"expert-01.safetensors does not fit .*expert-01.json: {said}"
    ):
        load(bundle)


def test_a_negative_variance_is_refused_by_file(change: Callable[[str, Change], Path]) -> None:
    bundle = change("expert-01", lambda t, _: t["gaussian.variance"].sub_(1e3))
    with pytest.raises(
        ArtifactError, match="expert-01.safetensors is damaged: gaussian.variance is negative"
    ):
        load(bundle)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"name": "none"},
        {"name": 3},
        {"name": "edm", "beta": 1.0},
        {"name": "edm", "sigma_max": True},
        {"name": "edm", "sigma_max": 1e300},
        {"name": "two_phase", "steps": 10**9},
    ],
)
def test_a_schedule_that_is_none_is_refused_by_file(
    small_run: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    bundle = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
    manifest = read_json(bundle / "manifest.json")
    for name in manifest["artifacts"]:
        tensors, facts = read_artifact(bundle / name)
        write_artifact(bundle / name, tensors, {**facts, "schedule": schedule})
        manifest["artifacts"][name] = sha256(bundle / f"{name}.json")
    write_json(bundle / "manifest.json", {**manifest, "schedule": schedule})
    with pytest.raises(ArtifactError, match="manifest.json does not describe a schedule: "):
        load(bundle)


def test_loaded_weights_are_copies_laid_out_as_built(small_run: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
    (expert,), *_ = load_experts(bundle, [0])
    weights = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
    kernel = expert.network.encoder.stages[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.requires_grad
    file = bundle / "expert-00.safetensors"
    with file.open("r+b") as open_file:  # in place, which a mapped file would show
        open_file.seek(file.stat().st_size // 2)
        open_file.write(b"\xff" * (file.stat().st_size // 2))
    for name, tensor in expert.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_loading_imports_no_sympy(small_run: Path) -> None:
    program = (
        f"import sys, serve; serve.load({str(small_run)!r}); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
