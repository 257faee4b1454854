from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.errors import ConfigError
from ddm.rng import RngStream, normal
from ddm.samplers import SAMPLERS
from ddm.schedules import schedule
from router.policies import POLICIES
from serve import load
from serve.model.model import Model

LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1  # to be sampled


@pytest.fixture(scope="module")
def model(small_run: Path) -> Model:
    return load(small_run)


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


@pytest.fixture(scope="module")
def digits(demo: Model) -> torch.Tensor:
    """Images that the demo knows, one of each cluster."""
    settings: dict[str, Any] = {"steps": 10, "policy": "fixed"}
    return torch.cat([demo.sample(1, clusters=[name], **settings) for name in demo.names])


def test_noise_of_ones_own_is_used_in_place_of_the_seeds(model: Model) -> None:
    x = normal(3, RngStream.START, torch.arange(5), 0, model.shape)
    images = model.sample(5, seed=3, steps=4)
    assert torch.equal(model.sample(x=x, seed=3, steps=4), images)
    assert torch.allclose(model.sample(x=x, seed=3, steps=4, batch=2), images, atol=1e-4)
    assert (model.sample(x=-x, seed=3, steps=4) - images).abs().max() > 0.05


def test_a_weak_edit_leaves_the_image_and_a_strong_one_does_not(
    demo: Model, digits: torch.Tensor
) -> None:
    changes = [
        float((demo.sample(image=digits, strength=s, steps=10) - digits).square().mean())
        for s in (0.02, 0.2, 0.9)
    ]
    assert changes[0] < 0.005 < changes[1] < changes[2] and changes[2] > 0.2


def test_an_edit_begins_with_the_expert_of_the_image(demo: Model, digits: torch.Tensor) -> None:
    for policy in ("switching", "fixed", "stochastic", "balanced", "adaptive"):
        _, trace = demo.sample(image=digits, strength=0.15, steps=4, policy=policy, trace=True)
        assert trace.chosen[0].float().argmax(dim=1).tolist() == list(range(5))


def test_kept_pixels_stay_and_the_others_do_not_know_what_was_hidden(model: Model) -> None:
    image = torch.rand(3, *model.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hidden = torch.where(LEFT > 0, -image, image)
    for sampler in SAMPLERS:
        settings: dict[str, Any] = {"sampler": sampler, "steps": 4, "resamplings": 2}
        found = model.sample(image=image, mask=LEFT, **settings)
        assert torch.equal(found[..., 4:], image[..., 4:]), sampler
        assert (found[..., :4] - image[..., :4]).abs().max() > 0.1
        assert torch.equal(found, model.sample(image=hidden, mask=LEFT > 0, **settings))
    weak = model.sample(image=image, mask=LEFT, strength=0.01, steps=4)
    apart = [(images - image).square().mean() for images in (weak, found)]
    assert apart[0] < apart[1] / 4  # below 1, what a mask covers counts


@pytest.mark.parametrize("policy", POLICIES)
def test_an_edit_is_the_same_alone_and_among_others(model: Model, policy: str) -> None:
    image = torch.linspace(-1, 1, 64).reshape(model.shape)
    mask = torch.stack([LEFT, 1 - LEFT, LEFT.T, torch.ones(8, 8)])[:, None]
    settings: dict[str, Any] = {"policy": policy, "steps": 3, "resamplings": 3, "seed": 2}
    many = model.sample(4, image=image, mask=mask, **settings)
    one = model.sample(1, first_index=2, image=image, mask=mask[2:3], **settings)
    assert torch.allclose(many[2], one[0], atol=1e-4)
    batched = model.sample(4, image=image, mask=mask, batch=3, **settings)
    assert torch.allclose(batched, many, atol=1e-4)


def test_a_repeated_step_draws_its_expert_again(model: Model) -> None:
    image = torch.zeros(model.shape)
    settings: dict[str, Any] = {"steps": 2, "source": "prior", "policy": "fixed", "trace": True}
    _, trace = model.sample(32, image=image, mask=LEFT, resamplings=4, **settings)
    assert len(trace.t) == 8 and trace.calls == 8 * 32
    chosen = trace.chosen.float().argmax(dim=2)
    assert all(torch.equal(chosen[0], row) for row in chosen[:5])  # at t = 1 it is drawn from pi
    assert all(not torch.equal(chosen[n], chosen[n + 1]) for n in (4, 5, 6))


def test_each_repetition_is_a_step_also_of_two_calls(model: Model) -> None:
    told: list[int] = []
    given: dict[str, Any] = {"image": torch.zeros(model.shape), "mask": LEFT, "resamplings": 3}
    model.sample(2, steps=2, sampler="heun", progress=told.append, **given)
    assert told == [2] * 6


def test_a_strength_between_two_steps_of_the_process_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "schedule", schedule("two_phase", steps=10, c0=1.0, c1=2.0))
    given: dict[str, Any] = {"image": torch.zeros(model.shape), "grid": "own", "steps": 10}
    with pytest.raises(ConfigError, match=r"^sample.strength must be one of the steps n / 10 .*33"):
        model.sample(strength=0.33, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.zeros(2, 1, 8, 9)}, r"x must have the shape \[2, 1, 8, 8\].*got \[2, 1, 8, 9"),
        ({"n": 3, "x": torch.zeros(2, 1, 8, 8)}, r"x must have the shape \[3, 1, 8, 8\]"),
        ({"x": torch.full((1, 1, 8, 8), torch.nan)}, "x must be finite"),
        ({"x": [[0.0]]}, r"x must be a tensor, got \[\[0.0\]\]"),
        ({"image": torch.zeros(8, 8)}, r"image must have the shape \[1, 8, 8\] or \[1, 1, 8, 8\]"),
        ({"image": torch.zeros(3, 1, 8, 8), "n": 2}, r"image must have the shape .*got \[3, 1, 8"),
        ({"image": torch.full((1, 8, 8), 255)}, r"image must be numbers in \[-1, 1\], got 255 to"),
        ({"image": torch.full((1, 8, 8), torch.nan)}, r"image must be numbers in \[-1, 1\]"),
        ({"mask": LEFT}, "mask must be left out without an image"),
        ({"strength": 0.5}, "strength must be left out without an image, got 0.5"),
        ({"image": torch.zeros(1, 8, 8), "strength": 0}, r"strength must be a number in \(0, 1\]"),
        ({"image": torch.zeros(1, 8, 8), "mask": LEFT * 2}, r"mask must be numbers in \[0, 1\]"),
        (
            {"image": torch.zeros(1, 8, 8), "mask": LEFT[:4]},
            r"mask must have the shape \[8, 8\] or",
        ),
        (
            {"image": torch.zeros(1, 8, 8), "mask": LEFT, "resamplings": 0},
            r"resamplings must be a whole number in \[1, 100\], got 0",
        ),
        (
            {"image": torch.zeros(1, 8, 8), "source": "combined"},
            "source must be prior, gaussian, posterior or analytic with an image",
        ),
        (
            {"image": torch.zeros(1, 8, 8), "strength": 0.1, "t_min": 0.2},
            r"t_min must be in \[0, 0.1",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_name(
    model: Model, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^sample.{said}"):
        model.sample(**given)
