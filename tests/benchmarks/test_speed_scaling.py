"""Exponents are those of a power law, and a row says where it ended. No time is asserted."""

from pathlib import Path

import pytest
import torch

from benchmarks.speed import scaling
from benchmarks.speed.memory import available, peak_beyond
from benchmarks.speed.timing import Call

MIB = 2**20


@pytest.fixture
def law(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call at size n takes n^1.5 ms and n^2 MiB."""
    monkeypatch.setattr(scaling, "_median_s", lambda call, _: call() ** 1.5 / 1000)
    monkeypatch.setattr(scaling, "peak_beyond", lambda call, _: MIB * call() ** 2)
    monkeypatch.setattr(scaling, "available", lambda _: 1e12)


def build(size: int) -> Call:
    if size > 64:
        raise RuntimeError("out of memory in /opt/lib.so")
    return lambda: size


@pytest.mark.usefixtures("law")
def test_the_exponents_of_a_power_law_are_found() -> None:
    figures = scaling.measured("cpu", build, first=2, last=32)
    assert (figures["from"], figures["to"], figures["ended by"]) == (2, 32, "the largest size")
    for key, expected in {"time": 1.5, "last time": 1.5, "memory": 2, "last memory": 2}.items():
        assert figures[f"{key} exponent"] == pytest.approx(expected)
    assert figures["MiB at the end"] == 32**2


@pytest.mark.usefixtures("law")
def test_a_row_says_why_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = scaling.measured("cpu", build, first=2, last=256)
    assert (figures["to"], figures["ended by"]) == (64, "RuntimeError: out of memory in lib.so")
    monkeypatch.setattr(scaling, "available", lambda _: 2.6 * MIB * 16**2 / 0.4)
    assert scaling.measured("cpu", build, 2, 256)["ended by"] == "memory"
    monkeypatch.setattr(scaling, "CALL_S", {"cpu": 0.1})
    figures = scaling.measured("cpu", build, 2, 256)
    assert (figures["to"], figures["ended by"]) == (16, "0.1 s a call")
    with pytest.raises(RuntimeError, match="out of memory"):
        scaling.measured("cpu", build, first=128, last=256)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_the_peak_of_a_call_is_counted() -> None:
    found = peak_beyond(lambda: torch.ones(50 * MIB, dtype=torch.uint8), "cpu")
    assert 45 * MIB <= found < 150 * MIB  # Linux counts to about a MiB
    assert available("cpu") > 50 * MIB


def test_every_subject_of_scaling_can_be_called_at_its_least_size() -> None:
    scaling.sampling("cpu", 2, k=2, steps=2, side=8)()
    scaling.training("cpu", 2, side=8)()
    scaling.targets("cpu", 70, side=4)()
    scaling.partition(20)()
