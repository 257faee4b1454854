"""What is seen of training, by `watch`; parts of a batch; and averages of several lengths."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.artifacts import read_artifact, sha256
from ddm.errors import ConfigError
from ddm.rng import RngStream, normal
from ddm.schedules import schedule
from ddm.training import Batches
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning, loss_weight
from experts.unet import UNetConfig
from train.config import Config
from train.fit import fit
from train.stages.run import run
from train.watch_config import WatchConfig
from train.watching import Watch, held_out_losses

Small = Callable[..., Config]


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 8, 8), generator=generator).to(torch.uint8)


def learning(**settings: Any) -> ExpertLearning:
    torch.manual_seed(0)
    unet = UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.0)
    config = ExpertConfig(
        unet=unet, **{"batch": 12, "learning_rate": 1e-2, "checkpoint_every": 3, **settings}
    )
    batches = Batches(images(40), config.batch, seed=5, parts=config.accumulate)
    return ExpertLearning(config.build([1, 8, 8], schedule("vp_linear")), batches, config)


def fitted(folder: Path, until: int, watch: Watch | None = None, **settings: Any) -> list[Tensor]:
    module = learning(**settings)
    fit(module, until, module.config, folder, "cpu", lambda *_: None, watch=watch)
    return [p.detach() for p in module.parameters()]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "1", 6, gradient_clip=0.0)
    parts = fitted(tmp_path / "3", 6, gradient_clip=0.0, accumulate=3)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    other = fitted(tmp_path / "other", 6, gradient_clip=0.0, batch=4)
    assert not torch.allclose(other[0], whole[0], rtol=1e-3, atol=1e-5)
    lines = [(tmp_path / n / "losses.txt").read_text().splitlines() for n in "13"]
    assert [line.split()[0] for line in lines[1]] == [str(n) for n in range(1, 7)]
    for one, other_line in zip(*lines, strict=True):
        assert float(one.split()[1]) == pytest.approx(float(other_line.split()[1]), rel=1e-3)


def test_parts_and_averages_resume_to_the_same_weights(tmp_path: Path) -> None:
    held = Watch(WatchConfig(validate_every=2), images(20, 1), [0.5])
    settings = {"accumulate": 2, "ema_decay": 0.9, "ema_also": [0.5]}
    whole = fitted(tmp_path / "whole", 8, held, **settings)
    fitted(tmp_path / "cut", 4, held, **settings)
    assert same(fitted(tmp_path / "cut", 8, held, **settings), whole)
    found = [(tmp_path / name / "validation.csv").read_text() for name in ("whole", "cut")]
    assert found[0] == found[1]
    # Killed between the last checkpoint and the artifact: the choice is made again.
    assert same(fitted(tmp_path / "cut", 8, held, **settings), whole)


def test_the_parts_of_a_batch_must_be_even() -> None:
    with pytest.raises(ConfigError, match="accumulate must divide batch = 12, got 5"):
        ExpertConfig(batch=12, accumulate=5).check()


def test_held_out_losses_are_those_by_hand() -> None:
    module = learning(loss_weight="min_snr", t_min=0.1)
    held = images(300, 1)
    found = held_out_losses(module, held)
    rows_ = torch.arange(300)
    t = 0.1 + 0.9 * (((rows_ + 0.5).double() * 0.6180339887498949) % 1).float()
    c = schedule("vp_linear")(t)
    x0 = held.float() / 127.5 - 1
    noise = normal(0, RngStream.HELD_OUT, rows_, 0, [1, 8, 8])
    with torch.no_grad():
        a, s = c.a[:, None, None, None], c.s[:, None, None, None]
        denoised = module.denoiser(a * x0 + s * noise, t)
    loss = loss_weight("min_snr", c, 5.0, 0.5) * ((denoised - x0) ** 2).mean(dim=(1, 2, 3))
    assert found["loss"] == pytest.approx(float(loss.mean()), rel=1e-4)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (t >= low) & (t < low + 0.25)
        name = f"t in [{low:g}, {low + 0.25:g})"
        assert found[name] == pytest.approx(float(loss[inside].mean()), rel=1e-4)
    assert len(found) == 5


def test_watching_changes_no_weight_and_shows_every_network(tmp_path: Path, small: Small) -> None:
    words = ("partition.holdout=0.2", "seed_model.steps=6")
    stages = ["partition", "seed_model", "expert", "router"]
    run(small(tmp_path / "plain", *words), stages)
    watched = ("watch={logger: csv, validate_every: 5, sheet_every: 8}", *words)
    run(small(tmp_path / "watched", *watched), stages)
    assert not list((tmp_path / "plain").rglob("validation.csv"))
    for network in ("seed_model/seed_model", "experts/00/expert", "experts/02/expert"):
        file = f"{network}.safetensors"
        assert sha256(tmp_path / "plain" / file) == sha256(tmp_path / "watched" / file)
        folder = (tmp_path / "watched" / file).parent
        last = 6 if "seed" in network else 12
        found = [(row["step"], row["weights"]) for row in rows(folder / "validation.csv")]
        steps = sorted({*range(5, last + 1, 5), last})
        assert found == [(str(n), name) for n in steps for name in ("raw", "ema 0.98")]
        sheets = sorted(path.name for path in (folder / "sheets").iterdir())
        assert sheets == [f"{n:08d}.png" for n in sorted({*range(8, last + 1, 8), last})]
        metrics = rows(folder / "log" / "from-00000000" / "metrics.csv")
        assert float(metrics[0]["loss"]) > 0
        assert {"learning rate", "images per second", "held out/raw/loss"} <= metrics[0].keys()
    file = "router/router.safetensors"
    assert sha256(tmp_path / "plain" / file) == sha256(tmp_path / "watched" / file)
    for stage, last in (("stage-1", 4), ("stage-2", 6)):
        folder = tmp_path / "watched" / "router" / stage
        metrics = rows(folder / "log" / "from-00000000" / "metrics.csv")
        assert [int(row["step"]) for row in metrics] == [*range(1, last + 1)]
        assert not (folder / "validation.csv").exists()


def test_an_expert_s_held_out_images_are_its_own(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, "partition.holdout=0.2", "watch.validate_every=12", "expert.index=1")
    run(config, ["partition"])
    for path in tmp_path.glob("partition/*0[02].safetensors"):
        path.unlink()
    run(config, ["expert"])
    assert len(rows(tmp_path / "experts" / "01" / "validation.csv")) == 2


def test_the_best_of_several_averages_is_taken_or_the_first(
    tmp_path: Path, small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stages = ["partition", "expert"]
    alone: dict[float, str] = {}
    losses: dict[float, float] = {}
    stem = Path("experts/00/expert")
    held = ("partition.holdout=0.2", "watch.validate_every=12", "expert.index=0")
    for decay in (0.9999, 0.3):
        folder = tmp_path / str(decay)
        run(small(folder, *held, f"expert.ema_decay={decay}"), stages)
        alone[decay] = sha256(folder / "experts/00/expert.safetensors")
        losses[decay] = float(rows(folder / "experts/00/validation.csv")[-1]["loss"])
    best = min(losses, key=lambda decay: losses[decay])
    assert best == 0.3  # of 12 steps the long average has hardly seen the last ones
    both = ("expert.ema_decay=0.9999", "expert.ema_also=[0.3]")
    run(small(tmp_path / "both", *held, *both), stages)
    assert sha256(tmp_path / "both" / f"{stem}.safetensors") == alone[best]
    assert read_artifact(tmp_path / "both" / stem)[1]["ema_decay"] == best
    run(small(tmp_path / "none", "expert.index=0", *both), stages)
    assert read_artifact(tmp_path / "none" / stem)[1]["ema_decay"] == 0.9999


def test_tensorboard_has_the_losses_of_a_resumed_training_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watch = Watch(WatchConfig(logger="tensorboard"))
    for steps in (4, 8):
        fitted(tmp_path, steps, watch, steps=8, cooldown=0.25)
    found = accumulator.EventAccumulator(str(tmp_path / "log"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 9))
    rates = [event.value for event in found.Scalars("learning rate")]
    assert rates == pytest.approx([0.01] * 6 + [0.02 / 3, 0.01 / 3])
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(
        [float(line.split()[1]) for line in lines], rel=1e-4
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["watch.logger=wandb"], r"watch.logger=wandb needs the package wandb.*pip install wandb"),
        (["watch.logger=tensorboard"], "watch.logger=tensorboard needs the package tensorboard"),
        (["watch.validate_every=5"], "watch.validate_every must be 0 where nothing is held out"),
        (["watch.sheet_every=-1"], "watch.sheet_every must be at least 0, got -1"),
        (["expert.ema_also=[0.5,1.0]"], "expert.ema_also must hold decays in .* got 1.0"),
        (["expert.ema_also=[0.5]", "expert.ema_decay=0"], "none where ema_decay is 0"),
    ],
)
def test_what_cannot_be_seen_is_refused_by_name(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr("train.watch_config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        small(tmp_path, *words)
