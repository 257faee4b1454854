"""Averages of the weights (EMA) while a network is trained: Lightning's own, and more of other lengths."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Averaging(WeightAveraging):
    """Lightning's average on the device that trains, without its per-step checks, each of which waits for the device.

    also: decays of further averages, which are saved with the callback's state
    parts: batches of Lightning's in a step
    averages: the averages by decay, each in the order of the module's parameters
    """

    def __init__(self, decay: float, also: Sequence[float], parts: int) -> None:
        super().__init__(use_buffers=False)
        self.decays, self.parts = (decay, *also), parts
        self.more: list[list[Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device)  # it was copied before Lightning moved the module
        self.current = [*pl_module.parameters()]
        more = self.more or [[p.detach().clone() for p in self.current] for _ in self.decays[1:]]
        self.more = [[p.to(pl_module.device) for p in average] for average in more]
        first = [p.detach() for p in self._average_model.parameters()]
        self.averages = dict(zip(self.decays, [first, *self.more], strict=True))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % self.parts:
            return
        for decay, average in self.averages.items():
            # An average starts from the weights after the first step.
            get_ema_multi_avg_fn(decay if trainer.global_step > 1 else 0.0)(
                average, self.current, 0
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": self.more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.more = state_dict["more"]


@contextmanager
def weights(module: nn.Module, values: Sequence[Tensor] | None) -> Iterator[None]:
    """Let a module have other weights inside, for evaluation; None: its own."""
    own = [p.detach() for p in module.parameters()]
    kept = [p.clone() for p in own] if values is not None else []
    training = module.training
    try:
        if values is not None:
            put(module, values)
        yield
    finally:
        module.train(training)
        if values is not None:
            put(module, kept)


def put(module: nn.Module, values: Sequence[Tensor]) -> None:
    """Set a module's weights."""
    for weight, value in zip(module.parameters(), values, strict=True):
        weight.detach().copy_(value)
