"""The table of trainings side by side: what its rows say, and the log where there is no terminal."""

import pytest
from rich.console import Console

from train import live_table
from train.live_table import LiveTable, Row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """`[seconds]`: the time, to be set."""
    now = [0.0]
    caplog.set_level("INFO")
    monkeypatch.setattr(live_table.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live_table.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def shown(table: LiveTable) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table.table())
    return [line.split() for line in capture.get().splitlines()]


def test_speed_and_time_left_count_from_where_this_attempt_began(clock: list[float]) -> None:
    with LiveTable([Row("expert 00", 1000, 16), Row("expert 01", 1000, 16)]) as table:
        table.state(0, "running", "10.0.0.3, process 7")
        table.step(0, 400, float("nan"))  # resumed
        clock[0] = 10.0
        table.step(0, 500, 0.25)
        (first, second) = shown(table)
    assert " ".join(first) == (
        "expert 00 10.0.0.3, process 7 running 500 of 1,000 loss 0.2500 160 images/s 0:00:50 left"
    )
    assert second == ["expert", "01", "waiting", "0", "of", "1,000"]


def test_what_is_done_comes_last(clock: list[float]) -> None:
    with LiveTable([Row(f"expert 0{i}", 10, 1) for i in range(3)]) as table:
        table.state(0, "done")
        table.state(2, "running")
        assert [row[1] for row in shown(table)] == ["02", "01", "00"]
        assert shown(table)[-1][2:] == ["done", "0", "of", "10"]


def test_without_a_terminal_a_line_every_30_s(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with LiveTable([Row("expert 00", 100, 2)]) as table:
        table.state(0, "running", "process 7")
        for second in range(0, 65, 5):
            clock[0] = float(second)
            table.step(0, second, 1.0)
        clock[0] = 80.0
        table.step(0, 100, 0.5)
        table.state(0, "done")
    assert [" ".join(line.split()) for line in caplog.messages] == [
        "expert 00 process 7 running 0 of 100",
        "expert 00 process 7 running 30 of 100 loss 1.0000 2 images/s 0:01:10 left",
        "expert 00 process 7 running 60 of 100 loss 1.0000 2 images/s 0:00:40 left",
        "expert 00 process 7 done 100 of 100 loss 0.5000 2 images/s",
    ]
