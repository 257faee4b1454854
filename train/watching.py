"""What is seen of an expert while it learns: held-out losses, contact sheets, logs. None of it changes a weight."""

import csv
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from ddm.artifacts import naming
from ddm.condition import ImageConditions
from ddm.rng import RngStream, normal
from ddm.samplers import sample
from ddm.training import to_float
from experts.expert_module import ExpertLearning
from serve.model.images import contact_sheet, to_uint8, write_png
from train.averaging import Averaging, weights
from train.watch_config import WatchConfig

BANDS = 4  # of t, equally wide
_LEAST = 256  # noisy images in a validation: where there are fewer, they are seen at several times
_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, however many they are
_SHEET, _STEPS = 16, 25  # images of a contact sheet, and steps to sample them


@dataclass
class Watch:
    """What `fit` is to show of a training, and by what it chooses among averages.

    held_out: images for validation, uint8 `[N, C, H, W]`; None or no image for none
    ema_also: decays of further averages, of which the best is taken
    told: the conditions of the held-out images, for an expert with one
    """

    config: WatchConfig = field(default_factory=WatchConfig)
    held_out: Tensor | None = None
    ema_also: list[float] = field(default_factory=list)
    told: ImageConditions | None = None

    @property
    def validates(self) -> bool:
        """Whether there are held-out images."""
        return self.held_out is not None and len(self.held_out) > 0


@torch.no_grad()
def held_out_losses(
    learning: ExpertLearning, images: Tensor, told: ImageConditions | None = None
) -> dict[str, float]:
    """The training loss on images that it was not trained on, uint8 `[N, C, H, W]`, whose conditions
    it is told whole: `loss`, and `t in [0.25, 0.5)` and so on, for the bands that training has times in.

    The images, times and noise are always the same ones: every image at least once, and the
    training's distribution of times.
    """
    learning.eval()
    rows = torch.arange(max(_LEAST, len(images)))
    level = ((rows + 0.5).double() * _GOLDEN % 1).float()
    losses, times = [], []
    for part in rows.split(learning.config.batch):
        place = part.to(learning.device)
        x0 = to_float(images[part % len(images)].to(learning.device))
        t = learning.at(level[part].to(learning.device))
        noise = normal(0, RngStream.HELD_OUT, place, 0, x0.shape[1:])
        condition = None if told is None else told.vectors(part % len(images)).to(x0)
        losses.append(learning.losses(x0, t, noise, condition).double().cpu())
        times.append(t.cpu())
    loss = torch.cat(losses)
    band = (torch.cat(times) * BANDS).long().clamp_max(BANDS - 1)
    found = {"loss": float(loss.mean())}
    for b in band.unique().tolist():
        found[f"t in [{b / BANDS:g}, {(b + 1) / BANDS:g})"] = float(loss[band == b].mean())
    return found


@torch.no_grad()
def sampled(learning: ExpertLearning) -> Tensor:
    """The images of a contact sheet, uint8 `[n, C, H, W]`: always from the same noise."""
    learning.eval()
    process = learning.denoiser.schedule
    index = torch.arange(_SHEET, device=learning.device)
    shape = learning.batches.images.shape[1:]
    x = normal(0, RngStream.START, index, 0, shape) * process(torch.tensor(1.0)).s

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return learning.denoiser(x, t).clone()  # its next answer may take the same memory

    return to_uint8(sample(denoise, x, process, "ipndm", _STEPS, "cosine")).cpu()


class Watching(Callback):
    """Shows a training after a step: validation.csv, sheets/ and log/ in its folder."""

    def __init__(self, folder: Path, watch: Watch, averaging: Averaging | None, done: int) -> None:
        self.folder, self.watch, self.averaging = folder, watch, averaging
        self.logger = _logger(watch.config.logger, folder, done)
        self.since, self.step = time.monotonic(), done

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, ExpertLearning) or (batch_idx + 1) % pl_module.batches.parts:
            return
        if not trainer.is_global_zero:  # of several processes that train one network
            return
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        config = self.watch.config
        if self.watch.validates and _is_due(step, config.validate_every, last):
            self._validate(pl_module, step)
        if _is_due(step, config.sheet_every, last):
            self._write_sheet(pl_module, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.logger is not None:
            self.logger.finalize("success")
        if isinstance(self.logger, WandbLogger):
            self.logger.experiment.finish()  # the next network of this process has a run of its own

    def show(self, step: int, images_per_step: int, metrics: dict[str, float]) -> None:
        """Log metrics at a step, and the images per second since the last time."""
        if self.logger is not None:
            now = time.monotonic()
            speed = (step - self.step) * images_per_step / (now - self.since)
            self.since, self.step = now, step
            self.logger.log_metrics({**metrics, "images per second": speed}, step)

    def _validate(self, learning: ExpertLearning, step: int) -> None:
        assert self.watch.held_out is not None
        averages = {} if self.averaging is None else self.averaging.averages
        named = {f"ema {decay:g}": average for decay, average in averages.items()}
        rows = []
        for name, values in {"raw": None, **named}.items():
            with weights(learning, values):
                losses = held_out_losses(learning, self.watch.held_out, self.watch.told)
            rows.append({"step": step, "weights": name, **losses})
            if self.logger is not None:
                metrics = {f"held out/{name}/{band}": loss for band, loss in losses.items()}
                self.logger.log_metrics(metrics, step)
        path = self.folder / "validation.csv"
        new = not path.exists()
        with naming(path, "written"), path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def _write_sheet(self, learning: ExpertLearning, step: int) -> None:
        averages = {} if self.averaging is None else self.averaging.averages
        with weights(learning, next(iter(averages.values()), None)):
            images = sampled(learning)
        path = self.folder / "sheets" / f"{step:08d}.png"
        write_png(path, contact_sheet(images.split(round(_SHEET**0.5))))


def _is_due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


def _logger(kind: str, folder: Path, done: int) -> Logger | None:
    """Lightning's logger into `folder/log`; one that goes on at step `done` keeps what was logged before."""
    match kind:
        case "csv":
            version = f"from-{done:08d}"  # it deletes what it finds in its folder
            return CSVLogger(folder, "log", version, flush_logs_every_n_steps=1)
        case "tensorboard":
            return TensorBoardLogger(
                folder, "log", "", default_hp_metric=False, purge_step=done + 1
            )
        case "wandb":
            name = "-".join(folder.parts[-3:])
            return WandbLogger(name, folder, project="ddm", group="-".join(folder.parts[:-2]))
    return None
