"""Fitting one module with Lightning: averaged weights, checkpoints, progress, and no step on a loss that is not finite."""

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ddm.artifacts import naming, replaced
from ddm.errors import ArtifactError, DdmError, require
from ddm.training import Batches, FitConfig
from experts.expert_module import ExpertLearning
from train import stopping
from train.averaging import Averaging, put, weights
from train.ranks import current
from train.resume import NEWEST, ResumeFiles, read_resume
from train.stopping import Stopped
from train.time_spent import Stopwatch
from train.watching import Watch, Watching, held_out_losses

Report = Callable[[int, float], None]  # (steps done, mean loss since the last report)

_REPORTS = 200  # in one training

log = logging.getLogger(__name__)


class NotFiniteError(DdmError):
    """A loss, a gradient or a weight is NaN or infinite: the training has diverged."""


class _Steps(Callback):
    """What happens after a step: the loss is recorded, reported and checked; checkpoints are saved; signals are answered.

    The loss stays on the device between reports, so that no step waits for it.
    """

    def __init__(
        self, folder: Path, steps: int, config: FitConfig, report: Report, watching: Watching
    ) -> None:
        self.folder, self.config, self.report, self.watching = folder, config, report, watching
        self.report_every = max(1, steps // _REPORTS)
        self.sum: Tensor | float = 0.0
        self.count = 0
        self.first_bad: Tensor | None = (
            None  # the first step with a bad loss or gradient; 0 for none
        )
        self.on_sigterm = signal.getsignal(signal.SIGTERM)
        # The last step after which several processes asked one another, and how many steps are between two such.
        self.agreed, self.agreed_s, self.apart = 0, time.monotonic(), 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.module = pl_module
        self.stopwatch = Stopwatch(self.folder, trainer.global_step, str(pl_module.device))
        self.first_bad = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.on_sigterm)  # Lightning has put its own in front
        # A checkpoint of what was to be the last step has a learning rate of 0 for the next one.
        for config in trainer.lr_scheduler_configs:
            schedule = config.scheduler
            assert isinstance(schedule, LambdaLR)
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, (base, rate) in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate(schedule.last_epoch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        self.rate = optimizer.param_groups[0]["lr"]
        if trainer.precision == "16-mixed":
            return  # an infinite gradient is how the scale of the loss is found: the step is skipped
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._check_later(nn.utils.get_total_norm(gradients), trainer.global_step + 1)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step, loss = trainer.global_step, outputs["loss"].detach()
        self.sum = self.sum + loss  # Lightning has divided that of a part by the number of parts
        if (batch_idx + 1) % self.config.accumulate:
            self._check_later(loss, step + 1)
            return
        self.count += 1
        self._check_later(loss, step)
        last = step == trainer.max_steps
        signum = self._asked_to_stop(trainer, step)
        if step % self.report_every == 0 or last:
            self._report(trainer, step)
        if step % self.config.checkpoint_every == 0 or last or signum is not None:
            self._check_now()
            check_finite(pl_module, step)
            trainer.save_checkpoint(self.folder / NEWEST)
            if trainer.is_global_zero:
                self.stopwatch.save()
        if signum is not None:
            raise Stopped(signum, [step])

    def _asked_to_stop(self, trainer: pl.Trainer, step: int) -> int | None:
        """The signal that asks to stop after this step; of several processes any one's, so that all stop at the same step.

        They ask one another about once a second, because to ask is to wait for the device.
        """
        signum = stopping.requested()
        if trainer.world_size == 1:
            return signum
        if step < self.agreed + self.apart:
            return None
        since_s = time.monotonic() - self.agreed_s
        mine = torch.tensor([signum is not None, since_s], device=trainer.strategy.root_device)
        asked, seconds = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        soon = seconds < trainer.world_size
        self.apart = 2 * self.apart if soon else max(1, self.apart // 2)
        self.agreed, self.agreed_s = step, time.monotonic()
        return (signum or signal.SIGTERM) if asked else None

    def _check_later(self, value: Tensor, step: int) -> None:
        assert self.first_bad is not None
        new = (self.first_bad == 0) & ~value.isfinite()
        self.first_bad = torch.where(new, step, self.first_bad)

    def _check_now(self) -> None:
        assert self.first_bad is not None
        if (step := int(self.first_bad)) > 0:
            raise _not_finite("the loss or its gradient", step, self.module)

    def _report(self, trainer: pl.Trainer, step: int) -> None:
        self._check_now()
        mean = float(trainer.strategy.reduce(self.sum, reduce_op="mean")) / self.count
        self.sum, self.count = 0.0, 0
        self.report(step, mean)
        if not trainer.is_global_zero:
            return
        path = self.folder / "losses.txt"
        with naming(path, "written"), path.open("a") as file:
            file.write(f"{step} {mean:.6g}\n")
        batches = getattr(self.module, "batches", None)
        images = batches.batch if isinstance(batches, Batches) else 1
        self.watching.show(step, images, {"loss": mean, "learning rate": self.rate})


def check_finite(module: pl.LightningModule, step: int) -> None:
    """Raise `NotFiniteError` if a weight is NaN or infinite."""
    if not nn.utils.get_total_norm([*module.parameters()], torch.inf).isfinite():
        raise _not_finite("a weight", step, module)


def _not_finite(what: str, step: int, module: pl.LightningModule) -> NotFiniteError:
    batches = getattr(module, "batches", None)
    batch = ""
    if isinstance(batches, Batches):
        batch = f", in the batch of {batches.named(getattr(module, 'done', 0) + step - 1)}"
    return NotFiniteError(f"{what} is NaN or infinite at step {step}{batch}")


def fit(
    module: pl.LightningModule,
    steps: int,
    config: FitConfig,
    folder: Path,
    accelerator: str,
    report: Report,
    of: str = "",
    watch: Watch | None = None,
) -> float:
    """Fit `module` for `steps` steps, leaving the averaged weights in it; resumes from `folder/resume.ckpt`, whose `of`,
    the hash of what is trained from, must be the same.

    Of several processes (`ranks.among`) each calls it with its part of the batches; rank 0 writes the files.

    The mean losses are appended to `folder/losses.txt`, one line `step loss` per report. Returns the decay of the
    average: the best on held-out images if `watch` has several.

    Raises `NotFiniteError` at the first loss, gradient or weight that is not finite, `ArtifactError` if the checkpoints are
    damaged or of another training, `ConfigError` without the GPU that is asked for, and `Stopped` after a signal, with a
    checkpoint saved.
    """
    first = current().rank == 0
    watch = Watch() if watch is None else watch
    if not first:  # these have the averages too, whose states the checkpoint holds
        watch = Watch(ema_also=watch.ema_also)
    folder.mkdir(parents=True, exist_ok=True)
    saved = read_resume(folder, of)
    # Lightning would take Apple's mps, which lacks float64.
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    rule = "be auto or cpu on a machine without a CUDA GPU"
    require(accelerator != "gpu" or device == "cuda", "accelerator", rule, accelerator)
    done = 0 if saved is None else int(saved["global_step"])
    if done > steps:
        raise ArtifactError(f"{folder / NEWEST} is of step {done}, more than the {steps} asked for")
    if first:
        for name in ("losses.txt", "validation.csv"):
            _cut(folder / name, done)
    averaging = None
    if config.ema_decay > 0:
        averaging = Averaging(config.ema_decay, watch.ema_also, config.accumulate)
    if saved is not None:
        log.info("%s resumes at step %d", folder, done)
        report(done, float("nan"))
    if saved is None or done < steps:
        files = ResumeFiles(saved, of)
        _train(module, steps, config, folder, device, report, watch, averaging, files)
    else:
        module.load_state_dict(saved["state_dict"])  # the averaged weights, if there are any
        if averaging is not None:
            averaging.load_state_dict(saved["callbacks"][averaging.state_key])
    check_finite(module, steps)
    if averaging is None:
        return config.ema_decay
    module.to(device)  # Lightning has moved it to the CPU
    decay = _choose(module, averaging, watch)
    module.cpu()
    return decay


def _choose(module: pl.LightningModule, averaging: Averaging, watch: Watch) -> float:
    """Leave the average with the least held-out loss in the module, which has the first; returns its decay."""
    first = [p.detach().clone() for p in module.parameters()]
    averages = dict(zip(averaging.decays, [first, *averaging.more], strict=True))
    if len(averages) == 1 or not watch.validates:
        return averaging.decays[0]
    assert isinstance(module, ExpertLearning)
    assert watch.held_out is not None
    losses = {}
    for decay, average in averages.items():
        with weights(module, average):
            losses[decay] = held_out_losses(module, watch.held_out, watch.told)["loss"]
    best = min(losses, key=lambda decay: losses[decay])
    put(module, averages[best])
    shown = ", ".join(f"{loss:.5g} with {decay:g}" for decay, loss in losses.items())
    log.info("ema_also: held-out losses are %s", shown)
    return best


def _train(
    module: pl.LightningModule,
    steps: int,
    config: FitConfig,
    folder: Path,
    accelerator: str,
    report: Report,
    watch: Watch,
    averaging: Averaging | None,
    files: ResumeFiles,
) -> None:
    assert config.precision != "auto"  # it is settled before a stage begins
    ranks, saved = current(), files.saved
    done = 0 if saved is None else int(saved["global_step"])
    watching = Watching(folder, watch, averaging, done)
    steps_of = _Steps(folder, steps, config, report, watching)
    callbacks: list[Callback] = [*([] if averaging is None else [averaging]), watching, steps_of]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings(), stopping.deferred():
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        warnings.filterwarnings(
            "ignore", "You're resuming from a checkpoint that ended before the epoch ended"
        )
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=ranks.devices,
            strategy=ranks.strategy,
            max_steps=steps,
            max_epochs=-1,
            precision=config.precision,
            accumulate_grad_batches=config.accumulate,
            plugins=[ranks.environment, files],
            use_distributed_sampler=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # The loader only counts: a module makes the batch of step n from (seed, n).
        ranks.prepare(trainer).fit(
            module,
            range(steps * config.accumulate),
            ckpt_path=None if saved is None else folder / NEWEST,
            weights_only=True,
        )


def _cut(path: Path, done: int) -> None:
    """Remove the lines of steps after `done`, which will be trained again; a line of words stays."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= done]
        if len(kept) < len(lines):
            with replaced(path) as scratch:
                scratch.write_text("".join(kept))


def _step_of(line: str) -> float:
    first = line.replace(",", " ").split()[:1]
    if not first or not line.endswith("\n"):
        return math.inf  # cut off by a kill
    return int(first[0]) if first[0].isdigit() else 0
