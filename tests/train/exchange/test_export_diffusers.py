"""A bundle as a pipeline of diffusers, sampled where nothing of ours can be imported."""

import dis
import json
import shutil
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
SAMPLED = {
    "routed": SETTINGS,
    "unet2d": SETTINGS[:2],  # of diffusers' own options
    "mixed": [  # of other processes, and without a router
        {"source": "gaussian"},
        {"source": "prior", "sampler": "dpmpp_2m", "steps": 5},
    ],
    "seeded": SETTINGS[:3],  # with a seed model that moves images at high noise
}

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

for folder, settings in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    found = {str(n): pipeline(4, output_type="pt", **one).images for n, one in enumerate(settings)}
    save_file(found, f"{folder}/found.safetensors")
x = torch.randn(3, 1, 8, 8)
many = pipeline(latents=x, output_type="pt").images
(one,) = pipeline(latents=x[2:], first_index=2, output_type="pt").images
assert torch.allclose(many[2], one, atol=1e-4)
(image, *_) = pipeline(2, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images
try:
    pipeline.to(torch.float16)()
except ValueError as error:
    print(error)
print(type(pipeline).__name__, image.size)
"""


@pytest.fixture(scope="module")
def exported(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exported(name)`: a run, and in `exported` of its folder the pipeline and its samples: 4 images
    with each of its `SAMPLED`, by one process for all pipelines, because it imports slowly.
    """
    root = tmp_path_factory.mktemp("exports")

    def made(name: str, stages: tuple[str, ...], *words: str) -> None:
        run_stages(load_config(default_config(), [*SMALL, f"run={root / name}", *words]), stages)

    shutil.copytree(small_run, root / "routed")
    unet = ("unet.patch=2", "unet.groups=4", "unet.embedding=[4, 4]", "parameterization=v")
    options = [f"expert.{word}" for word in unet]
    stages = ("partition", "seed_model", "expert", "router", "bundle")
    made("unet2d", stages, "partition.k=2", "schedule={name: ddpm}", *options)
    experts = ", ".join(str(small_run / "experts" / name) for name in ("00", "02"))
    made("mixed", ("bundle",), f"bundle.experts=[{experts}]", "schedule={name: rectified_flow}")
    high = ("seed_model.steps=4", "seed_model.above=0.6", "expert.t_max=0.6")
    made("seeded", stages, "partition.k=2", *high)
    asked = {}
    for name, settings in SAMPLED.items():
        folder = root / name / "exported"
        assert main(["export", "diffusers", str(root / name), str(folder)]) == 0
        asked[str(folder)] = [
            {RENAMED.get(key, key): value for key, value in one.items()} for one in settings
        ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, json.dumps(asked)],
        env={"OMP_NUM_THREADS": "1", "HF_HOME": str(root / "hf"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = "torch_dtype must be torch.float32, got torch.float16\nRoutedPipeline (8, 8)\n"
    assert done.stdout == said
    return lambda name: root / name


@pytest.mark.parametrize("name", ["routed", "unet2d", "mixed", "seeded"])
def test_a_bundle_is_sampled_by_diffusers_alone(exported: Callable[[str], Path], name: str) -> None:
    run = exported(name)
    model = load(run, "cpu")
    found = load_file(run / "exported" / "found.safetensors")
    for n, one in enumerate(SAMPLED[name]):
        torch.testing.assert_close(found[str(n)], model.sample(4, **one), rtol=0, atol=1e-4)


def test_experts_of_diffusers_options_are_unet2ds(exported: Callable[[str], Path]) -> None:
    folder = exported("unet2d") / "exported"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["expert_01"] == ["diffusers", "UNet2DModel"]
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="expert_01")
    assert (unet.config.in_channels, unet.config.sample_size) == (4, 4)


def test_a_seed_model_that_moves_images_at_high_noise_goes_along(
    exported: Callable[[str], Path],
) -> None:
    config = exported("seeded") / "exported" / "mixture" / "config.json"
    assert json.loads(config.read_text())["above"] == 0.6


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
