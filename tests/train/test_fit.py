"""Fitting: the average of the weights beside one by hand, and what is saved and refused."""

import re
import resource
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from ddm.errors import ArtifactError, ConfigError
from ddm.training import Batches, FitConfig
from train.fit import NotFiniteError, fit
from train.ranks import Ranks, among
from train.resume import read_resume


class Falling(pl.LightningModule):
    """A weight that falls by 1, 2, 3 ... at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([10.0, 20.0]))
        self.seen: list[Tensor] = []

    def training_step(self, _: Any, __: int) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return (self.global_step + 1) * self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_weights_left_are_their_average_from_the_first_step_on(
    tmp_path: Path, decay: float
) -> None:
    module = Falling()
    config = FitConfig(ema_decay=decay, gradient_clip=0.0, checkpoint_every=100)
    fit(module, 5, config, tmp_path, "cpu", lambda *_: None)
    weight, average = torch.tensor([10.0, 20.0]), None
    for step in range(1, 6):
        weight = weight - step
        average = weight if average is None else decay * average + (1 - decay) * weight
    torch.testing.assert_close(module.weight.detach(), average)
    raw = [torch.tensor([10.0, 20.0]) - n for n in (0, 1, 3, 6, 10)]
    torch.testing.assert_close(module.seen, raw)  # it learns with the weights as they are


class Diverging(Falling):
    """Its loss is NaN, or infinite, or its gradient is, at one step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__()
        self.step, self.what = step, what

    def training_step(self, _: Any, __: int) -> Tensor:
        bad = self.global_step + 1 == self.step
        if bad and self.what == "gradient":  # of sqrt at 0
            return (self.weight.sum() * 0).sqrt() + self.weight.sum()
        loss = self.weight.sum()
        return loss * float(self.what) if bad else loss


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("step", [3, 6, 7])
def test_training_stops_at_the_first_step_that_is_not_finite_and_keeps_a_good_checkpoint(
    tmp_path: Path, what: str, step: int
) -> None:
    config = FitConfig(ema_decay=0.5, gradient_clip=0.0, checkpoint_every=2)
    # Two reports in 400 steps: a step is named although it is found later.
    with pytest.raises(NotFiniteError, match=f"is NaN or infinite at step {step}$"):
        fit(Diverging(step, what), 400, config, tmp_path, "cpu", lambda *_: None)
    saved = read_resume(tmp_path)
    assert saved is not None
    assert saved["global_step"] == 2 * ((step - 1) // 2)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")
def test_float16_skips_steps_with_infinite_gradients_but_not_a_nan_loss(tmp_path: Path) -> None:
    config = FitConfig(ema_decay=0.0, gradient_clip=0.0, precision="16-mixed", checkpoint_every=2)
    fit(Diverging(3, "gradient"), 5, config, tmp_path / "skipped", "gpu", lambda *_: None)
    with pytest.raises(NotFiniteError, match="step 3$"):
        fit(Diverging(3, "nan"), 5, config, tmp_path / "nan", "gpu", lambda *_: None)


def _trained(folder: Path, steps: int) -> Tensor:
    module = Falling()
    config = FitConfig(ema_decay=0.5, gradient_clip=0.0, checkpoint_every=2)
    fit(module, steps, config, folder, "cpu", lambda *_: None)
    return module.weight.detach()


def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path: Path) -> None:
    config = FitConfig(ema_decay=0.5, gradient_clip=0.0)
    fit(Falling(), 3, config, tmp_path, "cpu", lambda *_: None, of="these images")
    before = (tmp_path / "resume.ckpt").read_bytes()
    with pytest.raises(
        ArtifactError, match=r"resume.ckpt was made by another config or from other"
    ):
        fit(Falling(), 5, config, tmp_path, "cpu", lambda *_: None, of="others")
    assert (tmp_path / "resume.ckpt").read_bytes() == before
    fit(Falling(), 5, config, tmp_path, "cpu", lambda *_: None, of="these images")
    with pytest.raises(ArtifactError, match="resume.ckpt is of step 5, more than the 4 asked for"):
        fit(Falling(), 4, config, tmp_path, "cpu", lambda *_: None, of="these images")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accelerator must be auto or cpu on a machine without"):
        fit(Falling(), 1, FitConfig(), tmp_path, "gpu", lambda *_: None)


def _flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 700, -1])
def test_a_checkpoint_with_a_flipped_bit_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    whole = _trained(tmp_path / "whole", 9)
    folder = tmp_path / "cut"
    _trained(folder, 5)  # saved at 2, 4 and 5
    _flip_a_bit(folder / "resume.ckpt", place)
    with caplog.at_level("WARNING"):
        again = _trained(folder, 9)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert f"{folder / 'resume.ckpt'} is damaged" in caplog.text
    assert "resume.previous.ckpt" in caplog.text
    steps = [int(line.split()[0]) for line in (folder / "losses.txt").read_text().splitlines()]
    assert steps == list(range(1, 10))  # each once


def test_a_second_process_reads_what_the_first_has_put_in_place(tmp_path: Path) -> None:
    _trained(tmp_path, 5)
    _flip_a_bit(tmp_path / "resume.ckpt", 100)
    with among(Ranks(rank=1, size=2)):
        other = read_resume(tmp_path)
    assert (tmp_path / "resume.previous.ckpt").exists()  # it renames nothing
    first = read_resume(tmp_path)
    assert first is not None and other is not None
    assert first["global_step"] == other["global_step"] == 4
    assert not (tmp_path / "resume.previous.ckpt").exists()


def test_two_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    _trained(tmp_path, 5)
    for name in ("resume.ckpt", "resume.previous.ckpt"):
        _flip_a_bit(tmp_path / name, 100)
    with pytest.raises(ArtifactError, match=r"resume.ckpt and .*previous.ckpt are damaged: delete"):
        _trained(tmp_path, 9)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut off", b"\0" * 5000])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "resume.ckpt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"resume.ckpt is damaged: delete"):
        _trained(tmp_path, 4)


def test_a_checkpoint_that_cannot_be_renamed_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _trained(tmp_path, 3)
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "resume.ckpt":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ArtifactError, match=r"resume.ckpt cannot be written: No space left"):
        _trained(tmp_path, 9)
    monkeypatch.undo()
    saved = read_resume(tmp_path)
    assert saved is not None
    assert saved["global_step"] == 3


def test_a_full_disk_is_named_and_training_goes_on_from_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    whole = _trained(tmp_path / "whole", 9)
    folder = tmp_path / "full"
    _trained(folder, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the system refuses to write more
    try:
        with pytest.raises(ArtifactError, match=r"resume.ckpt cannot be written: File too large"):
            _trained(folder, 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.glob("*.part"))
    torch.testing.assert_close(_trained(folder, 9), whole, rtol=0, atol=0)


def test_the_images_of_the_bad_batch_are_named(tmp_path: Path) -> None:
    module = Diverging(3, "nan")
    module.batches = Batches(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), 12, seed=7)
    places = module.batches.x0(2)[1].tolist()
    said = (
        f"at step 3, in the batch of seed 7 and step 2 (images {str(places[:8])[1:-1]} and 4 more)"
    )
    with pytest.raises(NotFiniteError, match=re.escape(said)):
        fit(module, 5, FitConfig(gradient_clip=0.0), tmp_path, "cpu", lambda *_: None)
