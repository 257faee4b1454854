"""What training and sampling cost, measured by a few steps: parameters, memory, seconds."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from ddm.gaussian import Gaussians
from ddm.schedules import schedule
from ddm.training import Batches
from experts.expert_module import ExpertLearning
from router.networks import DerivativeNet
from router.router_module import PosteriorLearning, RouterLearning
from train.config import Config
from train.launch import torch_threads
from train.stages.denoiser import expert_config, threads_per_expert

FLOAT_BYTES = 4
_FEW = 12  # images of a first, short measurement; a multiple of 3
_LONG_S = (
    2.0  # a whole batch that would take longer is not measured, but scaled up from a few images
)


class Cost(NamedTuple):
    """Of a training: its parameters, the bytes of a process, seconds per step."""

    parameters: int
    memory_bytes: float
    step_s: float


def states(ema_decay: float, more: int = 0) -> int:
    """What a checkpoint holds, in multiples of the weights: them, Adam's two moments, the averages."""
    return 3 + (1 + more if ema_decay > 0 else 0)


def expert_cost(config: Config, images: Tensor, clusters: int) -> Cost:
    """Of one of `clusters` experts, by some of its images, uint8 `[n, C, H, W]`; without those in memory."""
    cfg = expert_config(config)
    denoiser = cfg.build(images.shape[1:], schedule(**config.schedule))
    plain = replace(cfg, compile=False)

    def learning(rows: int) -> pl.LightningModule:
        return ExpertLearning(denoiser, Batches(images, rows, 0, config.data.flip), plain)

    with torch_threads(threads_per_expert(config, clusters)):
        found = _measured(learning, cfg.batch // cfg.accumulate, config.device)
    state = found.parameters * FLOAT_BYTES * (1 + states(cfg.ema_decay, len(cfg.ema_also)))
    return Cost(found.parameters, found.memory_bytes + state, found.step_s * cfg.accumulate)


def router_cost(config: Config, images: Tensor, sizes: list[int]) -> tuple[Cost, float]:
    """Of the router's second, larger stage, by images of a cluster, and the seconds of both stages."""
    cfg, process, k = replace(config.router, compile=False), schedule(**config.schedule), len(sizes)
    total = sum(sizes) * (2 if config.data.flip else 1)
    count = cfg.samples if cfg.data == "experts" else total
    whole = images[torch.arange(count) % len(images)]  # targets take the time of all images
    cluster = torch.arange(count) % k
    gaussians = Gaussians.of_clusters([images] * k, process)
    pi = torch.full((k,), 1 / k)
    posterior, _ = cfg.build(list(images.shape[1:]), pi, process, gaussians)
    derivative = DerivativeNet.from_trunk(posterior, cfg.bands)

    def first(rows: int) -> pl.LightningModule:
        return PosteriorLearning(posterior, Batches(whole, rows, 0), cluster, cfg)

    def second(rows: int) -> pl.LightningModule:
        return RouterLearning(posterior, derivative, Batches(whole, rows, 0), cluster, cfg)

    part = cfg.images_per_step // cfg.accumulate
    costs = [_measured(stage, part, config.device) for stage in (first, second)]
    steps = cfg.switch_step, cfg.steps - cfg.switch_step
    seconds = sum(count * cost.step_s for count, cost in zip(steps, costs, strict=True))
    state = costs[1].parameters * FLOAT_BYTES * (1 + states(cfg.ema_decay))
    memory = costs[1].memory_bytes + state + whole.nbytes
    return Cost(costs[1].parameters, memory, costs[1].step_s), seconds * cfg.accumulate


def _measured(learning: Callable[[int], pl.LightningModule], batch: int, device: str) -> Cost:
    """The parameters of a training, the bytes that its backward pass keeps, and the seconds of a forward and backward pass.

    A batch that takes long is scaled up from a few images.
    """
    rows = min(batch, _FEW)
    for _ in range(2):
        module = learning(rows).to(device)
        module.on_fit_start()
        kept, seconds = _step(module, device)
        kept, seconds = kept * batch / rows, seconds * batch / rows
        if rows == batch or seconds > _LONG_S:
            break
        rows = batch
    return Cost(sum(p.numel() for p in module.parameters()), kept, seconds)


def _step(module: pl.LightningModule, device: str) -> tuple[float, float]:
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    best = math.inf
    for _ in range(2):  # the first one warms up
        kept.clear()
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module.training_step(None, 0)
        assert isinstance(loss, Tensor)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    module.zero_grad()
    return float(sum(kept.values())), best


@torch.no_grad()
def forward_s(config: Config, shape: list[int]) -> float:
    """The seconds that an expert takes for one image in a batch."""
    denoiser = expert_config(config).build(shape, schedule(**config.schedule))
    denoiser = denoiser.eval().to(config.device)
    found = math.inf
    for rows in (_FEW, 8 * _FEW):
        x = torch.zeros(rows, *shape, device=config.device)
        t = torch.full((rows,), 0.5, device=config.device)
        for _ in range(2):
            began = time.perf_counter()
            denoiser(x, t).sum().item()
            found = min(found, (time.perf_counter() - began) / rows)
        if found * 8 * _FEW > _LONG_S:
            break
    return found
