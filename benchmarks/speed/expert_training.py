"""Training one expert: through Lightning (`train.fit.fit`) against the bare loop of the same step,
that is the same batches, noise, loss, Adam, clipping and EMA; against the loop of diffusers' example
for unconditional training, with its network of the same shape; the time of each part of a step; and
what a step costs less without a part (`without`, in percent of the whole: of the average, of
counter-based noise, where torch's generator takes its place, and of drawing images and times).
`Lightning: reports and checkpoints` is what one of either adds. Made-up images. `fit` reports its loss
four times; a training of more than 800 steps reports more rarely.
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import train.fit
from benchmarks.speed.diffusers_training import DiffusersStep
from benchmarks.speed.timing import (
    Call,
    Figures,
    Timing,
    Variant,
    alternate,
    parameters,
    synchronize,
)
from ddm.schedules import schedule
from ddm.training import Batches
from experts.denoiser import ExpertConfig
from experts.expert_module import ExpertLearning
from experts.unet import UNetConfig

L = TypeVar("L", bound=ExpertLearning)

SHAPE = (3, 32, 32)
TINY = Path(__file__).parents[2] / "configs" / "cifar10_tiny.yaml"
_REPORTS = 4  # of the loss in one fit
_ROUND_S = 6.0  # for one of the sides


class BareLearning(ExpertLearning):
    """The very same step without a trainer: `step` is the number of the step."""

    step = 0

    @property
    def global_step(self) -> int:
        return self.step


@dataclass
class Training:
    """One way to train an expert on made-up images."""

    config: ExpertConfig
    device: str
    images: int = 50_000
    shape: tuple[int, int, int] = SHAPE

    def learning(self, kind: type[L]) -> L:
        """A fresh expert that learns."""
        config = self.config
        torch.manual_seed(0)
        images = torch.randint(0, 256, (self.images, *self.shape), dtype=torch.uint8)
        batches = Batches(images, config.batch, seed=0)
        return kind(config.build(self.shape, schedule("vp_linear")), batches, config)

    def fit(
        self, steps: int, reports: int = _REPORTS, checkpoint_every: int | None = None
    ) -> float:
        """Seconds per step through Lightning, after a quarter of the steps."""
        marks: list[tuple[int, float]] = []
        config = replace(self.config, checkpoint_every=checkpoint_every or 10**9)

        def report(step: int, _: float) -> None:
            if step % (steps // _REPORTS) == 0:
                marks.append((step, time.perf_counter()))

        folder = Path(tempfile.mkdtemp())
        accelerator = "cpu" if self.device == "cpu" else "gpu"
        try:
            with mock.patch.object(train.fit, "_REPORTS", reports):
                train.fit.fit(
                    self.learning(ExpertLearning), steps, config, folder, accelerator, report
                )
        finally:
            shutil.rmtree(folder)
        return _seconds_per_step(marks)

    def step(self) -> "BareStep":
        """The bare step of a fresh expert."""
        return BareStep(self.learning(BareLearning), self.device)

    def bare(self, steps: int) -> float:
        """Seconds per step of the bare loop, after a quarter of the steps."""
        marks = []
        step = self.step()
        for n in range(1, steps + 1):
            step()
            if n % (steps // _REPORTS) == 0:
                synchronize(self.device)
                marks.append((n, time.perf_counter()))
        return _seconds_per_step(marks)


def _seconds_per_step(marks: list[tuple[int, float]]) -> float:
    (first, began), (last, ended) = marks[0], marks[-1]
    return (ended - began) / (last - first)


class BareStep:
    """A step of training, and its parts."""

    def __init__(self, learning: BareLearning, device: str) -> None:
        self.learning = learning.to(device)
        learning.on_fit_start()
        learning.train()
        self.device = device
        self.config = learning.config
        self.weights: list[nn.Parameter] = [*learning.parameters()]
        self.averages = [weight.detach().clone() for weight in self.weights]
        found: dict[str, Any] = learning.configure_optimizers()
        self.optimizer = found["optimizer"]
        self.warmup = found["lr_scheduler"]["scheduler"]

    def __call__(self) -> None:
        self.forward_backward()
        self.clip()
        self.adam()
        self.ema()

    def forward_backward(self) -> None:
        """The batch, its noise, the loss and its gradient."""
        half = self.config.precision == "bf16-mixed"
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            loss = self.learning.training_step(None, 0)
        loss.backward()

    def clip(self) -> None:
        """Clip the gradient."""
        self.config.clip(self.weights)

    def adam(self) -> None:
        """Adam and the warm-up's schedule."""
        self.optimizer.step()
        self.warmup.step()
        self.learning.step += 1

    def ema(self) -> None:
        """The averaged weights, which start from those after the first step."""
        decay = self.config.ema_decay if self.learning.step > 1 else 0.0
        get_ema_multi_avg_fn(decay)(self.averages, self.weights, 0)


def variants(device: str) -> list[Variant]:
    """The rows of the table."""
    if device == "cpu":
        configs = {"cifar10_tiny": _tiny()}
        configs["cifar10_tiny, bf16"] = replace(configs["cifar10_tiny"], precision="bf16-mixed")
    else:
        configs = {f"{channels} channels, bf16, compiled": _gpu(channels) for channels in (64, 128)}
    needs_s = 60 if device == "cpu" else 100
    found = []
    for rank, (name, config) in enumerate(configs.items()):
        training = Training(config, device)
        title = f"{name}, batch {config.batch}"
        found.append(Variant(title, partial(_measured, training), rank + 1, needs_s))
        parts = partial(_parts, training)
        found.append(Variant(f"{title}: ms of each part", parts, rank + 2, needs_s))
        without = partial(_without, training)
        found.append(Variant(f"{title}: without", without, rank + 2, needs_s))
        if rank == 0:
            added = partial(_reports_and_checkpoints, training)
            more = f"{title}: Lightning: reports and checkpoints"
            found.append(Variant(more, added, rank + 2, needs_s))
    for bf16 in (True, False) if device == "cpu" else (True,):
        precision = "bf16" if bf16 else "float32"
        batch = 16 if device == "cpu" else 256
        title = f"128 channels, {precision}, batch {batch}, against diffusers"
        found.append(Variant(title, partial(_peer, device, bf16, batch), 2, 100))
    return found


