"""The floating-point operations of training, counted on the networks themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddm.gaussian import Gaussians
from ddm.partition import Partition
from ddm.schedules import schedule
from train.config import Config


def compute(config: Config, cut: Partition, monoliths: Mapping[str, Config]) -> dict[str, Any]:
    """Operations of training the `seed_model`, all `experts`, the `monoliths`, each by its row, the
    `router`'s networks, and its `exact_targets` in float64. The seed model that experts and
    monoliths start from is not counted in theirs.

    A training step counts as three forward passes. Also the `parameters` of one expert and of the
    router.
    """
    process = schedule(**config.schedule)
    expert = config.expert.build(cut.shape, process)
    unknown = torch.zeros(cut.k, *cut.shape)  # the Gaussians are not counted
    gaussians = Gaussians(unknown, unknown + 1, process)
    posterior, derivative = config.router.build(cut.shape, cut.pi, process, gaussians)
    expert_image = 3 * _forward(expert, cut.shape)
    router_image = 3 * _forward(posterior, cut.shape)
    cfg = config.router
    stage_two = cfg.steps - cfg.switch_step
    router_batches = cfg.switch_step + 2 * stage_two  # stage 2 trains two networks
    images = sum(cut.sizes) * (2 if config.data.flip else 1)
    numbers = torch.Size(cut.shape).numel()
    products = 2 * images * numbers  # of one noisy image with every real one
    expert_step = expert_image * config.expert.batch
    found = {
        "seed_model": expert_step * config.seed_model.steps,
        "experts": expert_step * config.expert.steps * cut.k,
        **{row: expert_step * monolith.expert.steps for row, monolith in monoliths.items()},
        "router": router_image * cfg.images_per_step * router_batches,
        "exact_targets": products * cfg.images_per_step * router_batches,
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
