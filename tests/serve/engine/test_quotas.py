"""What a key may ask for per minute, by a clock of the test's own."""

import pytest

from serve.engine.quotas import Quotas
from serve.engine.shares import ANYONE, Key

KEY = Key("one", images_per_minute=60, nfe_per_minute=600)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minute_s_worth_at_once_and_then_evenly() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    assert quotas.wait_s(KEY, 60, 600) == 0
    quotas.use(KEY, 60, 60)
    assert quotas.wait_s(KEY, 6, 6) == pytest.approx(6)
    clock.now += 6
    assert quotas.wait_s(KEY, 6, 6) == 0
    clock.now += 1000
    quotas.use(KEY, 1, 600)
    assert quotas.wait_s(KEY, 1, 10) == pytest.approx(1)


def test_more_than_a_minute_s_worth_waits_until_nothing_is_used_and_counts_in_full() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    quotas.use(KEY, 30, 0)
    assert quotas.wait_s(KEY, 120, 0) == pytest.approx(30)
    clock.now += 30
    assert quotas.wait_s(KEY, 120, 0) == 0
    quotas.use(KEY, 120, 0)
    assert quotas.wait_s(KEY, 1, 0) == pytest.approx(61)


def test_keys_have_quotas_of_their_own_or_none() -> None:
    quotas = Quotas(Clock())
    quotas.use(KEY, 60, 600)
    assert quotas.wait_s(Key("other", images_per_minute=60), 60, 1e9) == 0
    quotas.use(ANYONE, 10**9, 1e9)
    assert quotas.wait_s(ANYONE, 10**9, 1e9) == 0
