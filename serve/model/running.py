"""One batch of images from start to end, by the experts of a model in this process."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.editing import Given, keep, restore
from ddm.errors import ArtifactError
from ddm.samplers import drive
from router.routing import RoutedDenoiser
from serve.model.planning import Planner, SamplingPlan


class Trace(NamedTuple):
    """What happened while B images were sampled by N denoiser calls, over K experts.

    t: times of the calls, `[N]`
    alpha: `[N, B, K]`
    chosen: which experts moved which image at which call, bool `[N, B, K]`; at times above a
        bundle's `above`, in whose place the seed model did
    calls: expert evaluations, counted per image
    router_calls: evaluations of alpha, counted per image; between two, `alpha` is the last
    """

    t: Tensor
    alpha: Tensor
    chosen: Tensor
    calls: int
    router_calls: int


@torch.inference_mode()
def sample_batch(
    model: Planner,
    plan: SamplingPlan,
    seed: int,
    index: Tensor,
    *,
    given: Given | None = None,
    noise: Tensor | None = None,
    trace: bool = False,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, RoutedDenoiser]:
    """Images `index` `[B]` of a seed, `[B, C, H, W]`, float32, on the CPU, and what sampled them;
    `given` and `noise` as in `SamplingPlan.start`.

    Raises `ArtifactError` if the images are not finite.
    """
    start = plan.start(seed, index, given, noise)
    images, routed = run_batch(model, plan, start, seed, index, given, trace, progress)
    images = images if given is None else restore(given, images)
    images = images.clamp(-1, 1) if plan.config.clip else images
    return images.float().cpu(), routed


@torch.inference_mode()
def run_batch(
    model: Planner,
    plan: SamplingPlan,
    x: Tensor,
    seed: int,
    index: Tensor,
    given: Given | None = None,
    trace: bool = False,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, RoutedDenoiser]:
    """The end of the plan's trajectories from x `[B, C, H, W]`, and what denoised them; `given` is
    what they keep.

    Raises `ArtifactError` if the end is not finite.
    """
    routed = RoutedDenoiser(
        model.experts,
        plan.router,
        seed=seed,
        index=index,
        calls_per_step=plan.method.calls_per_step,
        clip=plan.config.clip,
        control_variate=plan.control_variate,
        condition=plan.condition,
        trace=trace,
    )

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        step = routed.steps_begun
        denoised = routed(x, t)
        if progress is not None and routed.steps_begun > step:
            progress(len(x))
        return denoised if given is None else keep(given, denoised)

    end, _calls = drive(plan.trajectory(x, seed, index), denoise)
    if not end.isfinite().all():
        raise ArtifactError(
            f"{model.manifest}: images {int(index[0])} to {int(index[-1])} "
            f"of seed {seed} are not finite: "
            "the weights are damaged, or do not work with these settings"
        )
    return end, routed


def joined(batches: list[RoutedDenoiser]) -> Trace:
    """The trace of batches that were sampled one after another."""
    steps = list(zip(*(routed.steps for routed in batches), strict=True))
    return Trace(
        torch.tensor([parts[0].t for parts in steps], dtype=torch.float64),
        torch.stack([torch.cat([part.alpha for part in parts]) for parts in steps]),
        torch.stack([torch.cat([part.chosen for part in parts]) for parts in steps]),
        sum(routed.calls for routed in batches),
        sum(routed.router_calls for routed in batches),
    )
