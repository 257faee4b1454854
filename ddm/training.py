"""What training an expert and a router share: Adam, and batch, times and noise of step n as
functions of (seed, n).
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddm.errors import require
from ddm.muon import Muon
from ddm.rng import RngStream, derive_seed, normal, uniform

_NAMED = 8  # images of a batch, in an error

# Random numbers that are drawn at once, for several steps: drawing few is bound by launches.
_AT_ONCE = 2**16, 2**22  # on a CPU, whose cache they should fit, and on a GPU
_STEPS = 256  # at most


@dataclass
class FitConfig:
    """How a network is trained: Adam or Muon with a linear warm-up, gradient clipping and an average
    of the weights (EMA).

    optimizer: adam; or muon for matrices and convolutions, and adam for the rest (`ddm.muon`).
    steps: optimizer steps, at least 1.
    batch: images per step, at least 1.
    accumulate: parts that a batch is split into, one after another, so that it fits into memory; at
    least 1. A step is one update by the gradient of all `batch` images, whatever the parts.
    learning_rate: after the warm-up, above 0.
    warmup_steps: steps over which the learning rate rises linearly, at least 0.
    cooldown: the last part of the steps, over which it falls to 0; in [0, 1]; 0 keeps it constant.
    cooldown_shape: how it falls: linear, or cosine (arXiv 1608.03983, equation 5).
    gradient_clip: the largest norm of the gradient, at least 0; 0 is no limit.
    ema_decay: of the averaged weights, per step, in [0, 1); 0 keeps the raw weights.
    precision: Lightning's: 32-true, bf16-mixed or 16-mixed; or auto, for an expert: the faster of
    the first two here, measured once for a run.
    compile: use torch.compile: about a minute before the first step, then faster steps on a GPU.
    checkpoint_every: steps between checkpoints to resume from, at least 1.
    t_min: times are sampled from [t_min, 1]; in (0, 1).
    """

    optimizer: Literal["adam", "muon"] = "adam"
    steps: int = 1000
    batch: int = 128
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    cooldown: float = 0.0
    cooldown_shape: Literal["linear", "cosine"] = "linear"
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "auto"] = "32-true"
    compile: bool = False
    checkpoint_every: int = 1000
    t_min: float = 1e-3

    def check(self) -> None:
        """Raise `ConfigError` naming the key of a value out of its range."""
        for key in ("steps", "batch", "accumulate", "checkpoint_every"):
            require(getattr(self, key) >= 1, key, "be at least 1", getattr(self, key))
        require(self.learning_rate > 0, "learning_rate", "be above 0", self.learning_rate)
        require(self.warmup_steps >= 0, "warmup_steps", "be at least 0", self.warmup_steps)
        require(0 <= self.cooldown <= 1, "cooldown", "be in [0, 1]", self.cooldown)
        if self.cooldown_shape == "cosine":
            require(self.cooldown > 0, "cooldown", "be above 0 for cooldown_shape=cosine", 0)
        require(self.gradient_clip >= 0, "gradient_clip", "be at least 0", self.gradient_clip)
        require(0 <= self.ema_decay < 1, "ema_decay", "be in [0, 1)", self.ema_decay)
        require(0 < self.t_min < 1, "t_min", "be in (0, 1)", self.t_min)

    def optimization(self, module: nn.Module, done: int = 0) -> Any:
        """The optimizer and schedule of a module's parameters, as `LightningModule.configure_optimizers` returns them.

        done: of `steps`, those before this optimizer's first, which warms up anew.
        """
        # A fused step unscales float16 gradients itself, which is too late for clipping.
        fused, rate = self.precision != "16-mixed", self.learning_rate
        optimizer = (
            Muon(module, rate, fused, self.compile)
            if self.optimizer == "muon"
            else torch.optim.Adam(module.parameters(), rate, fused=fused)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(self.rate(n), self.rate(done + n))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a part of `learning_rate`; steps are counted from 0."""
        rising = (step + 1) / (self.warmup_steps + 1)
        falling = (self.steps - step) / (self.cooldown * self.steps + 1)
        if self.cooldown_shape == "cosine":
            falling = (1 - math.cos(math.pi * min(1.0, falling))) / 2
        return min(1.0, rising, falling)

    def clip(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clip the gradients' norm.

        Lightning's clipping refuses a fused optimizer in mixed precision.
        """
        if self.gradient_clip > 0:
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]; float images as they are."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


@dataclass
class Batches:
    """Training images, uint8 `[N, C, H, W]`, on the training device, and their batches.

    They are a tensor, or what has its length, shape, device and `to` and is indexed like one.

    A batch of B images can be had in `parts`: part p has its rows p, p + parts, ... and of each row
    the same image, time and noise as the whole batch. Of `ranks` processes that share a batch, this
    one is `rank`: its part p has the rows `p ranks + rank` and so on.

    chances: how likely each image is to be drawn, float64 `[N]`, together 1; None for all alike.
    """

    images: Any
    batch: int
    seed: int
    flip: bool = False  # mirror every image with probability 1/2
    parts: int = 1
    rank: int = 0
    ranks: int = 1
    chances: Tensor | None = None
    _kept: dict[str, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Batches":
        return copy.copy(self)  # Lightning's EMA copies the module; the images stay shared

    def __post_init__(self) -> None:
        self._rising = None if self.chances is None else self.chances.cumsum(0)

    def to(self, device: torch.device) -> None:
        """Have the images, and so the batches, on this device from now on."""
        self.images = self.images.to(device)
        if self._rising is not None:
            self._rising = self._rising.to(device)

    def x0(self, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """The images of a part of a step, `[B / parts, C, H, W]` in [-1, 1], and their indices
        among all, int64 `[B / parts]`.
        """
        place = self._place(step, part)
        x0 = to_float(self.images[place])
        if self.flip:
            mirrored = self.uniforms(RngStream.FLIP, step, part, 1) < 0.5
            x0 = torch.where(mirrored[:, :, None, None], x0.flip(3), x0)
        return x0, place

    def named(self, step: int) -> str:
        """Which images a step has, in words, for who looks for a bad one."""
        first = self._place(step, 0)[:_NAMED].tolist()
        more = f" and {self.batch - len(first)} more" if len(first) < self.batch else ""
        return f"seed {self.seed} and step {step} (images {', '.join(map(str, first))}{more})"

    def times(self, step: int, part: int = 0) -> Tensor:
        """Stratified uniform numbers in (0, 1), float32 `[B / parts]`: of all parts together one in
        each of B equal intervals, for less variance.
        """
        u = self.uniforms(RngStream.TIME, step, part, 1)[:, 0]
        return ((self._rows()[part :: self.parts] + u) / self.batch).float()

    def noise(self, step: int, part: int = 0) -> Tensor:
        """The noise of a part of a step, `[B / parts, C, H, W]`."""
        shape = self.images.shape[1:]
        draw = partial(normal, self.seed, RngStream.NOISE, shape=shape)
        return self._of_step("noise", draw, step, part, math.prod(shape))

    def uniforms(self, stream: RngStream, step: int, part: int, count: int) -> Tensor:
        """Uniform numbers in (0, 1) for the images of a part of a step, float64 `[B / parts, count]`."""
        draw = partial(uniform, self.seed, stream, count=count)
        return self._of_step(f"{stream} {count}", draw, step, part, count)

    def seed_dropout(self, step: int, part: int = 0) -> None:
        """Seed torch's generator, which dropout uses, by (seed, step) and rank; later parts go on
        with it.
        """
        if part == 0:
            place = step * self.ranks + self.rank
            torch.manual_seed(derive_seed(self.seed, RngStream.DROPOUT, place))

    def _place(self, step: int, part: int) -> Tensor:
        u = self.uniforms(RngStream.BATCH, step, part, 1)[:, 0]
        if self._rising is None:
            return (u * len(self.images)).long()
        return torch.searchsorted(self._rising, u, right=True).clamp_max(len(self.images) - 1)

    def _of_step(
        self, name: str, draw: Callable[[Tensor, Tensor], Tensor], step: int, part: int, count: int
    ) -> Tensor:
        """What `draw(rows, steps)` gives for a part of a step, `[B / parts, ...]`: `count` numbers
        for each row. If there is room, they are drawn for a block of steps at once and kept by name.
        """
        rows = self._rows()
        size = min(_STEPS, _AT_ONCE[rows.device.type == "cuda"] // (len(rows) * count))
        if size < 2:
            rows = rows[part :: self.parts]
            return draw(rows, torch.full_like(rows, step))
        first = step - step % size
        kept = self._kept.get(name)
        if kept is None or kept[0] != first or kept[1].device != rows.device:
            steps = torch.arange(first, first + size, device=rows.device)
            drawn = draw(rows.repeat(size), steps.repeat_interleave(len(rows)))
            self._kept[name] = kept = first, drawn.unflatten(0, (size, len(rows)))
        return kept[1][step - first, part :: self.parts]

    def _rows(self) -> Tensor:
        """The rows of all parts of a batch that this process has, in the order of the parts."""
        return torch.arange(self.rank, self.batch, self.ranks, device=self.images.device)
