"""What training costs, in floating-point operations counted on the networks themselves."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddm.partition import Partition
from ddm.schedules import schedule
from train.config import Config


def compute(config: Config, cut: Partition, monolith_steps: int | None) -> dict[str, Any]:
    """Operations of training: `experts` together, the `monolith`, the `router`'s networks, and its `exact_targets` in float64.

    A step counts three times its forward pass. Also the `parameters` of one expert and of the router.
    """
    process, pi = schedule(**config.schedule), cut.pi
    expert = config.expert.build(cut.shape, process)
    posterior, derivative = config.router.build(cut.shape, pi, process)
    one, cfg = 3 * _forward(expert, cut.shape), config.router
    scorer = 3 * _forward(posterior, cut.shape)
    second = cfg.steps - cfg.switch_step
    images = sum(cut.sizes) * (2 if config.data.flip else 1)
    dots = 2 * images * torch.Size(cut.shape).numel()  # of one noisy image with every real one
    found = {
        "experts": one * config.expert.steps * config.expert.batch * cut.k,
        "monolith": one * (monolith_steps or 0) * config.expert.batch,
        "router": scorer * cfg.images_per_step * (cfg.switch_step + 2 * second),
        "exact_targets": dots * cfg.images_per_step * (cfg.switch_step + 2 * second),
    }
    return {
        **{name: float(count) for name, count in found.items()},
        "parameters": {"expert": _count(expert), "router": _count(posterior) + _count(derivative)},
    }


def _forward(network: nn.Module, shape: list[int]) -> int:
    """Operations of one image's forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, *shape), torch.tensor(0.5))
    return counter.get_total_flops()


def _count(module: nn.Module) -> int:
    parameters: list[Tensor] = list(module.parameters())
    return sum(p.numel() for p in parameters)
