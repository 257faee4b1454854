"""The assumptions of the convergence theorem, checked on schedules that meet and break them."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lab.regularity import regularity
from ddm.errors import ConfigError
from ddm.schedules import SCHEDULES, Coeffs, Discrete, TwoPhase, schedule

SMOOTH = [name for name in SCHEDULES if not isinstance(schedule(name), Discrete)]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_schedules_are_regular(name: str) -> None:
    assert regularity(schedule(name)).failures == ()
    found, t = (
        regularity(schedule(name), 0.05),
        torch.linspace(0.05, 1, 2001, dtype=torch.float64, requires_grad=True),
    )
    assert found.failures == ()
    _, s, da, ds = schedule(name)(t)
    assert found.s_min == pytest.approx(s[0].item(), rel=1e-12)
    assert found.max_da == pytest.approx(da.abs().max().item(), rel=1e-3)
    assert found.max_ds == pytest.approx(ds.abs().max().item(), rel=1e-3)
    for bound, first in ((found.max_d2a, da), (found.max_d2s, ds)):
        second = torch.zeros(1)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), t, retain_graph=True)
        assert bound == pytest.approx(second.abs().max().item(), rel=0.01)


def test_bounds_of_a_schedule_are_those_computed_by_hand() -> None:
    assert regularity(schedule("rectified_flow"), 0.25) == (0.25, 1, 1, 0, 0, ())
    assert regularity(schedule("edm"), 0.25, 0.5) == (20, 0, 80, 0, 0, ())
    # vp_constant: a = e^-5t, s^2 = 1 - a^2, ds = 5 a^2/s, d2s = -50 a^2/s - 25 a^4/s^3, all largest
    # at t_min
    a = math.exp(-0.5)
    s = math.sqrt(1 - a**2)
    expected = (s, 5 * a, 5 * a**2 / s, 25 * a, 50 * a**2 / s + 25 * a**4 / s**3)
    assert regularity(schedule("vp_constant"), 0.1)[:5] == pytest.approx(expected, rel=2e-3)


def test_where_two_phase_bends_is_named_and_is_one_of_its_steps() -> None:
    for process in (TwoPhase(20, 2.0, 2.0), TwoPhase(100, 1.0, 3.0)):
        found = regularity(process)
        assert (found.max_d2a, found.max_d2s) == (math.inf, math.inf)
        assert len(found.failures) == 2
        for name, failure in zip(("da/dt", "ds/dt"), found.failures, strict=True):
            said = re.fullmatch(
                rf"{name} must be continuous, it jumps by [\d.]+ at t = ([\d.]+)", failure
            )
            assert said is not None
            place = float(said[1]) * process.steps
            assert place == pytest.approx(round(place), abs=1e-9)


def bent(name: str, slope: float, place: float) -> Callable[[Tensor], Coeffs]:
    """Rectified flow, a or s of which falls or rises faster by `slope` after `place`."""

    def process(t: Tensor) -> Coeffs:
        c = schedule("rectified_flow")(t)._asdict()
        c[name] = c[name] + slope * (t - place).clamp_min(0)
        c[f"d{name}"] = c[f"d{name}"] + slope * (t > place)
        return Coeffs(**c)

    return process


def replaced(**parts: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Coeffs]:
    """Rectified flow with some coefficients replaced."""
    return lambda t: schedule("rectified_flow")(t)._replace(
        **{name: part(t) for name, part in parts.items()}
    )


@pytest.mark.parametrize(
    ("process", "failures"),
    [
        (bent("s", 0.5, 0.3), ["ds/dt must be continuous, it jumps by 0.5 at t = 0.3"]),
        (bent("a", -0.25, 0.7), ["da/dt must be continuous, it jumps by 0.25 at t = 0.7"]),
        (
            bent("s", -1.0, 0.5),
            [
                r"s must rise everywhere in t, it fails to after t = 0.5\d*",
                "ds/dt must be continuous.*",
            ],
        ),
        (
            replaced(a=lambda t: 1 - t + 0.7 * t**2, da=lambda t: 1.4 * t - 1),
            ["a must never rise in t, it fails to after t = 0.9998"],
        ),
        (
            replaced(s=lambda t: t - 0.6 * t**2, ds=lambda t: 1 - 1.2 * t),
            ["s must rise everywhere in t, it fails to after t = 0.9998"],
        ),
        (replaced(a=lambda t: 0.9 - 0.5 * t), ["a(0) must be 1 and s(0) 0, they are 0.9 and 0"]),
        (replaced(s=lambda t: 0.1 + t), ["a(0) must be 1 and s(0) 0, they are 1 and 0.1"]),
        (
            replaced(ds=lambda t: torch.where(t == 1, math.nan, 1.0)),
            ["a, s and their derivatives must be finite on [0.01, 1]"],
        ),
        (
            replaced(a=lambda t: 1 + 2 * t**2, da=lambda t: 4 * t),
            [
                "a must never rise in t, it fails to after t = 0.9998",
                "a/s must fall everywhere in t, it fails to after t = 0.9998",
            ],
        ),
    ],
)
def test_every_rule_that_a_schedule_breaks_is_named(process: Any, failures: list[str]) -> None:
    found = regularity(process, 0.01)
    assert len(found.failures) == len(failures)
    for said, expected in zip(found.failures, failures, strict=True):
        assert said == expected or re.fullmatch(expected, said), said


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 1.0), (0.5, 0.5), (0.1, 1.1)])
def test_regularity_is_asked_for_times_inside_the_path(t_min: float, t_max: float) -> None:
    message = f"t_min and t_max must be in 0 < t_min < t_max <= 1, got ({t_min}, {t_max})"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        regularity(schedule("vp_linear"), t_min, t_max)


def test_a_bend_far_from_the_steepest_place_is_found() -> None:
    def bent(t: torch.Tensor) -> Coeffs:
        a, s, da, ds = schedule("vp_cosine")(t)
        return Coeffs(a, s + 0.1 * (t - 0.5).clamp_min(0), da, ds + 0.1 * (t > 0.5))

    assert regularity(bent).failures == ("ds/dt must be continuous, it jumps by 0.1 at t = 0.5",)
    found = regularity(schedule("two_phase"), t_min=1e-5)
    assert [sentence.split(" must")[0] for sentence in found.failures] == ["da/dt", "ds/dt"]
