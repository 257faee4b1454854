"""The settings of sampling: those that belong together."""

import math

import pytest

from ddm.errors import ConfigError
from serve.model.params import SampleConfig, over


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, "fast", True])
def test_a_switch_rate_that_cannot_be_is_refused_by_name(rate: object) -> None:
    with pytest.raises(ConfigError, match=r"sample.switch_rate must be a number in \[0, 1000\]"):
        SampleConfig(policy="switching", switch_rate=rate).check()  # type: ignore[arg-type]


def test_a_switch_rate_for_a_policy_without_one_is_refused_by_name() -> None:
    message = "sample.switch_rate must be left at 1 for policy=balanced, which has none, got 3"
    with pytest.raises(ConfigError, match=message):
        SampleConfig(policy="balanced", switch_rate=3).check()


def test_the_switch_rate_of_the_defaults_goes_with_their_policy() -> None:
    base = {"policy": "switching", "switch_rate": 4.0, "steps": 5}
    assert over(base, {"policy": "balanced"}) == {
        "policy": "balanced",
        "switch_rate": 1.0,
        "steps": 5,
    }
    assert over(base, {"steps": 7}) == {**base, "steps": 7}
    assert over(base, {"policy": "balanced", "switch_rate": 3.0})["switch_rate"] == 3.0
