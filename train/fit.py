"""Fitting one module with Lightning: averaging, checkpoints to resume from, progress."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ddm.training import FitConfig

Report = Callable[[int, float], None]  # told the steps done and the mean loss since the last word


class _Losses(Callback):
    """Tells `report`, and appends `step loss` to a file, about 200 times a run; the mean stays on the device in between."""

    def __init__(self, path: Path, steps: int, report: Report) -> None:
        self.path, self.report = path, report
        self.every = max(1, steps // 200)
        self.sum: torch.Tensor | float = 0.0
        self.count = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.sum, self.count = self.sum + outputs["loss"].detach(), self.count + 1
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            mean = float(self.sum) / self.count
            with self.path.open("a") as file:
                file.write(f"{trainer.global_step} {mean:.6g}\n")
            self.report(trainer.global_step, mean)
            self.sum, self.count = 0.0, 0


class _Averaging(WeightAveraging):
    """Lightning's, where the module trains, and without what it asks of the device at every step, which would wait for it."""

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self.decay = decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device)  # it was copied before Lightning moved the module
        self.averages, self.current = [*self._average_model.parameters()], [*pl_module.parameters()]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        update = get_ema_multi_avg_fn(
            self.decay if trainer.global_step > 1 else 0.0
        )  # it begins at the first step's
        update(self.averages, self.current, 0)


def fit(
    module: pl.LightningModule,
    steps: int,
    config: FitConfig,
    folder: Path,
    accelerator: str,
    report: Report,
) -> None:
    """Fit `module` for `steps` steps, leaving the averaged weights in it; resumes from `folder/resume.ckpt` where that exists.

    The steps' mean losses are appended to `folder/losses.txt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "resume.ckpt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        report(saved["global_step"], float("nan"))
        if saved["global_step"] >= steps:
            module.load_state_dict(
                saved["state_dict"]
            )  # the averaged weights, where there is an average
            return
    callbacks: list[Callback] = [
        _Losses(folder / "losses.txt", steps, report),
        ModelCheckpoint(
            folder,
            "resume",
            every_n_train_steps=config.checkpoint_every,
            save_top_k=1,
            enable_version_counter=False,
        ),
    ]
    if config.ema_decay > 0:
        callbacks.insert(0, _Averaging(config.ema_decay))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings(
            "ignore", "You're resuming from a checkpoint that ended before the epoch ended"
        )
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            precision=config.precision,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # The loader only counts: a module makes the batch of step n from (seed, n).
        trainer.fit(
            module,
            range(steps),
            ckpt_path=checkpoint if checkpoint.exists() else None,
            weights_only=True,
        )
        trainer.save_checkpoint(
            checkpoint
        )  # so that whoever is cut off after this line has nothing to train again
