"""Fitting: the average of the weights, beside one by hand."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from ddm.training import FitConfig
from train.fit import fit


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
def test_what_is_left_is_the_average_that_begins_at_the_first_step_s_weights(
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
