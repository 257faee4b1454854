"""Progress where standard error is not a terminal: lines in the log."""

import logging
import re

import pytest

from train import progress
from train.progress import bar, bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """`[seconds]`: the time, to be set."""
    now = [0.0]
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_a_line_every_30_s_and_one_at_the_end(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with bar("router", 1000) as advance:
        for second in range(95):
            clock[0] = float(second)
            advance(10)
        assert [line.split(" in ")[0] for line in caplog.messages] == [
            "router                   310 of 1,000",
            "router                   610 of 1,000",
            "router                   910 of 1,000",
        ]
        advance(50)
    assert caplog.messages[-1].startswith("router                   1,000 of 1,000 in ")
    assert len(caplog.messages) == 4


def test_each_task_has_its_own_lines_with_its_note(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with bars() as shown:
        first = shown.add_task("expert 00", total=10, note="")
        second = shown.add_task("expert 01", total=10, note="")
        clock[0] = 31.0
        shown.update(first, completed=4, note="loss 0.1250")
        clock[0] = 40.0
        shown.update(first, completed=5, note="loss 0.1000")
        shown.update(second, completed=10, note="loss 0.5000")
        shown.update(second, completed=10, note="loss 0.5000")  # a finished task is logged once
    # rich measures the time by its own clock
    assert [re.sub(r"\d+ s", "N s", line) for line in caplog.messages] == [
        "expert 00                4 of 10 in N s  loss 0.1250",
        "expert 01                10 of 10 in N s  loss 0.5000",
    ]
