"""Training and sampling from Python; docs/library.md runs as it stands, but for the sizes."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.errors import ArtifactError, ConfigError
from serve.model.model import Model
from train import library, stopping, train_model
from train.data.digits import load_digits

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "accelerator": "cpu",
    "partition": {"k": 2},
    "expert": {
        "unet": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": []},
        "steps": 4,
        "batch": 8,
    },
    "seed_model": {"steps": 2},
    "router": {
        "net": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": []},
        "steps": 4,
        "switch_step": 2,
        "batch": 8,
    },
}
# The page's own numbers, and those with which it takes seconds.
SMALLER = {
    '"steps": 300': '"batch": 8, "steps": 6',
    '"steps": 480': '"batch": 8, "steps": 6',
    '"switch_step": 160': '"switch_step": 3',
    "1000, batch=100, steps=2": "20, batch=10, steps=2",
    "n=200": "n=20",
    '"steps": 50': '"steps": 4',
}


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier_steps: Callable[[int], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier_steps(10)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    program = "\n".join(blocks)
    for own, smaller in SMALLER.items():
        assert program.count(own) == 1, own
        program = program.replace(own, smaller)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/library.md", "exec"), names)
    assert names["samples"].shape == (16, 1, 8, 8) and len(names["way"]) == 9
    assert names["back"].shape == names["noise"].shape == (1, 1, 8, 8)
    assert len(list(Path("runs/mine/png").glob("*.png"))) == 20
    assert not list(tmp_path.rglob("*.yml")) and not list(tmp_path.glob("*.yaml"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return load_digits(60).images


def test_the_same_call_trains_nothing_again(images: torch.Tensor, tmp_path: Path) -> None:
    first = train_model(images, tmp_path / "run", **TINY)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    again = train_model(images, tmp_path / "run", **TINY)
    assert list((tmp_path / "run" / "seed_model").glob("*.safetensors"))
    assert isinstance(first, Model) and first.version == again.version and len(times) > 4
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(ConfigError, match="folder must be another one: it was made of other"):
        train_model(images.flip(0), tmp_path / "run", **TINY)
    with pytest.raises(ArtifactError, match="was made by another config: seed is 0 there, 1 here"):
        train_model(images, tmp_path / "run", seed=1, **TINY)


def test_ctrl_c_is_a_keyboard_interrupt_after_a_checkpoint(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        with stopping.deferred():
            signal.raise_signal(signal.SIGINT)  # which training asks for after every step
        raise AssertionError("it goes on")

    monkeypatch.setattr(stopping, "_requested", None)  # and None again at the end
    monkeypatch.setattr(library, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        train_model(images, tmp_path / "run", partition={"k": 2})
    assert stopping.requested() is None

    def impatient(*_: Any) -> None:
        with stopping.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it goes on")

    monkeypatch.setattr(library, "run", impatient)
    with pytest.raises(KeyboardInterrupt):
        train_model(images, tmp_path / "run", partition={"k": 2})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"images": torch.zeros(3, 8, 8)},
            r"images must be a tensor \[N, C, H, W\].*got \[3, 8, 8",
        ),
        ({"images": [1]}, r"images must be a tensor .*got \[1\]"),
        (
            {"images": torch.full((2, 1, 8, 8), 2.0)},
            r"images must be uint8, or floats in \[-1, 1\]",
        ),
        ({"images": torch.zeros(2, 1, 8, 8).long()}, "images must be uint8, .*got torch.int64"),
        (
            {"images": torch.zeros(2, 1, 8, 9)},
            r"images must be such as are square .*\[2, 1, 8, 9\]",
        ),
        ({"images": torch.zeros(2, 5, 8, 8)}, r"images must be such as are square and have 1 to 4"),
        ({"labels": torch.full((60,), 1.5)}, "labels must be 60 whole numbers of at least 0"),
        ({"labels": torch.tensor([0, 1])}, "labels must be 60 whole numbers of at least 0"),
        ({"expert": {"stepz": 3}}, "stepz"),
        ({"expert": {"steps": -3}}, "expert.steps must"),
        ({"experts": {"steps": 3}}, "experts"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    images: torch.Tensor, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train_model(**{"images": images, "folder": tmp_path / "run", **TINY, **given})
    assert not (tmp_path / "run").exists()
