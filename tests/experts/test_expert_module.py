"""Training an expert: weights and loss by hand, steps as functions of (seed, n)."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import kstest, norm, truncnorm
from torch import Tensor, nn

from ddm.rng import RngStream, normal
from ddm.schedules import Coeffs, VPLinear, schedule
from ddm.training import Batches
from experts.denoiser import Denoiser, ExpertConfig, LossWeight, Times
from experts.expert_module import ExpertLearning, denoising_loss, loss_weight, training_times
from experts.unet import UNetConfig

T_MIN = 0.02


class Learning(ExpertLearning):
    """Without Lightning's trainer: the step is set by hand."""

    global_step = 0


class Spy(nn.Module):
    """A denoiser that keeps what it is asked and answers with a constant image."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.schedule, self.answer = schedule("vp_linear"), answer
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return torch.full_like(x, self.answer)


def spied(answer: float = 0.0, seed: int = 3, value: int | None = None, **config: Any) -> Learning:
    """A learning step to spy on, over random images, or images of one value."""
    images = torch.randint(256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    if value is not None:
        images = torch.full_like(images, value)
    batches = Batches(images, batch=8, seed=seed, flip=True)
    return Learning(Spy(answer), batches, ExpertConfig(t_min=T_MIN, **config))  # type: ignore[arg-type]


def asked(learning: Learning, step: int) -> tuple[Tensor, Tensor, float]:
    """The noisy images and the times of a step, and its loss."""
    learning.global_step = step
    loss = float(learning.training_step(None, 0))
    x, t = learning.denoiser.asked[-1]  # type: ignore[index]
    return x, t, loss


def run(learning: Learning, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Train by hand; the losses of the steps."""
    losses = []
    for step in steps:
        learning.global_step = step
        loss = learning.training_step(None, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def small(
    images: Tensor, config: ExpertConfig, seed: int = 1
) -> tuple[Learning, torch.optim.Optimizer]:
    torch.manual_seed(0)
    learning = Learning(
        config.build(images.shape[1:], schedule("vp_linear")), Batches(images, 8, seed), config
    )
    return learning.train(), learning.configure_optimizers()["optimizer"]


def test_loss_weights_are_1_snr_snr_bounded_by_gamma_and_edm_s() -> None:
    a, s = torch.tensor([0.8, 0.6, 1.0, 0.0]), torch.tensor([0.6, 0.8, 0.1, 1.0])
    c = Coeffs(a, s, a, s)
    snr = [16 / 9, 9 / 16, 100.0, 0.0]
    expected: dict[LossWeight, list[float]] = {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "snr": snr,
        "min_snr": [16 / 9, 9 / 16, 5.0, 0.0],
        "edm": [x + 4 for x in snr],
    }
    for kind, by_hand in expected.items():
        torch.testing.assert_close(
            loss_weight(kind, c, gamma=5.0, sigma_data=0.5), torch.tensor(by_hand)
        )


def test_denoising_loss_is_the_weighted_mean_square() -> None:
    x0 = torch.tensor([[[[1.0, 2.0]]], [[[0.0, -1.0]]]])
    denoised = torch.tensor([[[[1.5, 1.0]]], [[[3.0, -1.0]]]])
    # mean squares (0.25 + 1) / 2 and (9 + 0) / 2, times 2 and 0.5, halved
    loss = denoising_loss(denoised, x0, torch.tensor([2.0, 0.5]))
    assert float(loss) == pytest.approx((2 * 0.625 + 0.5 * 4.5) / 2)


def test_a_training_step_is_a_function_of_seed_and_step() -> None:
    veteran, novice = spied(), spied()
    for step in (0, 1, 2, 9):
        asked(veteran, step)
        torch.rand(7)  # somebody else draws from torch's own generator
    for found, expected in zip(asked(veteran, 5), asked(novice, 5), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    x, t, _ = asked(novice, 5)
    for other in (asked(novice, 6), asked(spied(seed=4), 5)):
        assert (other[0] - x).abs().mean() > 0.1 and (other[1] - t).abs().mean() > 1e-3


def test_the_noisy_image_is_a_x0_plus_s_eps() -> None:
    learning, eps, times = spied(value=255), [], []
    for step in range(40):
        x, t, _ = asked(learning, step)
        beta = 0.1 * t.double() + 19.9 * t.double() ** 2 / 2  # the integral of beta, vp_linear
        a = torch.exp(-beta / 2)[:, None, None, None]
        eps.append((x - a * 1.0) / (1 - a**2).sqrt())
        # counted like all randomness, hence the same on every device: no generator of torch's has a
        # part in it
        counted = normal(3, RngStream.NOISE, torch.arange(8), step, (1, 4, 4)).double()
        torch.testing.assert_close(eps[-1], counted, rtol=0, atol=1e-4)
        times.append(t.double())
    noise, time = torch.cat(eps).flatten(), torch.cat(times)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05  # 5120 numbers
    assert abs((noise**4).mean() - 3) < 0.4
    assert time.min() >= T_MIN and time.max() <= 1
    even = torch.linspace(T_MIN, 1, len(time), dtype=torch.float64)
    assert (time.sort().values - even).abs().max() < 0.06  # even over [t_min, 1]


@pytest.mark.parametrize("kind", ["constant", "snr", "min_snr", "edm"])
def test_a_step_s_loss_weights_each_image_by_its_own_time(kind: LossWeight) -> None:
    learning = spied(
        answer=0.75, value=255, loss_weight=kind, min_snr_gamma=2.0
    )  # 0.25 below the image everywhere
    _, t, loss = asked(learning, 4)
    beta = 0.1 * t.double() + 19.9 * t.double() ** 2 / 2
    snr = 1 / torch.expm1(beta)  # e^-B / (1 - e^-B)
    weights: dict[LossWeight, Tensor] = {
        "constant": torch.ones_like(snr),
        "snr": snr,
        "min_snr": snr.clamp(max=2.0),
        "edm": snr + 4,
    }
    weight = weights[kind]
    assert loss == pytest.approx(float((weight * 0.25**2).mean()), rel=1e-4)
    assert (
        asked(spied(answer=1.0, value=255, loss_weight=kind), 4)[2] == 0
    )  # the right image costs nothing


def quantile(kind: Times, level: np.ndarray, t_min: float) -> np.ndarray:
    """The times below which these shares of all training times lie, for vp_linear with beta from
    0.1 to 20.
    """
    match kind:
        case "uniform":
            return t_min + (1 - t_min) * level
        case "logit_normal":
            return expit(norm.ppf(level)).clip(t_min)
        case (
            "uniform_log_snr"
        ):  # log snr = -log(e^B - 1) with B = 0.1 t + 19.9 t^2 / 2, solved for t
            high, low = (-np.log(np.expm1(0.1 * t + 19.9 * t**2 / 2)) for t in (t_min, 1.0))
            b = np.log1p(np.exp(-(high + (low - high) * level)))
            return (-0.1 + np.sqrt(0.01 + 2 * 19.9 * b)) / 19.9
        case "log_normal":  # s/a = sqrt(e^B - 1)
            ends = (np.log(np.expm1(0.1 * t + 19.9 * t**2 / 2)) / 2 for t in (t_min, 1.0))
            law = truncnorm(*((end + 1.2) / 1.2 for end in ends), loc=-1.2, scale=1.2)
            b = np.log1p(np.exp(2 * law.ppf(level)))
            return (-0.1 + np.sqrt(0.01 + 2 * 19.9 * b)) / 19.9


KINDS: list[Times] = ["uniform", "uniform_log_snr", "logit_normal", "log_normal"]


@pytest.mark.parametrize("t_min", [1e-3, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_training_times_lie_at_the_even_levels_of_their_distribution(
    kind: Times, t_min: float
) -> None:
    times = training_times(kind, t_min, schedule("vp_linear"), points=200)
    assert times.shape == (201,) and times.dtype == torch.float32
    expected = torch.from_numpy(quantile(kind, np.linspace(0, 1, 201), t_min)).float()
    torch.testing.assert_close(times, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_times_up_to_a_last_one_are_those_of_the_distribution_below_it(kind: Times) -> None:
    times = training_times(kind, T_MIN, schedule("vp_linear"), points=2000).double()
    below = times[times <= 0.4]
    found = training_times(kind, T_MIN, schedule("vp_linear"), 2000, t_max=0.4).double()
    assert len(found) == 2001 and float(found[-1]) == pytest.approx(0.4)
    level = np.linspace(0, 1, 41)
    torch.testing.assert_close(
        found.quantile(torch.from_numpy(level)),
        below.quantile(torch.from_numpy(level)),
        rtol=5e-3,
        atol=2e-4,
    )
    learning = spied(times=kind, t_max=0.4)
    assert learning.at(torch.tensor([0.0, 1.0])).max() <= 0.4 + 1e-6


@pytest.mark.parametrize(
    "name", ["vp_linear", "vp_cosine", "rectified_flow", "edm", "ve_exponential"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_levels_in_0_to_1_become_times_in_t_min_to_1_that_rise_with_them(
    kind: Times, name: str
) -> None:
    learning = spied(times=kind)
    learning.levels = training_times(kind, T_MIN, schedule(name))
    level = torch.cat([torch.tensor([1e-12, 1e-7, 1 - 1e-9]), torch.rand(5000)]).sort().values
    assert level[-1] == 1  # in float32, as one of Batches.times may be
    times = learning.at(level)
    assert times.min() >= T_MIN and times.max() <= 1
    assert (times.diff() >= 0).all() and (times.diff() > 0).float().mean() > 0.95
    assert times[0] < T_MIN + 1e-3 and times[-1] > 0.999
    between = np.interp(
        level.double().numpy(), np.linspace(0, 1, 1001), learning.levels.double().numpy()
    )
    torch.testing.assert_close(times.double(), torch.from_numpy(between), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_learns_at_the_times_of_its_config(kind: Times) -> None:
    learning = spied(times=kind)
    times = (
        torch.cat([asked(learning, step)[1] for step in range(50)]).double().numpy()
    )  # 400, stratified
    level = np.linspace(0, 1, 4001)
    assert (
        kstest(times, lambda t: np.interp(t, quantile(kind, level, T_MIN), level)).statistic < 0.04
    )
    for other in KINDS:
        if other != kind:
            steps = quantile(other, level, T_MIN)
            assert (
                kstest(times, lambda t, steps=steps: np.interp(t, steps, level)).statistic > 0.1
            ), other


@pytest.mark.parametrize("parameterization", ["raw", "preconditioned"])
def test_training_on_one_constant_image_finds_it(parameterization: Any) -> None:
    unet = UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.0)
    config = ExpertConfig(
        unet=unet,
        parameterization=parameterization,
        loss_weight="min_snr",
        learning_rate=1e-2,
        t_min=T_MIN,
    )
    learning, optimizer = small(torch.full((5, 1, 4, 4), 204, dtype=torch.uint8), config)
    losses = run(learning, optimizer, range(40))
    assert sum(losses[-5:]) < 0.35 * sum(losses[:5])
    with torch.no_grad():  # from pure noise the mean is all there is to know
        guess = learning.denoiser(torch.randn(64, 1, 4, 4), torch.tensor(1.0)).mean()
    assert float(guess) == pytest.approx(204 / 127.5 - 1, abs=0.15)


def test_a_run_that_was_killed_resumes_to_the_same_weights() -> None:
    images = torch.randint(256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    unet = UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.5)
    config = ExpertConfig(unet=unet, learning_rate=1e-2)
    through, optimizer = small(images, config)
    run(through, optimizer, range(6))

    first, optimizer = small(images, config)
    run(first, optimizer, range(3))
    weights, moments = first.state_dict(), optimizer.state_dict()
    torch.rand(
        1000
    )  # another process, another state of torch's own generator, from which dropout draws
    resumed, optimizer = small(images, config)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    run(resumed, optimizer, range(3, 6))
    for name, value in through.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    fresh = small(images, config)[0].state_dict()
    assert any(
        (fresh[name] - value).abs().max() > 1e-3 for name, value in through.state_dict().items()
    )


def test_dropout_draws_differ_from_step_to_step_and_not_from_run_to_run() -> None:
    config = ExpertConfig(
        unet=UNetConfig(channels=8, multipliers=[1], blocks=1, attention=[], dropout=0.5)
    )
    learning, _ = small(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), config)
    masks = {}
    for name, step in (("once", 3), ("later", 4), ("again", 3)):
        learning.global_step = step
        learning.training_step(None, 0)
        masks[name] = torch.rand(4)  # what torch's own generator gives next
    torch.testing.assert_close(masks["again"], masks["once"], rtol=0, atol=0)
    assert (masks["later"] - masks["once"]).abs().max() > 1e-3


def test_an_expert_is_of_its_config_and_schedule() -> None:
    cfg = schedule("vp_linear", beta_max=8.0)
    expert = ExpertConfig(
        unet=UNetConfig(channels=8, multipliers=[1], blocks=1),
        parameterization="preconditioned",
        sigma_data=0.3,
    ).build([1, 4, 4], cfg)
    assert isinstance(expert, Denoiser) and expert.schedule == VPLinear(0.1, 8.0)
    x, t = torch.ones(1, 1, 4, 4), torch.tensor(0.5)
    a = torch.exp(-torch.tensor(0.1 * 0.5 + 7.9 * 0.125) / 2)
    fresh = a * 0.09 / (a**2 * 0.09 + 1 - a**2)  # a fresh network is silent: c_skip alone
    torch.testing.assert_close(expert(x, t), fresh.expand_as(x))
