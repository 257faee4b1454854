"""What a user can get wrong is refused by name with exit status 2; errors of the program exit with 1."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import SMALL
from train.__main__ import main
from train.config import Config, load_config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["expert.stepz=3"],
            "expert.stepz: Key 'stepz' not in 'ExpertStageConfig'. Did you mean: 'steps'?",
        ),
        (["sample.n=["], "sample.n: while parsing a flow node"),
        (
            ["expert.steps=many"],
            "expert.steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (["expert.steps=0"], "expert.steps must be at least 1, got 0"),
        (
            ["expert.unet.channels=6"],
            "expert.unet.channels must be a multiple of 4 in [4, 8192], got 6",
        ),
        (
            ["expert.unet.multipliers=[1,2,2,2,2]"],
            "expert.unet.multipliers must halve a square image of 8 x 8 evenly",
        ),
        (["expert.precision=int8"], "expert.precision: Invalid value 'int8', expected one of"),
        (["expert.index=7"], "expert.index must be in [0, 2]"),
        (
            ["data.name=imagenet"],
            "data.name: Invalid value 'imagenet', expected one of ['digits', 'cifar10', 'celeba_hq', 'folder', 'tensors']",
        ),
        (["data.name=cifar10", "data.root=nowhere"], "CIFAR-10 is not in nowhere"),
        (
            ["data.name=celeba_hq", "data.root=nowhere"],
            "CelebA-HQ is not in nowhere: put its images into",
        ),
        (
            ["data.name=folder", "data.root=nowhere"],
            "nowhere holds no images: data.name=folder takes one sub-folder per class",
        ),
        (
            ["schedule.name=vp_quartic"],
            "schedule.name must be one of vp_constant vp_linear vp_polynomial vp_exponential vp_cosine ve_exponential"
            " ve_polynomial rectified_flow edm two_phase ddpm ddpm_cosine, got 'vp_quartic'",
        ),
        (
            ["schedule.beta_mix=3"],
            "schedule.beta_mix must be a parameter of vp_linear (beta_min, beta_max), got 3",
        ),
        (
            ["schedule={name: vp_cosine}", "expert.parameterization=epsilon"],
            "expert.parameterization must not be epsilon on VPCosine(shift=0.008): at t = 1 x is noise alone",
        ),
        (["schedule.beta_min=-1"], "schedule.beta_min must be above 0, got -1"),
        (
            ["sample.sampler=heum"],
            "sample.sampler must be one of euler ddim heun dpmpp_2m unipc ipndm euler_maruyama ddpm accelerated_ode"
            " accelerated_sde, got 'heum'",
        ),
        (
            ["sample.policy=any"],
            "sample.policy must be one of full top_k nucleus fixed switching stochastic balanced adaptive, got 'any'",
        ),
        (["sample.budget=0.5"], "sample.budget must be a number in [1, 1000000], got 0.5"),
        (
            ["sample.budget=much"],
            "sample.budget: Value 'much' of type 'str' could not be converted to Float",
        ),
        (
            ["sample.control_variate=best"],
            "sample.control_variate must be one of none gaussian, got 'best'",
        ),
        (["sample.order=5"], "sample.order must be a whole number in [1, 4], got 5"),
        (
            ["sample.grid=even"],
            "sample.grid must be one of uniform_t uniform_log_snr quadratic cosine half edm own, got 'even'",
        ),
        (
            ["sample.grid=own"],
            "sample.grid must not be own for VPLinear(beta_min=0.1, beta_max=20.0), which has no steps",
        ),
        (
            ["schedule.name=rectified_flow", "sample.sampler=ddpm"],
            "sample.sampler must be one of euler ddim heun dpmpp_2m unipc ipndm for RectifiedFlow(), where a falls to 0",
        ),
        (
            ["schedule.name=edm", "sample.sampler=accelerated_sde"],
            "sample.sampler must be one of euler ddim heun dpmpp_2m unipc ipndm euler_maruyama ddpm for EDM(sigma_max=80.0), where",
        ),
        (
            ["schedule.name=edm", "sample.grid=uniform_t"],
            "sample.grid must be another for EDM(sigma_max=80.0), such as edm: uniform_t is even in sigma there",
        ),
        (
            ["schedule={name: two_phase, steps: 6, c1: 1.0}", "sample.grid=own"],
            "sample.steps must be 6, as in the schedule, for grid=own, got 3",
        ),
        (
            ["schedule={name: two_phase, steps: 3, c1: 1.0}", "sample.grid=own", "evaluate"],
            "sample.grid must not be own where several numbers of steps are compared, got 'own'",
        ),
        (["sample.steps=0"], "sample.steps must be a whole number in [1, 1000], got 0"),
        (
            ["router.bands=[0.7,0.3]"],
            "router.bands must be two rising times in (t_min, 1), got [0.7, 0.3]",
        ),
        (["router.switch_step=99"], "router.switch_step must be in [1, steps = 10), got 99"),
        (["partition.k=500"], "partition.k must be at most the number of images, 240, got 500"),
        (
            ["partition.k=10", "data.limit=5"],
            "partition.k must be at most the number of images, 5, got 10",
        ),
        (
            ["partition.by=attribute", "partition.attributes=[Male]"],
            "partition.by must be label or kmeans for images without attributes",
        ),
        (["partition.by=attribute"], "partition.attributes must name at least one attribute"),
        (
            ["partition.by=kmeans", "partition.k=null"],
            "partition.k must be given for partition.by=kmeans",
        ),
        (
            ["partition.by=kmeans", "partition.features=no.pt"],
            "partition.features must be a TorchScript file that loads here, got 'no.pt'",
        ),
        (
            ["evaluate.methods=[full, Naive, full]"],
            "evaluate.methods must name each row once, got ['full', 'Naive', 'full']",
        ),
        (
            ["evaluate.features=no.pt"],
            "evaluate.features: Invalid value assigned",
        ),
        (
            ["evaluate.features=[classifier, no.pt]"],
            "evaluate.features must hold classifier, pixels, inception, or TorchScript files that exist, or folders of them, got 'no.pt'",
        ),
        (
            ["evaluate.features=[]"],
            "evaluate.features must hold at least one network: such as [classifier, pixels], got []",
        ),
        (
            ["evaluate.features=[inception]"],
            "evaluate.inception_weights must be a file for inception among evaluate.features, got None",
        ),
        (
            ["evaluate.features=[inception]", "evaluate.inception_weights=no.pth"],
            "evaluate.inception_weights must be a file for inception among evaluate.features, got 'no.pth'",
        ),
        (["evaluate.seeds=0"], "evaluate.seeds must be in [1, 100], got 0"),
        (["evaluate.methods=[]"], "evaluate.methods must name at least one method, got []"),
        (
            ["table.methods=[balanced, best]"],
            "table.methods must be one of one-model one-model-time Naive MoG-a MoG-da switching",
        ),
        (
            ["evaluate.precision=16-mixed"],
            "evaluate.precision: Invalid value '16-mixed', expected one of",
        ),
        (
            ["evaluate.samplers={a: {}, b: {sampler: heum}}"],
            "evaluate.samplers.b: sample.sampler must be one of euler ddim heun",
        ),
        (
            ["evaluate.samplers={b: {sampler: unipc, order: 5}}"],
            "evaluate.samplers.b: sample.order must be a whole number in [1, 4], got 5",
        ),
        (
            ["evaluate.samplers={b: {sampler: unipc, order: 4}}"],
            "evaluate.samplers.b: sample.order must be in [2, 3] for sampler=unipc, got 4",
        ),
        (
            ["evaluate.samplers={b: {stepz: 3}}"],
            "evaluate.samplers.b: stepz: Key 'stepz' not in 'SampleConfig'",
        ),
        (
            ["evaluate.samplers={b: {grid: own}}"],
            "evaluate.samplers.b: sample.grid must not be own where several numbers of steps are compared, got 'own'",
        ),
        (
            [
                "schedule.name=edm",
                "sample.grid=edm",
                "evaluate.samplers={a: {}, b: {sampler: accelerated_ode}}",
            ],
            "evaluate.samplers.b: sample.sampler must be one of",
        ),
        (["evaluate.samplers={a/b: {}}"], "evaluate.samplers must have plain names, got 'a/b'"),
        (["expert.times=often"], "expert.times: Invalid value 'often', expected one of"),
        (["sample.temperature=0"], "sample.temperature must be a number in [0.01, 100], got 0.0"),
        (
            ["evaluate.reference_steps=3"],
            "evaluate.reference_steps must be in (4, 1000], above every evaluate.steps, got 3",
        ),
        (
            ["nothing.yaml"],
            "there is no config nothing.yaml; those that come with the program are celeba_hq celeba_hq_h100 cifar10",
        ),
        (
            ["exprt"],
            "a word must be a config (*.yaml, or one of celeba_hq celeba_hq_h100 cifar10 cifar10_cpu cifar10_h100 cifar10_tiny digits faces_cpu), a stage",
        ),
        (["seed=-1"], "seed must be in [0, 2^63), got -1"),
    ],
)
def test_it_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([*SMALL, f"run={tmp_path / 'run'}", *words])
    error = capsys.readouterr().err
    assert status == 2
    assert f"error: {said}" in error
    assert "Traceback" not in error


def test_an_empty_cluster_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label, count in (("a", 2), ("b", 0)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(
                tmp_path / "set" / label / f"{i}.png"
            )
    status = main(
        [
            *SMALL,
            f"run={tmp_path / 'run'}",
            "data.name=folder",
            f"data.root={tmp_path / 'set'}",
            "data.size=8",
            "partition.k=2",
        ]
    )
    assert status == 2
    assert (
        "error: cluster 1 (b) of 2 has no images: every cluster needs at least one"
        in capsys.readouterr().err
    )


def test_a_corrupt_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    status = main(
        [
            *SMALL,
            f"run={tmp_path / 'run'}",
            "data.name=folder",
            f"data.root={tmp_path / 'set'}",
            "partition.k=1",
            "partition",
        ]
    )
    assert status == 2
    assert "set/a/1.png cannot be read as an image" in capsys.readouterr().err


def test_a_config_that_is_no_yaml_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("run: [1, 2\nexpert: }")
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml is not a YAML file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "stage", "said"),
    [
        (
            "partition/cluster-02.safetensors",
            "router",
            "cluster-02.safetensors is damaged",
        ),
        ("partition/partition.json", "bundle", "partition.json is damaged: it is not JSON"),
        ("experts/00/expert.json", "expert", "expert.json is damaged: it is not JSON"),
        ("experts/00/expert.safetensors", "bundle", "expert.safetensors is damaged"),
        (
            "bundle/router.safetensors",
            "sample",
            "router.safetensors is damaged",
        ),
        ("bundle/manifest.json", "sample", "manifest.json is damaged: it is not JSON"),
        ("config.yaml", "sample", "config.yaml is not a YAML file that can be read"),
    ],
)
def test_a_damaged_file_is_named(
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    stage: str,
    said: str,
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "samples")
    if file.startswith("experts"):
        shutil.rmtree(copy / "bundle")
    if stage == "router":
        shutil.rmtree(copy / "router")
    (copy / file).write_bytes(b"{ \x80 damaged")
    status = main([*SMALL, f"run={copy}", stage])
    error = capsys.readouterr().err
    assert status == 2, error
    assert said in error
    assert "Traceback" not in error


def test_a_file_that_holds_a_list_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main([str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml must hold keys with values" in capsys.readouterr().err


def test_what_a_config_leaves_out_makes_sense() -> None:
    Config().check()


def test_a_word_that_starts_no_run_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*SMALL, f"run={folder}", "partition"]
    assert main([*words, "partition.k=500"]) == 2
    assert not folder.exists() or not any(folder.iterdir())
    assert main([*words, "partition.k=2"]) == 0  # the corrected command is not another config's


def test_a_key_that_an_older_run_lacks_has_its_default(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    saved = yaml.safe_load((copy / "config.yaml").read_text())
    del saved["expert"]["min_snr_gamma"], saved["data"]["flip"], saved["bundle"]
    (copy / "config.yaml").write_text(yaml.safe_dump(saved))
    words = [*SMALL, f"run={copy}", "partition", "expert", "router", "bundle"]
    assert main(words) == 0
    assert main([*words, "data.flip=true"]) == 2
    assert "data.flip is False there, True here" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "below a file", "name too long", "dangling link", "fifo"])
def test_a_run_folder_that_the_system_refuses_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / ("x" * 300 if kind == "name too long" else "run")
    match kind:
        case "file":
            folder.write_text("mine")
        case "below a file":
            folder.write_text("mine")
            folder = folder / "run"
        case "dangling link":
            folder.symlink_to(tmp_path / "nowhere" / "run")
        case "fifo":
            os.mkfifo(folder)
    assert main([*SMALL, f"run={folder}", "partition"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(folder)[:100] in error


@pytest.mark.parametrize(
    "file", ["config.yaml", "partition/stage.json", "partition/partition.json"]
)
def test_a_fifo_in_the_place_of_a_file_does_not_hang(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small_run / "partition", copy / "partition")
    (copy / file).unlink(missing_ok=True)
    os.mkfifo(copy / file)
    assert main([*SMALL, f"run={copy}", "partition"]) == 2
    assert file in capsys.readouterr().err


def test_a_config_nested_too_deeply_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "[" * 3000 + "]" * 3000
    (tmp_path / "deep.yaml").write_text(f"expert: {deep}")
    assert main([str(tmp_path / "deep.yaml")]) == 2
    assert "deep.yaml is nested too deeply" in capsys.readouterr().err
    assert main([f"expert.unet={deep}"]) == 2
    assert "expert.unet is nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run=1e3", "1e3"),
        ("run=no", "no"),
        ("run=2024-01-01", "2024-01-01"),
        ("run=010", "010"),
        ("run='a b'", "a b"),
        ("evaluate.reference=null", None),
        ("partition.attributes=[no, 1e3]", ["no", "1e3"]),
        ("sample.clusters={7: 2}", {"7": 2.0}),
        ("expert.steps=010", 10),
        ("schedule.beta_max=020", 20),
        ("data.limit=1_000", 1000),
    ],
)
def test_text_is_taken_as_written_and_numbers_are_decimal(
    tmp_path: Path, word: str, value: object
) -> None:
    def found(config: Config) -> object:
        section: object = config
        for name in word.partition("=")[0].split("."):
            section = section[name] if isinstance(section, dict) else getattr(section, name)
        return section

    assert found(load_config(None, [word])) == value
    keys, _, text = word.partition("=")
    tree = text
    for name in reversed(keys.split(".")):
        tree = f"{{{name}: {tree}}}"
    file = tmp_path / "some.yaml"
    file.write_text(tree.replace("beta_max", "name: vp_linear, beta_max"))
    assert found(load_config(file, [])) == value


def test_a_time_of_day_is_not_a_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["expert.steps=1:30"]) == 2
    assert "expert.steps: Value '1:30'" in capsys.readouterr().err


def test_one_class_and_a_classifier_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "only").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3)).astype(np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / "set" / "only" / f"{i}.png")
    data = ["data.name=folder", f"data.root={tmp_path / 'set'}", "data.size=8", "data.limit=null"]
    status = main([*SMALL, *data, f"run={tmp_path / 'run'}", "partition.by=kmeans"])
    assert status == 2
    assert "for images of one class, got 'classifier'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "experts").exists()


def test_an_error_of_the_program_exits_with_1_and_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from train.stages import denoiser

    monkeypatch.setattr(denoiser, "moments", lambda *_: len(3))  # type: ignore[arg-type]
    words = [*SMALL, "partition.k=1", "expert.steps=2", "expert.warmup_steps=0"]
    assert main([*words, f"run={tmp_path}", "partition", "expert"]) == 1
    assert "TypeError: object of type 'int' has no len()" in caplog.text


def test_help_and_typos_need_no_slow_import() -> None:
    slow = ("torchmetrics", "torchvision", "scipy", "lightning", "sklearn", "matplotlib", "ray")
    code = (
        "import sys; from train.__main__ import main\n"
        "assert main(['--help']) == 0 and main(['expert.stepz=3']) == 2\n"
        f"print([name for name in {slow!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
