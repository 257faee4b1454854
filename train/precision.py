"""`expert.precision=auto`: the precision in which this machine trains an expert fastest."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ddm.artifacts import read_json, scratch_beside, write_json
from ddm.errors import ArtifactError, shown
from ddm.schedules import schedule
from ddm.training import Batches
from experts.expert_module import denoising_loss
from train.config import Config
from train.launch import torch_threads
from train.run_folder import claim, read_clusters
from train.stages.denoiser import threads_per_expert

log = logging.getLogger(__name__)

Choice = Literal["32-true", "bf16-mixed"]

# So much faster must bfloat16 be: between equals chance would choose, and with it the bits of the weights.
_MARGIN = 1.2
_ROUNDS = 3


def with_precision(config: Config) -> Config:
    """The config with a precision for an expert in place of `auto`.

    It is measured where the run's folder has none yet, and kept there: who resumes goes on in the same one. Raises
    `ArtifactError` if what is kept there is damaged.
    """
    if config.expert.precision != "auto":
        return config
    path = config.folder / "experts" / "precision.json"
    if path.exists():
        kept: Any = read_json(path).get("precision")
        if kept not in get_args(Choice):
            raise ArtifactError(
                f"{path} is damaged: precision must be one of {' '.join(get_args(Choice))}, got "
                f"{shown(kept)}; delete it to measure again"
            )
        chosen: Choice = kept
    else:
        claim(config)
        ms = _milliseconds(config)
        chosen = "bf16-mixed" if ms["32-true"] > _MARGIN * ms["bf16-mixed"] else "32-true"
        _write_first(path, {"precision": chosen, "ms": ms})
        found = with_precision(config)  # by what is there: that of the first process
        times = ", ".join(f"{name} {value:.0f} ms" for name, value in ms.items())
        what = found.expert.precision
        log.info("expert     expert.precision=auto is %s here: %s a step", what, times)
        return found
    return replace(config, expert=replace(config.expert, precision=chosen))


def _write_first(path: Path, facts: dict[str, Any]) -> None:
    """Write a file unless there is one: experts may be begun side by side, each by its own process."""
    scratch = scratch_beside(path)
    write_json(scratch, facts)
    try:
        os.link(scratch, path)
    except OSError:
        if not path.exists():  # a file system without links
            scratch.replace(path)
    scratch.unlink(missing_ok=True)


def _milliseconds(config: Config) -> dict[Choice, float]:
    """Of a training step, without the optimizer's, in each precision: the best of a few, in turn."""
    _, partition = read_clusters(config)
    threads = threads_per_expert(config, partition.k)
    steps: dict[Choice, Callable[[], object]] = {
        name: _step(config, partition.shape, name) for name in ("32-true", "bf16-mixed")
    }
    best = dict.fromkeys(steps, float("inf"))
    with torch_threads(threads):
        for step in steps.values():
            step()
        for _ in range(_ROUNDS):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                best[name] = min(best[name], 1000 * (time.perf_counter() - began))
    return best


def _step(config: Config, shape: list[int], name: Choice) -> Callable[[], None]:
    """A function that does the forward and backward pass of a batch, to the end."""
    cfg = config.expert
    device = config.device
    denoiser = cfg.build(shape, schedule(**config.schedule)).to(device)
    images = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
    batches = Batches(images, cfg.batch // cfg.accumulate, 0)
    x0, t, noise = batches.x0(0)[0], batches.times(0), batches.noise(0)

    def step() -> None:
        denoiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=name == "bf16-mixed"):
            loss = denoising_loss(denoiser(noise, t), x0, torch.ones_like(t))
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step
