"""`compile=true`: the same training by compiled networks, and files that nobody can tell apart."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import read_artifact
from train.config import Config
from train.stages.expert import train_expert
from train.stages.run import run

WORDS = (
    "expert.unet={channels: 8, multipliers: [1], blocks: 1, attention: [], dropout: 0.0}",
    "expert.steps=3",
    "expert.warmup_steps=0",
    "router.net={channels: 8, multipliers: [1], blocks: 1, attention: []}",
    "router.steps=5",
    "router.switch_step=2",
    "router.warmup_steps=0",
)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The networks that were compiled, by dynamo alone: machine code would take minutes."""
    found: list[str] = []
    make = torch.nn.Module.compile

    def by_dynamo(module: torch.nn.Module, **settings: Any) -> None:
        found.append(type(module).__name__)
        make(module, **{**settings, "backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", by_dynamo)
    yield found
    torch.compiler.reset()


@pytest.fixture
def cut(small_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with the small run's partition and nothing else."""

    def made(name: str) -> Path:
        shutil.copytree(small_run / "partition", tmp_path / name / "partition")
        return tmp_path / name

    return made


def states(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    return read_artifact(folder / stem)[0]


def test_a_compiled_training_gives_the_weights_of_one_that_is_not_under_the_same_names(
    cut: Callable[[str], Path], small: Callable[..., Config], compiled: list[str]
) -> None:
    folders = {name: cut(name) for name in ("plain", "compiled")}
    run(small(folders["plain"], *WORDS, "expert.index=1"), ["partition", "expert", "router"])
    assert compiled == []
    words = ("expert.index=1", "expert.compile=true", "router.compile=true")
    run(small(folders["compiled"], *WORDS, *words), ["partition", "expert", "router"])
    # the expert; the posterior net in either stage, and the derivative nets of the three bands
    assert compiled == ["UNet", "Scorer", "Scorer", "Scorer", "Scorer", "Scorer"]
    for stem in ("experts/01/expert", "router/router"):
        plain, other = (states(folder, stem) for folder in folders.values())
        assert list(plain) == list(other)
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


class CutOffError(Exception):
    """The end of a process in the middle of its work."""


def test_a_compiled_training_that_was_cut_off_resumes_to_the_same_weights(
    cut: Callable[[str], Path], small: Callable[..., Config], compiled: list[str]
) -> None:
    words = (*WORDS, "expert.steps=5", "expert.checkpoint_every=2", "expert.compile=true")
    whole, broken = cut("whole"), cut("broken")
    train_expert(small(whole, *words), 1, lambda _: None)

    def stop(news: tuple[int, int, float]) -> None:
        if news[1] == 3:
            raise CutOffError

    with pytest.raises(CutOffError):
        train_expert(small(broken, *words), 1, stop)
    assert not (broken / "experts/01/expert.json").exists()
    heard: list[int] = []
    train_expert(small(broken, *words), 1, lambda news: heard.append(news[1]))
    assert heard == [2, 3, 4, 5]  # it says from where it goes on
    assert len(compiled) == 3
    torch.testing.assert_close(
        states(broken, "experts/01/expert"), states(whole, "experts/01/expert"), rtol=0, atol=0
    )
