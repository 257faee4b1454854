"""What a user of the library calls besides `sample`."""

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddm.errors import ConfigError
from ddm.samplers import REVERSIBLE
from serve import load
from serve.model.images import to_uint8, write_png
from serve.model.model import Model


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


@pytest.fixture(scope="module")
def digits(demo: Model) -> torch.Tensor:
    return demo.sample(4, steps=10, policy="fixed")


def errors(demo: Model, images: torch.Tensor, steps: list[int], **settings: Any) -> list[float]:
    found = []
    for n in steps:
        noise = demo.invert(images, steps=n, **settings)
        more = {"policy": "full", "t_min": 1e-3, **settings}
        back = demo.sample(x=noise, steps=n, **more)
        found.append(float((back - images).square().mean().sqrt()))
    return found


@pytest.mark.parametrize("sampler", REVERSIBLE)
def test_what_is_inverted_is_sampled_back_the_better_the_more_steps(
    demo: Model, digits: torch.Tensor, sampler: str
) -> None:
    order = 1 if sampler in ("euler", "ddim") else 2
    grid = {"grid": "uniform_log_snr"} if sampler == "unipc" else {}
    settings = {"sampler": sampler, "clusters": demo.names[:2], "clip": False, **grid}
    image = demo.sample(2, steps=10, policy="fixed", clusters=demo.names[:2])
    few, many = errors(demo, image, [12, 96], **settings)
    assert many < few / (3 if order == 1 else 8) and many < 0.15, (few, many)


def test_one_expert_alone_is_inverted_at_one_call_a_step(demo: Model) -> None:
    name = demo.names[1]
    image = demo.sample(1, clusters=name, steps=10)
    calls: list[int] = []
    noise = demo.invert(image[0], clusters=name, steps=50, progress=calls.append)
    assert calls == [1] * 50
    back, trace = demo.sample(
        x=noise, clusters=name, steps=50, policy="full", t_min=1e-3, trace=True
    )
    assert (back - image).abs().max() < 0.1
    assert trace.chosen[..., 1].all()
    assert abs(float(noise.std()) - 1) < 0.3 and noise.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "switching"}, "sample.policy must be one of full top_k nucleus, whose experts"),
        ({"sampler": "ddpm"}, "sample.sampler must be one of euler ddim .*, which walk the ODE"),
        ({"source": "combined"}, r"sample.source must be a function of \(x, t\) alone"),
        ({"t_min": 0.0}, "sample.t_min must be above 0, where the ODE starts, got 0.0"),
        ({"images": torch.zeros(8, 8)}, r"invert.images must have the shape \[1, 8, 8\]"),
        ({"images": torch.zeros(0, 1, 8, 8)}, "invert.images must be at least one image"),
    ],
)
def test_what_has_no_way_back_is_refused(demo: Model, settings: dict[str, Any], said: str) -> None:
    given = {"images": torch.zeros(1, 8, 8), **settings}
    with pytest.raises(ConfigError, match=f"^{said}"):
        demo.invert(**given)


def test_interpolation_ends_at_its_ends(demo: Model, digits: torch.Tensor) -> None:
    settings: dict[str, Any] = {"steps": 60, "sampler": "heun"}
    way = demo.interpolate(digits[0], 7, 5, **settings)
    assert way.shape == (5, 1, 8, 8)
    assert (way[0] - digits[0]).abs().max() < 0.1
    last = demo.sample(1, seed=7, policy="full", t_min=1e-3, **settings)
    assert torch.allclose(way[-1], last[0], atol=1e-3)
    steps = [float((b - a).square().mean()) for a, b in itertools.pairwise(way)]
    assert max(steps) < float((way[-1] - way[0]).square().mean())
    for wrong in ({"a": True}, {"b": "x"}, {"n": 1}, {"a": digits}, {"a": -1}):
        with pytest.raises(ConfigError, match="^interpolate"):
            demo.interpolate(**{"a": 1, "b": 2, "n": 3, **wrong})


def test_samples_come_one_after_another_without_end(demo: Model) -> None:
    endless = demo.iter_samples(seed=3, steps=3, batch=4)
    found = torch.stack(list(itertools.islice(endless, 10)))
    assert torch.allclose(found, demo.sample(10, seed=3, steps=3), atol=1e-4)
    some = list(demo.iter_samples(3, seed=3, first_index=4, steps=3, batch=2))
    assert len(some) == 3 and torch.allclose(some[0], found[4], atol=1e-4)
    with pytest.raises(ConfigError, match="sample.n must be a whole number"):
        demo.iter_samples(0)  # at the call, not at the first image


