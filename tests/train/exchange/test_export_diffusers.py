"""A bundle as a pipeline of diffusers, sampled where nothing of ours can be imported."""

import dis
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from serve import load
from tests.conftest import SMALL
from train.config import default_config, load_config
from train.exchange.__main__ import main
from train.exchange.self_contained import self_contained
from train.stages.run import run as run_stages

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

# Settings of ours, and the same of the pipeline.
RENAMED = {"steps": "num_inference_steps"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"sampler": "ddim", "steps": 10, "grid": "uniform_t", "seed": 3},
    {"sampler": "heun", "policy": "balanced", "steps": 4},
    {"sampler": "ddpm", "policy": "stochastic", "source": "combined", "steps": 6},
    {"sampler": "unipc", "policy": "nucleus", "source": "gaussian", "steps": 4},
]

# `-I` keeps the current folder off the path; an editable install of ours is hidden.
ALONE = """
import json, sys

class Hidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("ddm", "experts", "router", "serve", "train", "configs"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out, *settings = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
found = {str(n): pipeline(4, output_type="pt", **json.loads(one)).images for n, one in enumerate(settings)}
save_file(found, out)
x = torch.randn(3, 1, 8, 8)
many = pipeline(latents=x, output_type="pt").images
(one,) = pipeline(latents=x[2:], first_index=2, output_type="pt").images
assert torch.allclose(many[2], one, atol=1e-4)
(image, *_) = pipeline(2, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images
print(type(pipeline).__name__, image.size)
"""


def sampled_alone(
    folder: Path, tmp_path: Path, settings: list[dict[str, Any]]
) -> list[torch.Tensor]:
    """What the pipeline of a folder samples with each of the settings, 4 images each."""
    theirs = [{RENAMED.get(key, key): value for key, value in one.items()} for one in settings]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, folder, tmp_path / "found", *map(json.dumps, theirs)],
        env={"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "RoutedPipeline (8, 8)\n"
    found = load_file(tmp_path / "found")
    return [found[str(n)] for n in range(len(settings))]


def test_a_routed_digits_bundle_is_sampled_by_diffusers_alone(
    small_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    assert main(["export", "diffusers", str(small_run), str(folder)]) == 0
    model = load(small_run, "cpu")
    for one, found in zip(SETTINGS, sampled_alone(folder, tmp_path, SETTINGS), strict=True):
        torch.testing.assert_close(found, model.sample(4, **one), rtol=0, atol=1e-4)


def test_experts_of_diffusers_options_are_unet2ds(tmp_path: Path) -> None:
    words = [*SMALL, f"run={tmp_path / 'run'}", "partition.k=2", "expert.unet.patch=2"]
    words += ["expert.unet.groups=4", "expert.unet.embedding=[4, 4]", "expert.parameterization=v"]
    words += ["schedule={name: ddpm}"]
    run_stages(load_config(default_config(), words), ("partition", "expert", "router", "bundle"))
    folder = tmp_path / "exported"
    assert main(["export", "diffusers", str(tmp_path / "run"), str(folder)]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    assert index["expert_01"] == ["diffusers", "UNet2DModel"]
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="expert_01")
    assert (unet.config.in_channels, unet.config.sample_size) == (4, 4)
    model = load(tmp_path / "run", "cpu")
    for one, found in zip(SETTINGS[:2], sampled_alone(folder, tmp_path, SETTINGS[:2]), strict=True):
        torch.testing.assert_close(found, model.sample(4, **one), rtol=0, atol=1e-4)


def test_a_bundle_of_other_processes_and_without_a_router(small_run: Path, tmp_path: Path) -> None:
    experts = [str(small_run / "experts" / name) for name in ("00", "02")]
    words = [*SMALL, f"run={tmp_path / 'run'}", f"bundle.experts=[{', '.join(experts)}]"]
    words += ["schedule={name: rectified_flow}"]
    run_stages(load_config(default_config(), words), ("bundle",))
    folder = tmp_path / "exported"
    assert main(["export", "diffusers", str(tmp_path / "run"), str(folder)]) == 0
    settings = [{"source": "gaussian"}, {"source": "prior", "sampler": "dpmpp_2m", "steps": 5}]
    model = load(tmp_path / "run", "cpu")
    for one, found in zip(settings, sampled_alone(folder, tmp_path, settings), strict=True):
        torch.testing.assert_close(found, model.sample(4, **one), rtol=0, atol=1e-4)


def test_a_seed_model_that_moves_images_at_high_noise_goes_along(tmp_path: Path) -> None:
    words = [*SMALL, f"run={tmp_path / 'run'}", "partition.k=2"]
    words += ["seed_model.steps=4", "seed_model.above=0.6", "expert.t_max=0.6"]
    stages = ("partition", "seed_model", "expert", "router", "bundle")
    run_stages(load_config(default_config(), words), stages)
    folder = tmp_path / "exported"
    assert main(["export", "diffusers", str(tmp_path / "run"), str(folder)]) == 0
    assert json.loads((folder / "mixture" / "config.json").read_text())["above"] == 0.6
    model = load(tmp_path / "run", "cpu")
    for one, found in zip(SETTINGS[:3], sampled_alone(folder, tmp_path, SETTINGS[:3]), strict=True):
        torch.testing.assert_close(found, model.sample(4, **one), rtol=0, atol=1e-4)


def test_every_name_of_the_file_is_defined_in_it() -> None:
    text = self_contained("train.exchange.routed_pipeline", "", ("Mixture", "RoutedPipeline"))
    code = compile(text, "pipeline.py", "exec")
    known: dict[str, Any] = {"__name__": "pipeline"}
    sys.modules["pipeline"] = types.ModuleType("pipeline")  # where dataclasses look
    try:
        exec(code, known)
    finally:
        del sys.modules["pipeline"]
    builtins = known["__builtins__"]
    assert [name for name in globals_of(code) if name not in known and name not in builtins] == []
    assert "import ddm" not in text and "from ddm" not in text


def globals_of(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_of(constant)


def test_what_is_there_is_not_written_over(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", "diffusers", str(small_run), str(tmp_path)]) == 2
    assert "FOLDER must be a new or an empty folder" in capsys.readouterr().err


def test_conditions_and_bad_words_are_refused(
    small_labels_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: Callable[[str], bool] = lambda text: text in capsys.readouterr().err  # noqa: E731
    assert main(["export", "diffusers", str(small_labels_run), str(tmp_path / "new")]) == 2
    assert refused("cannot be exported: its experts take a condition")
    assert main(["export", "onnx", "demo", "new"]) == 2
    assert refused("the format must be one of diffusers, got 'onnx'")
    assert main(["import", "diffusers"]) == 2
    assert refused("give import diffusers FOLDER, got diffusers")
    assert main(["import", "diffusers", str(tmp_path), "prediction=v"]) == 2
    assert refused("prediction")
    assert main(["export", "diffusers", "demo", "new", "steps=3"]) == 2
    assert refused("export takes no keys, got steps=3")
    assert main(["--help"]) == 0
