"""UNets of diffusers, and bundles of small runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve import load
from train.config import load_config
from train.exchange.__main__ import main
from train.stages.bundle import make_bundle

SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 16,
}


@pytest.fixture
def unet() -> Callable[..., Any]:
    """`unet(**options)`: a random `UNet2DModel`, by default of DDPM's options and small."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

    def made(**options: Any) -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{**SMALL_UNET, **options}).eval().requires_grad_(False)

    return made


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written(unet, scheduler)`: a folder of a pipeline with both."""

    def saved(unet: Any, scheduler: Any) -> Path:
        unet.save_pretrained(tmp_path / "pipe" / "unet")
        scheduler.save_pretrained(tmp_path / "pipe" / "scheduler")
        return tmp_path / "pipe"

    return saved


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., Path]:
    """`imported(folder, *words)`: the artifact's folder that the command makes of a folder."""

    def made(folder: Path, *words: str) -> Path:
        out = tmp_path / "imported"
        assert main(["import", "diffusers", str(folder), f"out={out}", *words]) == 0
        return out

    return made


@pytest.fixture
def single(tmp_path: Path) -> Callable[[Path], Path]:
    """`single(artifact)`: the run with a bundle of one artifact, on its own process."""

    def bundled(artifact: Path) -> Path:
        run = tmp_path / "single"
        words = [f"bundle.experts=[{artifact}]", f"run={run}", "accelerator=cpu"]
        make_bundle(load_config(artifact / "config.yaml", words))
        assert load(run, "cpu").names
        return run

    return bundled


def edited(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; one of value `...` is removed."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