def test_a_folder_of_images_goes_on_where_it_stopped(demo: Model, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "images"
    written: list[int] = []

    def interrupt(count: int) -> None:
        written.append(count)
        if sum(written) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.save_images(folder, 10, seed=2, steps=3, batch=4, progress=interrupt)
    (folder / "notes.txt").write_text("mine")
    first = (folder / "000001.png").stat().st_mtime_ns
    (folder / "000002.png").unlink()
    again: list[int] = []
    assert demo.save_images(folder, 10, seed=2, steps=3, progress=again.append) == folder
    assert again == [3, 7]
    assert (folder / "000001.png").stat().st_mtime_ns == first
    expected = to_uint8(demo.sample(10, seed=2, steps=3))
    for i in range(10):
        found = np.asarray(Image.open(folder / f"{i:06d}.png")).astype(int)
        assert np.abs(found - expected[i, 0].numpy()).max() <= 1
    assert (folder / "notes.txt").read_text() == "mine"
    demo.save_images(folder, 2, first_index=20, seed=2, steps=3)
    assert len(list(folder.glob("*.png"))) == 12


def test_nothing_of_another_origin_is_overwritten(demo: Model, tmp_path: Path) -> None:
    demo.save_images(tmp_path / "a", 2, seed=2, steps=3)
    for more, said in (
        ({"steps": 4}, r"samples of another settings, \{'steps': 3\} there, \{'steps': 4\} here"),
        ({"seed": 3}, "samples of another seed, 2 there, 3 here"),
    ):
        with pytest.raises(ConfigError, match=said):
            demo.save_images(tmp_path / "a", 2, **{"seed": 2, "steps": 3, **more})
    with pytest.raises(ConfigError, match="samples of another precision"):
        load("demo").half().save_images(tmp_path / "a", 2, seed=2, steps=3)
    (tmp_path / "b").mkdir()
    mine = tmp_path / "b" / "000001.png"
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"000001.png is there, and no samples.json"):
        demo.save_images(tmp_path / "b", 2)
    assert mine.read_bytes() == b"mine"
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["version"] == demo.version


def test_a_folder_is_compared_as_evaluate_does(small_run: Path, tmp_path: Path) -> None:
    model = load(small_run)
    real = model._training_images("this")["images"]
    (tmp_path / "real").mkdir()
    for i, image in enumerate(real[::2]):
        write_png(tmp_path / "real" / f"{i}.png", image)
    model.save_images(tmp_path / "samples", 60, steps=2)
    near, far = model.compare(tmp_path / "real"), model.compare(tmp_path / "samples")
    assert list(near) == ["classifier", "pixels"]
    for name in near:
        assert near[name].images == (len(real) + 1) // 2 and far[name].images == 60
        assert near[name].score.frechet < far[name].score.frechet / 3
        assert near[name].floor < far[name].floor < far[name].score.frechet
    assert near["classifier"].score.confidence > far["classifier"].score.confidence
    with pytest.raises(ConfigError, match=r"compare.features must be one of classifier pixels"):
        model.compare(tmp_path / "real", features=["fid"])
    for given in ({"features": ["inception"]}, {"inception_weights": "file.pth"}):
        with pytest.raises(ConfigError, match="compare.inception_weights must be given with incep"):
            model.compare(tmp_path / "real", **given)
    with pytest.raises(ConfigError, match="compare needs the training images: load the run's"):
        load(small_run / "bundle").compare(tmp_path / "real")


def test_half_precision_gives_nearly_the_same_images(demo: Model) -> None:
    half = load("demo").half()
    expected, found = (model.sample(6, steps=8, policy="full") for model in (demo, half))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.3
    assert (found - expected).square().mean() < 1e-3
    assert {p.dtype for p in half.experts[0].parameters()} == {torch.bfloat16}
    assert "bfloat16" in repr(half) and half.half() is half


def test_a_model_moves_to_a_device_and_forgets_its_plans(demo: Model) -> None:
    model = load("demo", device="cpu")
    plan = model.plan(model.settings(steps=3))
    assert model.to("auto") is model and model.to("cpu").device.type == "cpu"
    assert model.plan(model.settings(steps=3)) is not plan
    assert torch.equal(model.sample(2, steps=3), demo.sample(2, steps=3))
    with pytest.raises(ConfigError, match="device must be auto or a device of this machine"):
        model.to("nowhere")


def test_a_cluster_may_be_named_alone(demo: Model) -> None:
    alone = demo.sample(2, steps=3, clusters="4 + 5")
    assert torch.equal(alone, demo.sample(2, steps=3, clusters=["4 + 5"]))


@pytest.mark.parametrize("name", ["sample", "iter_samples", "save_images", "invert", "interpolate"])
def test_help_and_completion_show_every_setting(name: str) -> None:
    function = getattr(Model, name)
    shown = inspect.signature(function).parameters
    assert {"steps", "sampler", "clusters", "guidance"} <= set(shown) and "settings" not in shown
    assert shown["steps"].annotation is int
    inverts = name in ("invert", "interpolate")
    assert shown["policy"].default == ("full" if inverts else "switching")
    assert f"policy={shown['policy'].default!r}" in function.__doc__
