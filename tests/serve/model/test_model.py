"""Sampling with a loaded model: images by seed, sources, policies and samplers, and traces."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.gaussian import moments
from ddm.partition import Partition
from ddm.rng import RngStream, normal
from ddm.samplers import SAMPLERS, drive, sample
from ddm.samplers import start as trajectory_of
from router.policies import POLICIES
from router.sources import SOURCES
from serve import SampleConfig, load


@pytest.mark.parametrize(
    ("policy", "sampler"),
    [
        *(
            (policy, "dpmpp_2m")
            for policy in ("balanced", "adaptive", "stochastic", "fixed", "full")
        ),
        *(("balanced", sampler) for sampler in SAMPLERS if sampler != "dpmpp_2m"),
        ("adaptive", "heun"),
        ("stochastic", "ddpm"),
    ],
)
def test_an_image_is_the_same_alone_and_among_others(
    small_run: Path, policy: str, sampler: str
) -> None:
    model = load(small_run)
    settings = {
        "seed": 0,
        "steps": 6,
        "policy": policy,
        "sampler": sampler,
        "control_variate": "gaussian",
    }
    many, traced = model.sample(8, trace=True, **settings)
    one, alone = model.sample(1, first_index=3, trace=True, **settings)
    assert torch.equal(traced.chosen[:, 3], alone.chosen[:, 0])
    assert torch.allclose(many[3], one[0], atol=1e-4)
    assert (many[3] - many[4]).abs().max() > 0.05


def test_the_size_of_the_batch_changes_no_image(small_run: Path) -> None:
    model = load(small_run)
    whole, by_three = (model.sample(8, seed=1, steps=5, batch=batch) for batch in (8, 3))
    assert torch.allclose(whole, by_three, atol=1e-4)


def test_another_seed_gives_other_images(small_run: Path) -> None:
    model = load(small_run)
    assert (model.sample(2, seed=0, steps=3) - model.sample(2, seed=1, steps=3)).abs().mean() > 0.05


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_source_goes_with_every_policy(small_run: Path, source: str, policy: str) -> None:
    images, trace = load(small_run).sample(3, steps=4, source=source, policy=policy, trace=True)
    assert images.dtype == torch.float32
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert torch.allclose(trace.alpha.sum(dim=2), torch.ones(4, 3), atol=1e-5)
    assert trace.calls == int(trace.chosen.sum())


def test_a_trace_counts_calls_per_expert(small_run: Path) -> None:
    model = load(small_run)
    assert model.sample(5, steps=4, policy="balanced", trace=True)[1].calls == 5 * 4
    assert model.sample(5, steps=4, policy="full", trace=True)[1].calls == 5 * 4 * 3
    assert model.sample(5, steps=4, policy="top_k", top_k=2, trace=True)[1].calls == 5 * 4 * 2


def calls_of(sampler: str, steps: int) -> int:
    """Denoiser calls in so many steps to t = 0: the last one needs no second."""
    return 2 * steps - 1 if sampler in ("heun", "accelerated_ode") else steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_with_every_policy_and_its_calls_are_counted(
    small_run: Path, sampler: str
) -> None:
    model, n, steps = load(small_run), 2, 3
    calls = calls_of(sampler, steps)
    for policy in POLICIES:
        images, trace = model.sample(n, steps=steps, sampler=sampler, policy=policy, trace=True)
        assert images.isfinite().all() and images.abs().max() <= 1, policy
        assert (images[0] - images[1]).abs().max() > 0.05, policy
        assert len(trace.t) == calls and trace.calls == int(trace.chosen.sum())
        match policy:
            case "full":
                assert trace.calls == n * calls * 3
            case "nucleus":
                assert n * calls <= trace.calls <= n * calls * 3
            case "adaptive":  # a second expert in one of the three steps at most
                assert n * calls <= trace.calls <= n * (calls + math.ceil(calls / steps))
            case _:
                assert trace.calls == n * calls, policy


def test_a_choice_is_held_within_a_step_of_two_calls(
    small_run: Path,
) -> None:
    _, trace = load(small_run).sample(
        8, steps=5, sampler="heun", policy="stochastic", source="prior", trace=True
    )
    first, second = trace.chosen[0:8:2], trace.chosen[1:8:2]
    assert first.equal(second)
    assert not any(one.equal(other) for one, other in pairwise(trace.chosen[0:9:2]))


def test_adaptive_spends_its_budget_where_alpha_is_even(
    small_run: Path,
) -> None:
    model = load(small_run)
    for budget, calls in ((1.0, 8), (1.25, 10), (1.5, 12), (2.0, 16)):
        settings = {"steps": 8, "source": "prior", "policy": "adaptive", "budget": budget}
        assert model.sample(3, trace=True, **settings)[1].calls == 3 * calls


def test_the_order_of_unipc_changes_the_images_from_the_third_step(small_run: Path) -> None:
    model = load(small_run)
    for steps, differs in ((2, False), (6, True)):
        settings = {"steps": steps, "sampler": "unipc", "source": "prior", "policy": "full"}
        third, second = (model.sample(2, order=order, **settings) for order in (3, 2))
        assert ((third - second).abs().max() > 1e-4) == differs
        assert torch.equal(model.sample(2, **settings), third)  # the default


def test_the_gaussians_are_those_of_the_clusters_in_their_order(small_run: Path) -> None:
    model, cut = load(small_run), Partition.read(small_run / "partition")
    for k in range(3):
        mean, variance = moments(cut.cluster(small_run / "partition", k)["images"])
        torch.testing.assert_close(model.gaussians.means[k], mean)
        torch.testing.assert_close(model.gaussians.variances[k], variance)
    assert model.gaussians.schedule == model.schedule
    assert (model.gaussians.means[0] - model.gaussians.means[1]).abs().max() > 0.1


def test_the_control_variate_adds_the_gaussians_of_the_rest_of_alpha(
    small_run: Path,
) -> None:
    model = load(small_run)
    settings = {"steps": 1, "clip": False, "source": "prior", "policy": "balanced"}
    plain, trace = model.sample(4, trace=True, control_variate="none", **settings)
    controlled = model.sample(4, control_variate="gaussian", **settings)
    noise = normal(0, RngStream.START, torch.arange(4), 0, model.shape)
    x = noise * model.schedule(torch.ones(())).s
    left = trace.alpha[0] - trace.chosen[0].float()
    expected = plain + model.gaussians.mix(x, torch.ones(()), left)
    torch.testing.assert_close(controlled, expected, rtol=1e-4, atol=1e-5)
    assert (controlled - plain).abs().max() > 0.1


def test_the_control_variate_is_the_default_and_does_nothing_for_fixed_or_full(
    small_run: Path,
) -> None:
    model = load(small_run)

    def both(policy: str) -> tuple[Tensor, Tensor]:
        plain, controlled = (
            model.sample(4, steps=4, policy=policy, control_variate=c) for c in ("none", "gaussian")
        )
        assert torch.equal(controlled, model.sample(4, steps=4, policy=policy))
        return plain, controlled

    assert SampleConfig().control_variate == "gaussian"
    assert torch.equal(*both("fixed"))
    assert torch.allclose(*both("full"), atol=1e-5)
    for policy in ("balanced", "adaptive", "stochastic", "top_k"):
        plain, controlled = both(policy)
        assert (plain - controlled).abs().max() > 1e-2, policy


def test_a_clipped_image_differs_only_where_it_would_leave_the_range(small_run: Path) -> None:
    model = load(small_run)
    free = model.sample(4, steps=1, clip=False)
    assert torch.allclose(model.sample(4, steps=1, clip=True), free.clamp(-1, 1), atol=1e-6)


def test_the_representation_says_what_the_model_is(small_run: Path) -> None:
    model = load(small_run)
    said = repr(model)
    words = ("3 of 0.0", "float32", "posterior and derivative nets", "1 x 8 x 8", "VPLinear", "cpu")
    for part in (*model.names, *words):
        assert part in said
    assert model.version[:12] in said


def test_progress_counts_each_step_of_each_image_once(small_run: Path) -> None:
    for sampler in ("ddim", "heun"):
        seen: list[int] = []
        load(small_run).sample(5, steps=4, batch=3, sampler=sampler, progress=seen.append)
        assert seen == [3] * 4 + [2] * 4


def test_a_trajectory_ends_at_t_min(small_run: Path) -> None:
    model = load(small_run)
    settings = {
        "steps": 9,
        "policy": "top_k",
        "source": "prior",
        "control_variate": "none",
        "grid": "uniform_t",
        "clip": False,
    }
    images, trace = model.sample(3, t_min=0.1, trace=True, **settings)
    torch.testing.assert_close(trace.t, torch.linspace(1, 0.1, 10, dtype=torch.float64)[:-1])
    assert (images - model.sample(3, **settings)).abs().max() > 0.05


def test_no_images_are_refused(small_run: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sample.n must be a whole number in \[1, 2\^63\), got 0"
    ):
        load(small_run).sample(0)


def test_a_single_cluster_is_its_expert_alone(small_run: Path) -> None:
    model = load(small_run)
    for k, name in enumerate(model.names):
        for policy in ("full", "balanced", "top_k"):
            settings = {"steps": 4, "policy": policy, "control_variate": "none", "clip": False}
            images, trace = model.sample(2, trace=True, clusters={name: 2.0}, **settings)
            start = normal(0, RngStream.START, torch.arange(2), 0, model.shape)
            with torch.inference_mode():
                at_one = start * model.schedule(torch.ones(())).s
                plan = ("ipndm", 4, "cosine")
                alone = sample(model.experts[k], at_one, model.schedule, *plan)
            assert trace.chosen.equal(torch.eye(3, dtype=torch.bool)[k].expand(4, 2, 3))
            assert trace.calls == 4 * 2
            torch.testing.assert_close(images, alone.float(), rtol=1e-4, atol=1e-4)


def test_cluster_weights_multiply_alpha(small_run: Path) -> None:
    model = load(small_run)
    first, second, third = model.names
    settings = {"steps": 1, "policy": "full", "source": "posterior", "trace": True}
    plain, weighted = (
        model.sample(3, **settings, **more)[1].alpha[0]
        for more in ({}, {"clusters": {first: 3.0, third: 0.5}})
    )
    left = plain * torch.tensor([3.0, 0.0, 0.5])
    torch.testing.assert_close(weighted, left / left.sum(dim=1, keepdim=True))
    same = dict.fromkeys((first, second, third), 7.0)
    torch.testing.assert_close(
        model.sample(3, steps=4, clusters=same), model.sample(3, steps=4), rtol=0, atol=1e-5
    )


def test_temperature_raises_alpha_to_its_inverse(
    small_run: Path,
) -> None:
    model = load(small_run)
    settings = {"steps": 4, "source": "posterior", "policy": "stochastic", "trace": True}
    (images, plain), (same, _) = (
        model.sample(6, **settings, **more) for more in ({}, {"temperature": 1.0})
    )
    assert images.equal(same)
    for temperature in (0.25, 4.0):
        cooled, trace = model.sample(6, **settings, temperature=temperature)
        power = plain.alpha[0].double() ** (
            1 / temperature
        )  # at the first step all are at the same noise
        torch.testing.assert_close(
            trace.alpha[0].double(), power / power.sum(dim=1, keepdim=True), rtol=1e-4, atol=0
        )
        assert (cooled - images).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "euler_maruyama", "accelerated_sde"])
def test_a_plan_samples_as_the_samplers_do(small_run: Path, name: str) -> None:
    model = load(small_run)
    plan = model.plan(model.settings(sampler=name, steps=5, grid="quadratic", t_min=0.02))
    index = torch.tensor([4, 9])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * (1 - t.to(x).reshape(-1, *(1,) * (x.ndim - 1)))

    start = normal(3, RngStream.START, index, 0, model.shape) * model.schedule(torch.ones(())).s
    torch.testing.assert_close(plan.start(3, index), start)
    found, calls = drive(plan.trajectory(plan.start(3, index), 3, index), denoise)
    by_hand = trajectory_of(
        start, model.schedule, name, 5, "quadratic", seed=3, index=index, t_min=0.02
    )
    expected, _ = drive(by_hand, denoise)
    torch.testing.assert_close(found, expected)
    assert calls == (10 if name == "heun" else 5)


def test_a_plan_is_cached_by_its_settings_and_holds_no_state(
    small_run: Path,
) -> None:
    model = load(small_run)
    plan = model.plan(model.settings(steps=3))
    assert model.plan(model.settings(steps=3)) is plan
    other = model.plan(model.settings(steps=4, sampler="heun"))
    assert other is not plan and other.router is plan.router
    assert model.plan(model.settings(steps=3, relaxation_rate=1.0)).router is not plan.router
    for seed in range(5):
        model.sample(2, seed=seed, steps=3)
    assert plan.schedule.cache_info().currsize <= 4  # the times of its grid
    for top_k in range(1, 200):
        model.plan(model.settings(policy="top_k", top_k=top_k))
    assert model._cached_plan.cache_info().currsize == 64
    assert model._cached_router.cache_info().currsize == 64
