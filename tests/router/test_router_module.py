"""Training the router: losses by hand, bands, and a short training that beats the prior."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import router.router_module
from ddm.gaussian import Gaussians
from ddm.schedules import VPLinear, schedule
from ddm.training import Batches
from router.networks import RouterConfig, RouterNetConfig
from router.router_module import PosteriorLearning, RouterLearning, posterior_loss, rate_loss

T_MIN, BANDS = 0.01, [0.2, 0.6]


class FirstStage(PosteriorLearning):
    """Without Lightning's trainer: the step is set by hand."""

    global_step = 0


class SecondStage(RouterLearning):
    """Without Lightning's trainer: the step is set by hand."""

    global_step = 0


def toy() -> tuple[Tensor, Tensor]:
    """Images of 4 x 4: 30 dark ones and 10 bright ones, a little apart from their neighbours."""
    generator = torch.Generator().manual_seed(0)
    cluster = (torch.arange(40) >= 30).long()
    wobble = torch.randint(-30, 31, (40, 1, 4, 4), generator=generator)
    return (90 + 80 * cluster[:, None, None, None] + wobble).to(torch.uint8), cluster


def stages(**settings: Any) -> tuple[FirstStage, SecondStage]:
    """Both stages of one fresh router, over the toy."""
    torch.manual_seed(0)
    images, cluster = toy()
    net = RouterNetConfig(channels=8, multipliers=[1], blocks=1, attention=[])
    config = RouterConfig(
        net=net,
        **{
            "gaussians": False,
            "batch": 12,
            "bands": BANDS,
            "t_min": T_MIN,
            "switch_step": 100,
            **settings,
        },
    )
    process = schedule("vp_linear")
    gaussians = Gaussians.of_clusters([images[cluster == k] for k in (0, 1)], process)
    posterior, derivative = config.build([1, 4, 4], torch.tensor([0.75, 0.25]), process, gaussians)
    batches = Batches(images, config.batch, seed=7)
    return FirstStage(posterior, batches, cluster, config), SecondStage(
        posterior, derivative, batches, cluster, config
    )