def _tiny() -> ExpertConfig:
    loaded = OmegaConf.to_container(OmegaConf.load(TINY))
    assert isinstance(loaded, dict)
    section = loaded["expert"]
    known = {f.name: section[f.name] for f in fields(ExpertConfig) if f.name in section}
    known |= {"unet": UNetConfig(**section["unet"]), "precision": "32-true", "compile": False}
    return ExpertConfig(**known)


def _gpu(channels: int) -> ExpertConfig:
    return ExpertConfig(
        unet=UNetConfig(channels=channels),
        parameterization="preconditioned",
        loss_weight="min_snr",
        batch=256,
        precision="bf16-mixed",
        compile=True,
    )


def _peer(device: str, bf16: bool, batch: int) -> Figures:
    """Our step, bare, and diffusers'. Without diffusers the row fails and says so."""
    config = ExpertConfig(
        unet=UNetConfig(channels=128, dropout=0.0),
        batch=batch,
        precision="bf16-mixed" if bf16 else "32-true",
    )
    training = Training(config, device, images=2000)
    images = training.learning(ExpertLearning).batches.images
    sides: dict[str, Call] = {"diffusers": DiffusersStep(128, images, batch, bf16, device)}
    sides["ddm"] = training.step()
    timing = alternate(sides, device, rounds=3, most_s=60)
    return {
        **timing.rates(("ddm", "diffusers"), batch, "images/s"),
        **timing.compared("ddm", "diffusers"),
    }


def _measured(training: Training) -> Figures:
    sides: dict[str, Callable[[int], float]] = {"fit": training.fit, "bare": training.bare}
    few = 2 * _REPORTS
    estimate = min(side(few) for side in sides.values())  # and each has warmed up
    steps = _REPORTS * max(2, min(100, int(_ROUND_S / estimate / _REPORTS)))
    timing = Timing({name: [] for name in sides})
    for _ in range(3):
        for name, side in sides.items():
            timing.seconds[name].append(side(steps))
    batch = training.config.batch
    network = training.learning(ExpertLearning).denoiser.network
    return {
        "Mparameters": parameters(network),
        **timing.rates(("fit", "bare"), batch, "images/s"),
        **timing.compared("fit", "bare"),
        "bare ms/step": 1000 * timing.median("bare"),
    }


def _parts(training: Training) -> Figures:
    step = training.step()
    batches = step.learning.batches
    numbers = itertools.count()  # what is drawn for a step is kept until another is asked for

    def draw(n: int) -> None:
        batches.x0(n)
        batches.times(n)

    step()
    sides: dict[str, Call] = {
        "whole step": step,
        "batch and times": lambda: draw(next(numbers)),
        "noise": lambda: batches.noise(1),
        "dropout seed": lambda: batches.seed_dropout(1),
        "all up to backward": step.forward_backward,
        "clip": step.clip,
        "Adam": step.adam,
        "EMA": step.ema,
    }
    timing = alternate(sides, training.device)
    return {f"{side} ms": 1000 * timing.median(side) for side in sides}


def _without(training: Training) -> Figures:
    """Steps that leave one part out, in turn with the whole."""
    whole, no_average, other_noise, no_data = (training.step() for _ in range(4))
    x0, place = no_data.learning.batches.x0(0)
    times = no_data.learning.batches.times(0)

    def torch_noise(*_: int) -> Tensor:
        return torch.randn_like(x0)

    patched = mock.patch.object
    batches = no_data.learning.batches
    with (
        patched(no_average, "ema"),
        patched(other_noise.learning.batches, "noise", torch_noise),
        patched(batches, "x0", return_value=(x0, place)),
        patched(batches, "times", return_value=times),
    ):
        steps = {"average": no_average, "counter-based noise": other_noise, "data": no_data}
        sides: dict[str, Call] = {"whole": whole, **steps}
        timing = alternate(sides, training.device, round_s=1.0)
    figures: Figures = {"whole step ms": 1000 * timing.median("whole")}
    for name in steps:
        ratios = timing.ratio("whole", name)  # the speed of the whole over that without the part
        figures[f"{name} %"] = 100 * (1 - statistics.median(ratios))
    return figures


def _reports_and_checkpoints(training: Training) -> Figures:
    """What a report or a checkpoint at every step adds to a step."""
    steps = 10 * _REPORTS
    sides: dict[str, Callable[[], float]] = {
        "neither": lambda: training.fit(steps),
        "reports": lambda: training.fit(steps, reports=steps),
        "checkpoints": lambda: training.fit(steps, checkpoint_every=1),
    }
    timing = Timing({name: [] for name in sides})
    for _ in range(3):
        for name, side in sides.items():
            timing.seconds[name].append(side())
    base = timing.median("neither")
    return {
        "step ms": 1000 * base,
        "a report ms": 1000 * (timing.median("reports") - base),
        "a checkpoint ms": 1000 * (timing.median("checkpoints") - base),
    }
