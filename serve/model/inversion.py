"""The way back, from images to the noise that gives them, and images between two others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddm.editing import slerp
from ddm.errors import ConfigError, require, shown, within
from ddm.rng import RngStream, normal
from ddm.samplers import REVERSIBLE
from serve.model.edits import check_whole, image_rows
from serve.model.params import SampleConfig
from serve.model.planning import INTEGRATED, Planner, SamplingPlan
from serve.model.running import run_batch

_POLICIES = ("full", "top_k", "nucleus")
T_MIN = 1e-3  # where the ODE starts by default: at t = 0 it is not defined


def inversion_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which `sample` gives back what was inverted: those given, over the whole
    mixture's policy and the end of its ODE.
    """
    return {"policy": "full", "control_variate": "none", "t_min": T_MIN, **settings}


def check_inversion(config: SampleConfig, k: int) -> None:
    """Raise `ConfigError` naming the setting for which there is no way back; k: of the experts."""
    for key, allowed, why in (
        ("policy", _POLICIES, "whose experts are a function of (x, t) alone"),
        ("sampler", REVERSIBLE, "which walk the ODE either way"),
    ):
        value = getattr(config, key)
        require(value in allowed, key, f"be one of {' '.join(allowed)}, {why}", value)
    alone = config.source not in INTEGRATED or k == 1
    require(alone, "source", "be a function of (x, t) alone to be inverted", config.source)
    require(config.t_min > 0, "t_min", "be above 0, where the ODE starts", config.t_min)


@torch.inference_mode()
def invert(
    model: Planner,
    images: Tensor,
    config: SampleConfig,
    batch: int,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """The noise of images, float32 `[n, C, H, W]` on the CPU: see `Model.invert`."""
    with within("sample"):
        check_inversion(config, len(model.names))
        check_whole("batch", batch, 1)
    with within("invert"):
        rows = image_rows("images", images, model.shape)
    plan = _upwards(model.plan(config))
    first, last = (model.schedule(plan.times[n]) for n in (0, -1))
    found = []
    for part in rows.split(batch):
        x = first.a * part.to(model.device)
        index = torch.arange(len(part), device=model.device)
        end, _ = run_batch(model, plan, x, 0, index, progress=progress)
        found.append((end / last.s).float().cpu())
    return torch.cat(found)


def _upwards(plan: SamplingPlan) -> SamplingPlan:
    return replace(plan, times=list(reversed(plan.times)))


def between(
    model: Planner, a: int | Tensor, b: int | Tensor, n: int, invert_one: Callable[[Tensor], Tensor]
) -> Tensor:
    """n noises on the great circle from that of `a` to that of `b`, `[n, C, H, W]`."""
    ends = []
    for key, end in (("a", a), ("b", b)):
        if isinstance(end, Tensor):
            with within("interpolate"):
                image = image_rows(key, end, model.shape)
                require(len(image) == 1, key, "be one image", f"{len(image)} images")
            ends.append(invert_one(image)[0])
            continue
        if isinstance(end, bool) or not isinstance(end, int):
            raise ConfigError(f"interpolate.{key} must be a seed or an image, got {shown(end)}")
        with within("interpolate"):
            check_whole(key, end, 0)
        ends.append(
            normal(end, RngStream.START, torch.zeros(1, dtype=torch.int64), 0, model.shape)[0]
        )
    with within("interpolate"):
        check_whole("n", n, 2)
    return slerp(ends[0], ends[1], torch.linspace(0, 1, n))