def train(learning: Any, steps: int) -> None:
    optimizer = learning.configure_optimizers()["optimizer"]
    for step in range(steps):
        learning.global_step = step
        loss = learning.training_step(None, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def by_autograd(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and d alpha/dt over the toy's images with x0 and eps held: a softmax in float64,
    differentiated by torch.
    """
    images, cluster = toy()
    points = images.double().flatten(1) / 127.5 - 1

    def alpha(t: Tensor) -> Tensor:
        integral = (0.1 * t + 19.9 * t**2 / 2)[:, None]
        a, s = torch.exp(-integral / 2), torch.sqrt(1 - torch.exp(-integral))
        x = a * x0.double().flatten(1) + s * eps.double().flatten(1)
        square = (x[:, None] - a[:, :, None] * points).square().sum(dim=2)
        return (
            torch.softmax(-square / (2 * s**2), dim=1)
            @ torch.nn.functional.one_hot(cluster).double()
        )

    time = t.double().requires_grad_()
    value = alpha(time)
    rate = [torch.autograd.grad(column.sum(), time, retain_graph=True)[0] for column in value.T]
    return value.detach(), torch.stack(rate, dim=1)


def test_posterior_loss_by_hand() -> None:
    logits = (
        torch.tensor([[0.0, 0.0], [0.0, 0.0]]) + torch.tensor([3.0, 1.0]).log()
    )  # softmax (3/4, 1/4)
    alpha, label = torch.tensor([[1.0, 0.0], [0.25, 0.75]]), torch.tensor([0, 1])
    entropy = -(torch.tensor(0.75).log() + torch.tensor(0.25).log()) / 2
    square = (2 * 0.25**2 + 2 * 0.5**2) / 2
    for label_weight, posterior_weight in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        loss = posterior_loss(logits, alpha, label, label_weight, posterior_weight)
        assert float(loss) == pytest.approx(
            float(label_weight * entropy + posterior_weight * square)
        )


def test_rate_loss_by_hand() -> None:
    rate, target = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.5, -0.5], [3.0, -3.0]])
    assert float(rate_loss(rate, target)) == pytest.approx((0.5 + 18.0) / 2)


def test_loss_of_stage_1_is_by_hand() -> None:
    first, _ = stages(label_weight=0.5, posterior_weight=3.0)
    first.global_step = 5
    loss = first.training_step(None, 0).detach()
    x0, place = first.batches.x0(5)
    t = T_MIN + (1 - T_MIN) * first.batches.times(5)
    alpha, _ = by_autograd(x0, first.batches.noise(5), t)
    prior = torch.tensor([0.75, 0.25], dtype=torch.float64)  # what a fresh net answers
    entropy = -prior.log()[toy()[1][place]].mean()
    square = (prior - alpha).square().sum(dim=1).mean()
    assert float(loss) == pytest.approx(float(0.5 * entropy + 3 * square), rel=1e-4)
    assert square > 0.01


def test_loss_of_stage_2_is_by_hand() -> None:
    _, second = stages(rate_weight=0.25)
    second.global_step = 5
    loss = second.training_step(None, 0).detach()
    step = 105  # counted on from stage 1
    x0, _ = second.batches.x0(step)
    u = second.batches.times(step).double()
    edges = [T_MIN, *BANDS, 1.0]
    t = torch.stack(
        [edges[int(3 * v)] + (edges[int(3 * v) + 1] - edges[int(3 * v)]) * (3 * v % 1) for v in u]
    )
    alpha, rate = by_autograd(x0, second.batches.noise(step), t)
    square = (torch.tensor([0.75, 0.25]) - alpha).square().sum(dim=1).mean()
    assert float(loss) == pytest.approx(
        float(square + 0.25 * rate.square().sum(dim=1).mean()), rel=1e-3
    )
    assert rate.square().sum(dim=1).mean() > 0.1


def test_each_band_gets_a_third_of_the_times() -> None:
    _, second = stages(batch=30)
    asked: list[tuple[int, Tensor, Tensor]] = []
    answer = second.derivative.band

    def spy(b: int, x: Tensor, t: Tensor) -> Tensor:
        asked.append((b, x, t))
        return answer(b, x, t)

    second.derivative.band = spy  # type: ignore[method-assign]
    edges = [T_MIN, *BANDS, 1.0]
    for step in range(20):
        second.global_step = step
        second.training_step(None, 0)
    for b in range(3):
        times = torch.cat([t for band, _, t in asked if band == b])
        assert len(times) == 20 * 10
        assert edges[b] <= times.min() and times.max() <= edges[b + 1] + 1e-6
        even = torch.linspace(edges[b], edges[b + 1], len(times))
        assert (times.sort().values - even).abs().max() < 0.1 * (edges[b + 1] - edges[b])
    step, (b, x, t) = 100 + 19, asked[-2]
    a, s, _, _ = VPLinear()(t).broadcast_to(x)
    mine = slice(10, 20)
    expected = a * second.batches.x0(step)[0][mine] + s * second.batches.noise(step)[mine]
    assert b == 1
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_a_band_s_times_teach_its_own_network_and_no_other(
    band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = stages()

    calls = itertools.count()  # one for each third

    def loss_of_one_third(rate: Tensor, target: Tensor) -> Tensor:
        return (rate - target).square().sum() * (next(calls) == band)

    monkeypatch.setattr(router.router_module, "rate_loss", loss_of_one_third)
    # a few steps first: behind a head of zeros no gradient passes
    with torch.no_grad():
        for scorer in second.derivative.scorers:
            scorer.head.weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, operator]
    second.training_step(None, 0).backward()
    for b, scorer in enumerate(second.derivative.scorers):
        size = sum(
            0.0 if p.grad is None else float(p.grad.abs().max()) for p in scorer.parameters()
        )
        assert size > 1e-2 if b == band else size == 0


def test_the_second_stage_does_not_learn_from_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The squared error alone: the loss's gradient is that of `mean |softmax - alpha|^2` in the
    logits.
    """
    _, second = stages(rate_weight=0.0)
    bias = second.posterior.scorer.head.bias
    second.training_step(None, 0).backward()
    x0, _ = second.batches.x0(100)
    t = torch.tensor([T_MIN, *BANDS, 1.0], dtype=torch.float64)
    u = second.batches.times(100).double() * 3
    time = t[u.long()] + (t[u.long() + 1] - t[u.long()]) * u.frac()
    alpha, _ = by_autograd(x0, second.batches.noise(100), time)
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    error = 2 * (p - alpha).mean(dim=0)
    gradient = p * (error - (p * error).sum())  # through the softmax
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), gradient, rtol=1e-3, atol=1e-5)


def test_a_step_is_a_function_of_seed_and_step_and_not_of_history() -> None:
    for stage in (0, 1):
        veteran, novice = stages()[stage], stages()[stage]
        losses = []
        for learning, history in ((veteran, [0, 1, 9, 5]), (novice, [5])):
            for step in history:
                torch.rand(7)
                learning.global_step = step
                loss = learning.training_step(None, 0).detach()
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
        novice.global_step = 6
        assert float(novice.training_step(None, 0).detach() - losses[0]) != 0


def test_short_trainings_beat_the_prior_and_the_standstill() -> None:
    """On fresh noise: the posterior net against pi after stage 1, and the derivative nets against
    zero after stage 2.
    """
    first, second = stages(batch=48, learning_rate=1e-2)
    train(first, 40)
    images, cluster = toy()
    generator = torch.Generator().manual_seed(3)
    t = torch.linspace(0.02, 0.9, 200)
    place = torch.randint(40, (200,), generator=generator)
    x0, eps = images[place].float() / 127.5 - 1, torch.randn(200, 1, 4, 4, generator=generator)
    a, s, _, _ = VPLinear()(t).broadcast_to(x0)
    x = a * x0 + s * eps
    alpha, rate = by_autograd(x0, eps, t)
    prior = torch.tensor([0.75, 0.25])
    with torch.no_grad():
        net = first.posterior.eval()(x, t)
        of_prior = (prior - alpha).square().sum(dim=1).mean()
        assert (net - alpha).square().sum(dim=1).mean() < of_prior / 2
        surprise = -net[torch.arange(200), cluster[place]].log().mean()
        assert surprise < 0.8 * -prior[cluster[place]].log().mean()
    train(second, 80)
    with torch.no_grad():
        learned = second.derivative.eval()(x, t)
        assert (learned - rate).square().sum(dim=1).mean() < 0.9 * rate.square().sum(dim=1).mean()
        agreement = (learned.double() * rate).sum() / (learned.double().norm() * rate.norm())
        assert agreement > 0.3
