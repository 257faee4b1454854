"""A `UNet2DModel` as ours: the same function, the same numbers, the same images."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddm.artifacts import read_facts, read_tensors
from ddm.bundle import read_artifact
from ddm.gaussian import MOMENTS, moments
from ddm.partition import Partition
from ddm.rng import RngStream, normal
from ddm.samplers import sample
from ddm.schedules import Schedule, schedule
from serve import load
from serve.model.build import build_expert
from tests.train.exchange.conftest import edited
from train.config import load_config
from train.exchange.__main__ import main
from train.exchange.unet2d import (
    from_their_config,
    from_their_tensors,
    to_their_config,
    to_their_tensors,
)
from train.stages.expert import train_experts
from train.stages.partition import make_partition

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

GREY = {"sample_size": 8, "in_channels": 1, "out_channels": 1}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "norm_num_groups": 8},
        {"attention_head_dim": 8, "downsample_padding": 1, "layers_per_block": 2},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 16},
        {"add_attention": False, "time_embedding_dim": 32},
        {"down_block_types": 3 * ["DownBlock2D"], "up_block_types": 3 * ["UpBlock2D"]},
    ],
)
def test_a_unet2d_is_ours_by_other_names_both_ways(
    unet: Callable[..., Any], options: dict[str, Any]
) -> None:
    theirs = unet(**options)
    config, shape = from_their_config(dict(theirs.config) | {"_class_name": "UNet2DModel"}, 1000)
    ours = config.build(shape).eval()
    ours.load_state_dict(from_their_tensors(theirs.state_dict(), config, shape, "file"))
    x, number = noise(4, *shape), torch.tensor([0, 7, 500, 999])
    with torch.no_grad():
        expected = theirs(x, number).sample
        torch.testing.assert_close(ours(x, (number + 1) / 1000), expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1
        back = to_their_tensors(ours.state_dict(), config, shape)
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
        again = diffusers.UNet2DModel.from_config(to_their_config(config, shape)).eval()
        again.load_state_dict(back)
        assert torch.equal(again(x, number).sample, expected)


def theirs_by_ddim(unet: Any, scheduler: Any, x: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for number in scheduler.timesteps:
            answer = unet(x, number).sample
            x = scheduler.step(answer, number, x, use_clipped_model_output=True).prev_sample
    return x


def ours_by_ddim(artifact: Path, x: Tensor, steps: int) -> tuple[Tensor, Schedule]:
    found = read_artifact(artifact / "expert", None, {})
    process = schedule(**found.facts["schedule"])
    denoiser = build_expert(found, process, torch.device("cpu"))

    def clipped(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t).clamp(-1, 1)

    with torch.no_grad():
        return sample(clipped, x, process, "ddim", steps), process


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "num_train_timesteps": 500},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {
            "prediction_type": "sample",
            "rescale_betas_zero_snr": True,
            "beta_schedule": "scaled_linear",
        },
    ],
)
def test_ddim_samples_the_same_images_on_every_process_and_prediction(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    options: dict[str, Any],
) -> None:
    theirs = unet()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", **options)
    artifact, x = imported(written(theirs, scheduler)), noise(2, 3, 16, 16)
    found, process = ours_by_ddim(artifact, x, 10)
    expected = theirs_by_ddim(theirs, scheduler, x, 10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert 0.1 < expected.std() < 1
    count = scheduler.config.num_train_timesteps
    a = process(torch.arange(1, count + 1, dtype=torch.float64) / count).a
    torch.testing.assert_close(a.square(), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-6)


def test_ddpm_of_cifar10_is_imported_sampled_and_exported(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    single: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    """Of the options of google/ddpm-cifar10-32, narrower, with random weights."""
    types = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    options: dict[str, Any] = {
        "sample_size": 32,
        "down_block_types": types,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(types)],
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    with torch.device("meta"):
        whole = unet(**options, block_out_channels=[128, 256, 256, 256])
        config, shape = from_their_config(whole.config | {"_class_name": "UNet2DModel"}, 1000)
        for network in (whole, config.build(shape)):
            size = sum(parameter.numel() for parameter in network.parameters())
            assert round(size / 1e6, 1) == 35.7
    theirs = unet(**options, block_out_channels=[32, 64, 64, 64])
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    folder = written(theirs, scheduler)
    run = single(imported(folder))
    model, x, number = load(run, "cpu"), noise(1, 3, 32, 32), torch.tensor([400])
    with torch.no_grad():
        a, s, _, _ = model.schedule(torch.tensor([0.401]))
        eps = (x - a * model.experts[0](x, torch.tensor([0.401]))) / s
        torch.testing.assert_close(eps, theirs(x, number).sample, rtol=0, atol=1e-4)
    # Image 0 of seed 0 starts from a noise that diffusers gets as well.
    one = torch.ones((), dtype=torch.float64)
    start = normal(0, RngStream.START, torch.tensor([0]), 0, model.shape) * model.schedule(one).s
    images = model.sample(1, steps=10, sampler="ddim", grid="uniform_t")
    # In float64: what ten steps make of float32's errors depends on the CPU.
    expected = theirs_by_ddim(theirs.double(), scheduler, start.double(), 10)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-4)
    assert main(["export", "diffusers", str(run), str(tmp_path / "back")]) == 0
    before = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "back" / "expert_00" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_old_names_and_without_subfolders_is_read(
    unet: Callable[..., Any], written: Callable[..., Path], imported: Callable[..., Path]
) -> None:
    folder = written(unet(), diffusers.DDPMScheduler())
    for file in [*folder.glob("unet/*"), *folder.glob("scheduler/*")]:
        file.rename(folder / file.name)
    shutil.rmtree(folder / "unet")
    weights = folder / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(weights)
    for new, before in former.items():
        old = {name.replace(new, before): tensor for name, tensor in old.items()}
    save_file(old, weights)
    facts = read_facts(imported(folder) / "expert")
    assert facts["name"] == "pipe"
    assert facts["schedule"]["name"] == "ddpm"


def test_an_expert_starts_from_it(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    tmp_path: Path,
) -> None:
    artifact = imported(written(unet(**GREY), diffusers.DDPMScheduler()))
    words = ["data.limit=60", "partition.k=1", "accelerator=cpu", f"run={tmp_path / 'run'}"]
    words += ["expert.steps=1", "expert.batch=4", "expert.learning_rate=1e-30", "expert.workers=0"]
    config = load_config(artifact / "config.yaml", ["data.name=digits", *words])
    make_partition(config)
    train_experts(config)
    trained = read_tensors(tmp_path / "run" / "experts" / "00" / "expert.safetensors")
    for name, tensor in read_tensors(artifact / "expert.safetensors").items():
        if name not in MOMENTS:
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)


def test_with_a_shard_it_is_the_expert_of_that_cluster(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    small_run: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(small_run / "partition", tmp_path / "partition")
    whole = Partition.read(tmp_path / "partition")
    shard = tmp_path / "shard"
    shard.mkdir()
    whole.only(1).describe(shard)
    shutil.copyfile(Partition.file(tmp_path / "partition", 1), Partition.file(shard, 0))
    artifact = imported(written(unet(**GREY), diffusers.DDPMScheduler()), f"shard={shard}")
    facts, tensors = read_facts(artifact / "expert"), read_tensors(artifact / "expert.safetensors")
    assert (facts["name"], facts["count"]) == (whole.names[1], whole.sizes[1])
    assert facts["cluster"] == whole.hashes[1]
    expected = moments(whole.cluster(tmp_path / "partition", 1)["images"])
    for name, tensor in zip(MOMENTS, expected, strict=True):
        assert torch.equal(tensors[name], tensor)


REFUSED = [
    ("unet", {"_class_name": "UNet2DConditionModel"}, "_class_name must be 'UNet2DModel', got"),
    ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional', got"),
    ("unet", {"num_class_embeds": 10}, "num_class_embeds must be None, got 10"),
    ("unet", {"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish', got 'gelu'"),
    ("unet", {"out_channels": 6}, "out_channels must be in_channels = 3, got 6"),
    ("unet", {"layers_per_block": "1"}, "layers_per_block must be a whole number of at least 1,"),
    ("unet", {"norm_eps": None}, "norm_eps must be a number, got None"),
    ("unet", {"block_out_channels": [16, 24, 32]}, "block_out_channels must be multiples of the"),
    ("unet", {"up_block_types": 3 * ["UpBlock2D"]}, "up_block_types must attend where"),
    ("unet", {"down_block_types": ["SkipDownBlock2D"]}, "down_block_types must be 3 of"),
    ("unet", {"sample_size": None}, "size must be the side, as sample_size is null, got None"),
    ("unet", {"sample_size": [16, 8]}, "sample_size must be the side of square images"),
    ("unet", {"norm_num_groups": 12}, "as ours.groups must be 0 or divide channels = 16, got 12"),
    ("unet", {"unheard_of": 1}, "its keys must be one of sample_size"),
    ("unet", {"layers_per_block": 2}, "has no tensor down_blocks.0.resnets.1.norm1.weight"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name must be one of"),
    (
        "scheduler",
        {"beta_schedule": "laplace"},
        "beta_schedule must be one of linear scaled_linear",
    ),
    ("scheduler", {"trained_betas": [0.1]}, "trained_betas must not be set, got [0.1]"),
    (
        "scheduler",
        {"rescale_betas_zero_snr": True},
        "prediction_type must be v_prediction or sample",
    ),
    (
        "scheduler",
        {"prediction_type": "flow"},
        "prediction_type must be one of epsilon v_prediction",
    ),
    ("scheduler", {"timestep_type": "continuous"}, "timestep_type must be 'discrete', got 'cont"),
    ("scheduler", {"beta_end": 2.0}, "beta_end must be in [beta_start = 0.0001, 1), got 2.0"),
]


@pytest.mark.parametrize(("part", "changes", "message"), REFUSED)
def test_what_cannot_be_imported_is_refused_by_key_rule_and_value(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = written(unet(), diffusers.DDPMScheduler())
    name = "config.json" if part == "unet" else "scheduler_config.json"
    edited(folder / part / name, **changes)
    assert main(["import", "diffusers", str(folder), f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(folder / part) in error
    assert not (tmp_path / "out").exists()


def test_weights_of_unequal_parts_are_refused(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Query, key and value are one tensor of ours; here the first part alone is as large."""
    folder = written(unet(), diffusers.DDPMScheduler()) / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    query = next(name for name in tensors if name.endswith("to_q.weight"))
    save_file(tensors | {query: tensors[query].repeat(3, 1)}, weights)
    assert main(["import", "diffusers", str(folder.parent)]) == 2
    assert "to_v.weight must have" in capsys.readouterr().err


