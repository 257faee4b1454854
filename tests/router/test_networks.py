"""The router's networks: what holds by construction, and which band answers at which time."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.errors import ConfigError
from ddm.gaussian import Gaussians
from ddm.schedules import schedule
from router.networks import Blend, DerivativeNet, PosteriorNet, RouterConfig, RouterNetConfig

PI = torch.tensor([0.5, 0.3, 0.2])
NET = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [2]}


def gaussians(name: str = "vp_linear") -> Gaussians:
    means = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return Gaussians(means, torch.full_like(means, 0.3), schedule(name))


def built(
    name: str = "vp_linear", blended: bool = False, **config: Any
) -> tuple[PosteriorNet, DerivativeNet]:
    torch.manual_seed(0)
    cfg = RouterConfig(net=RouterNetConfig(**NET), gaussians=blended, **config)  # type: ignore[arg-type]
    return cfg.build([1, 4, 4], PI, schedule(name), gaussians(name))


def perturb(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def band_marked(edges: list[float]) -> DerivativeNet:
    """Three bands that say their number whatever they see: band b answers (b + 1, 0, -b - 1)."""
    derivative = built()[1]
    derivative = DerivativeNet(list(derivative.scorers), edges, PI)  # type: ignore[arg-type]
    with torch.no_grad():
        for b, scorer in enumerate(derivative.scorers):
            scorer.head.bias.copy_(torch.tensor([b + 1.0, 0.0, -b - 1.0]))  # type: ignore[union-attr, operator]
    return derivative


def test_a_fresh_router_returns_pi_and_no_change() -> None:
    posterior, derivative = built()
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([1e-3, 0.3, 0.6, 1.0])
    torch.testing.assert_close(posterior(x, t), PI.expand(4, -1))
    torch.testing.assert_close(derivative(x, t), torch.zeros(4, 3), rtol=0, atol=0)


def test_a_fresh_router_with_gaussians_returns_their_posterior_and_its_rate() -> None:
    posterior, derivative = built(blended=True)
    of = gaussians()
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([1e-3, 0.3, 0.6, 1.0])
    for time in (t, t[1]):
        torch.testing.assert_close(posterior(x, time), of.posterior(x, time, PI))
        torch.testing.assert_close(derivative(x, time), of.posterior_rate(x, time, PI))
    blended, alone = posterior.logits(x, t)
    torch.testing.assert_close(alone, PI.log().expand(4, -1))
    assert (blended - alone).abs().max() > 1


def test_the_blend_is_linear_between_its_times() -> None:
    blend = Blend(knots=3)
    with torch.no_grad():
        blend.knots.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]) / 25)
    network, odds = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    for t, w, g in (
        (0.0, 2.0, 1.0),
        (0.25, 1.5, 1.5),
        (0.5, 1.0, 2.0),
        (0.75, 2.0, 2.5),
        (1.0, 3.0, 3.0),
    ):
        for time in (torch.tensor(t), torch.tensor([t])):
            found = blend(network, odds, time)
            torch.testing.assert_close(found, w * network + g * odds)


def test_alpha_sums_to_1_and_its_derivative_to_0() -> None:
    posterior, derivative = built()
    perturb(posterior)
    perturb(derivative)
    x, t = 3 * torch.randn(6, 1, 4, 4), torch.tensor([1e-3, 0.1, 0.3, 0.6, 0.7, 1.0])
    with torch.no_grad():
        alpha, rate = posterior(x, t), derivative(x, t)
        torch.testing.assert_close(alpha.sum(dim=1), torch.ones(6))
        torch.testing.assert_close(rate.sum(dim=1), torch.zeros(6), rtol=0, atol=1e-5)
        assert (alpha > 0).all() and (alpha - PI).abs().max() > 0.1 and rate.abs().max() > 0.1
        # the softmax of what the scorer adds to log pi
        by_hand = PI.log() + posterior.scorer(x, t)
        torch.testing.assert_close(alpha, by_hand.exp() / by_hand.exp().sum(dim=1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_time_uses_its_band(
    dtype: torch.dtype,
) -> None:
    derivative = band_marked([0.25, 0.75])
    below = float(torch.nextafter(torch.tensor(0.75, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    t = torch.tensor([0.0, 1e-3, 0.2499, 0.25, 0.5, below, 0.75, 0.76, 1.0], dtype=dtype)
    bands = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    x = torch.randn(len(t), 1, 4, 4)
    with torch.no_grad():
        together = derivative(x, t)
        alone = torch.cat([derivative(x[i : i + 1], t[i]) for i in range(len(t))])
    expected = (bands + 1.0)[:, None] * torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(alone, expected)


def test_a_batch_of_all_bands_equals_each_alone() -> None:
    derivative = built()[1]
    perturb(derivative)
    x, t = torch.randn(6, 1, 4, 4), torch.tensor([0.9, 0.1, 0.5, 0.05, 0.75, 0.35])
    with torch.no_grad():
        together = derivative(x, t)
        alone = torch.cat([derivative(x[i : i + 1], t[i]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together - together.roll(1, 0)).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_equals_a_time_per_image_at_the_edges(
    dtype: torch.dtype,
) -> None:
    derivative, x = band_marked(RouterConfig().bands), torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        for edge in RouterConfig().bands:
            t = torch.tensor(edge, dtype=dtype)
            torch.testing.assert_close(
                derivative(x, t),
                derivative(x, torch.full((2,), edge, dtype=dtype)),
                msg=f"at {edge}, {dtype}",
            )


@pytest.mark.parametrize("which", [0, 1])
def test_one_time_for_all_gives_what_the_same_time_for_each_gives(which: int) -> None:
    net, x = built()[which], torch.randn(3, 1, 4, 4)
    perturb(net)
    with torch.no_grad():
        each = net(x, torch.full((3,), 0.4))
        torch.testing.assert_close(net(x, torch.tensor(0.4)), each)
        torch.testing.assert_close(
            net(x, torch.tensor(0.4, dtype=torch.float64)), each
        )  # a sampler's time
        torch.testing.assert_close(net(x[1:2], torch.tensor(0.4)), each[1:2], rtol=1e-4, atol=1e-5)
        assert (net(x, torch.full((3,), 0.5)) - each).abs().max() > 1e-3


def test_bands_start_alike_and_share_no_weights() -> None:
    posterior, derivative = built()
    scorers = [posterior.scorer, *derivative.scorers]
    start = [
        torch.cat([p.detach().flatten().clone() for p in scorer.parameters()]) for scorer in scorers
    ]
    for copied in start[1:]:
        torch.testing.assert_close(copied, start[0], rtol=0, atol=0)
    optimizer = torch.optim.SGD(derivative.parameters(), lr=0.1)
    x, t = torch.randn(5, 1, 4, 4), torch.linspace(0.35, 0.65, 5)  # the middle band
    for _ in range(2):  # the second reaches past the head, which starts at zero
        optimizer.zero_grad()
        (derivative(x, t) - torch.tensor([1.0, 0.0, -1.0])).square().mean().backward()
        optimizer.step()
    moved = [
        float((torch.cat([p.detach().flatten() for p in scorer.parameters()]) - before).abs().max())
        for scorer, before in zip(scorers, start, strict=True)
    ]
    assert moved[2] > 1e-3 and moved[0] == moved[1] == moved[3] == 0


@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow"])
def test_the_network_sees_x_over_the_root_of_a2_plus_s2(name: str) -> None:
    posterior = built(name)[0]
    seen: list[Tensor] = []
    posterior.scorer.trunk.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.8])
    posterior(x, t)
    a2_plus_s2 = (1 - t) ** 2 + t**2 if name == "rectified_flow" else torch.ones(3)
    torch.testing.assert_close(seen[0], x / a2_plus_s2.sqrt()[:, None, None, None])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"switch_step": 1000}, "switch_step must be in [1, steps = 1000), got 1000"),
        ({"switch_step": 0}, "switch_step must be in [1, steps = 1000), got 0"),
        ({"rate_weight": -1.0}, "rate_weight must be at least 0, got -1.0"),
        (
            {"label_weight": 0, "posterior_weight": 0},
            "label_weight must be above 0 where posterior_weight is 0, got 0",
        ),
        (
            {"bands": [0.7, 0.3]},
            "bands must be two rising times in (t_min, 1), got [0.7, 0.3]",
        ),
        ({"bands": [0.5]}, "bands must be two rising times in (t_min, 1), got [0.5]"),
        (
            {"bands": [1e-3, 0.5]},
            "bands must be two rising times in (t_min, 1), got [0.001, 0.5]",
        ),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_key_rule_and_value(
    config: dict[str, Any], message: str
) -> None:
    RouterConfig(batch=96).check()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        RouterConfig(**{"batch": 96, **config}).check()


@pytest.mark.parametrize(("batch", "images"), [(1, 3), (3, 3), (10, 12), (128, 129), (129, 129)])
def test_a_batch_is_rounded_up_to_a_third_per_band(batch: int, images: int) -> None:
    cfg = RouterConfig(batch=batch)
    cfg.check()
    assert cfg.images_per_step == images


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"channels": 6}, "net.channels must be a multiple of 4 in [4, 8192], got 6"),
        (
            {"multipliers": [1, 1, 1, 1]},
            "net.multipliers must halve a square image of 4 x 4 evenly, got [1, 1, 1, 1]",
        ),
        ({"blocks": 0}, "net.blocks must be in [1, 32], got 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused_by_key_rule_and_value(
    sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        RouterConfig(net=RouterNetConfig(**{**NET, **sizes})).build(
            [1, 4, 4], PI, schedule("vp_linear"), gaussians()
        )