def test_what_a_scheduler_would_say_is_asked_for(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = written(unet(sample_size=None), diffusers.DDPMScheduler()) / "unet"
    shutil.rmtree(folder.parent / "scheduler")
    assert main(["import", "diffusers", str(folder)]) == 2
    assert "prediction_type must be given" in capsys.readouterr().err
    artifact = imported(folder, "prediction_type=v_prediction", "size=16", "beta_end=0.01")
    facts = read_facts(artifact / "expert")
    assert (facts["config"]["parameterization"], facts["shape"]) == ("v", [3, 16, 16])
    assert facts["schedule"]["beta_end"] == 0.01
    assert main(["import", "diffusers", str(folder), f"out={artifact}", "size=16"]) == 2
    edited(folder / "config.json", sample_size=16)
    words = ["prediction_type=epsilon", "size=32"]
    assert main(["import", "diffusers", str(folder), *words]) == 2
    assert "size must be left out, as sample_size is 16, got 32" in capsys.readouterr().err


def test_an_average_is_imported_where_it_is_asked_for(
    unet: Callable[..., Any],
    written: Callable[..., Path],
    imported: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = unet()
    folder = written(theirs, diffusers.DDPMScheduler())
    training_utils = pytest.importorskip("diffusers.training_utils")
    average = training_utils.EMAModel(
        theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config
    )
    average.save_pretrained(folder / "unet_ema")
    assert main(["import", "diffusers", str(folder)]) == 2
    assert "has the networks unet and unet_ema: give one" in capsys.readouterr().err
    facts = read_facts(imported(folder / "unet_ema") / "expert")  # the scheduler is the pipeline's
    assert facts["schedule"]["name"] == "ddpm"


def test_a_pipeline_of_latents_is_refused(
    unet: Callable[..., Any], written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(unet(), diffusers.DDIMScheduler())
    parts = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index = folder / "model_index.json"
    index.write_text(json.dumps({**parts, "vqvae": ["diffusers", "VQModel"]}))
    assert main(["import", "diffusers", str(folder)]) == 2
    message = "model_index.json must be of a pipeline with unet and scheduler alone, got 'vqvae'"
    assert message in capsys.readouterr().err


def test_pickles_are_not_read(
    unet: Callable[..., Any], written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(unet(), diffusers.DDPMScheduler())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert main(["import", "diffusers", str(folder)]) == 2
    assert f"{weights} is missing" in capsys.readouterr().err


def test_importing_needs_no_diffusers() -> None:
    code = "import sys, train.exchange.incoming; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
