"""Timing on any device, the machine's matrix-product ceiling, and a run's record with its budget."""

import contextlib
import gc
import logging
import platform
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddm.artifacts import read_json, write_json

Figures = dict[str, float | str]  # column -> value
Call = Callable[[], object]

ROW_S = 240.0  # no row takes longer

log = logging.getLogger("speed")


class OutOfTime(BaseException):
    """The budget of seconds is used up."""


@dataclass(frozen=True)
class Variant:
    """One row of a subject's table.

    measure: returns the row's figures. rank: rows of rank 0 of all subjects are measured first.
    needs_s: seconds; with less left, the row is not measured.
    """

    name: str
    measure: Callable[[], Figures]
    rank: int = 0
    needs_s: float = 10.0


@dataclass
class Timing:
    """Seconds per call, one number per round for each side, and what the sides that failed raised."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Seconds per call."""
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, base: str) -> list[float]:
        """The speed of a side over that of `base` in each round."""
        return [b / a for a, b in zip(self.seconds[side], self.seconds[base], strict=True)]

    def rates(self, sides: Sequence[str], count: float, unit: str) -> Figures:
        """`count / seconds` of each side, with half the range over the median in percent."""
        figures: Figures = {}
        for side in sides:
            if side in self.seconds:
                figures[f"{side} {unit}"] = count / self.median(side)
                figures[f"{side} ± %"] = spread(self.seconds[side])
            elif side in self.errors:
                figures[f"{side} error"] = self.errors[side]
        return figures

    def compared(self, side: str, base: str) -> Figures:
        """The median ratio of speeds and its range; nothing if either side failed."""
        if not {side, base} <= self.seconds.keys():
            return {}
        ratios = self.ratio(side, base)
        column = f"{side} / {base}"
        return {column: statistics.median(ratios), f"{column} range": shown_range(ratios)}


def spread(values: Sequence[float]) -> float:
    """Half the range over the median, in percent."""
    return 50 * (max(values) - min(values)) / statistics.median(values)


def shown_range(values: Sequence[float]) -> str:
    """The smallest and the largest value."""
    return f"{min(values):.3g} to {max(values):.3g}"


def synchronize(device: str) -> None:
    """Wait until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(
    sides: Mapping[str, Call],
    device: str,
    rounds: int = 5,
    round_s: float = 0.2,
    most_s: float = 40,
) -> Timing:
    """Time the sides in turn, `rounds` times, each for about `round_s` seconds and at least a call.

    Each side is first called twice, to warm up. After `most_s` seconds of rounds, three of them are
    enough. A side that fails is left out, with its error noted. Raises the error if all fail.
    """
    timing = Timing()
    calls = {}
    failure: Exception | None = None
    for name, call in sides.items():
        try:
            call()
            calls[name] = max(1, min(1000, int(round_s / _seconds(call, 1, device))))
            timing.seconds[name] = []
        except Exception as error:
            failure, timing.errors[name] = error, brief(error)
            release()
    if failure is not None and not calls:
        raise failure
    began = time.perf_counter()
    for n in range(rounds):
        if n >= 3 and time.perf_counter() - began > most_s:
            break
        for name, count in calls.items():
            timing.seconds[name].append(_seconds(sides[name], count, device))
    return timing


def _seconds(call: Call, count: int, device: str) -> float:
    """Seconds of one of `count` calls."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / count


@dataclass(frozen=True)
class Ceiling:
    """A square matrix product in one precision, the machine's limit: of 2048 on a CPU, else 8192.

    precision: float64, float32, tf32 or bfloat16.
    """

    precision: str
    device: str

    @property
    def flop(self) -> float:
        """Of one call."""
        return 2.0 * self._side**3

    def call(self) -> Call:
        """The product, on matrices made now."""
        dtype = torch.float32 if self.precision == "tf32" else getattr(torch, self.precision)
        a, b = (torch.randn(self._side, self._side, device=self.device).to(dtype) for _ in range(2))

        def product() -> Tensor:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
            try:
                return a @ b
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return product

    @property
    def _side(self) -> int:
        return 2048 if self.device == "cpu" else 8192


def against_ceiling(timing: Timing, sides: Sequence[str], flop: float, ceiling: Ceiling) -> Figures:
    """TFLOP/s of the side `ceiling` of a timing, and the share of it that each side reaches with
    `flop` operations a call.
    """
    if "ceiling" not in timing.seconds:
        return {}
    figures: Figures = {
        f"{ceiling.precision} ceiling TFLOP/s": ceiling.flop / timing.median("ceiling") / 1e12
    }
    for side in sides:
        if side in timing.seconds:
            ratio = statistics.median(timing.ratio(side, "ceiling"))
            figures[f"{side} share of ceiling"] = flop / ceiling.flop * ratio
    return figures


def flop_of(network: nn.Module, x: Tensor, t: Tensor, backward: bool) -> float:
    """Operations per image of a forward pass, or of it and its backward pass."""
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        out = network(x[:1], t[:1])
        if backward:
            out.sum().backward()
    network.zero_grad()
    return float(counter.get_total_flops())


def parameters(network: nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def release() -> None:
    """Forget compiled code, of which only so many variants are kept, and unused device memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def brief(error: BaseException) -> str:
    """The type and the first line of an error, without the folders of this machine."""
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"[\w.~-]*/(?:[\w.-]*/)*", "", f"{type(error).__name__}: {line}")[:300]


@dataclass
class Record:
    """What a run has measured, written to `path` after every row.

    Subjects that this run does not name are kept as an earlier run left them; of those that it does,
    the earlier run is appended to the list `runs` of `STEM-history.json` beside `path`.
    """

    path: Path
    device: str
    seconds: float
    command: str

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.facts: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        self.earlier: list[dict[str, Any]] = []  # runs that this one replaces

    def start(self, subject: str, doc: str) -> None:
        """Begin a subject anew."""
        earlier = self.facts.get(subject)
        if earlier is not None and any("figures" in row for row in earlier["rows"]):
            facts = {key: value for key, value in earlier.items() if key != "about"}
            self.earlier.append({"subject": subject, **facts})
        self.facts[subject] = {
            "about": doc.strip(),
            "command": self.command,
            "seconds": self.seconds,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": _commit(),
            "machine": machine(self.device),
            "rows": [],
        }

    def _write(self) -> None:
        """Write what is measured, once what it replaces is in the history."""
        if self.earlier:
            path = self.path.with_name(f"{self.path.stem}-history.json")
            runs = read_json(path)["runs"] if path.exists() else []
            write_json(path, {"runs": [*runs, *self.earlier]})
            self.earlier = []
        write_json(self.path, self.facts)

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def measure(self, subject: str, variant: Variant) -> None:
        """Measure a row, and note its figures, its error, or that the budget does not reach."""
        row: dict[str, Any] = {"name": variant.name}
        began = time.monotonic()
        if self.left_s() < variant.needs_s:
            row["not_measured"] = (
                f"{variant.needs_s:.0f} s needed, {max(0, self.left_s()):.0f} left"
            )
        else:
            try:
                with time_limit(min(self.left_s(), ROW_S)):
                    row["figures"] = rounded(variant.measure())
            except OutOfTime as error:
                row["not_measured"] = str(error)
            except Exception as error:
                log.debug("%s", variant.name, exc_info=True)
                row["error"] = brief(error)
            row["took_s"] = round(time.monotonic() - began, 1)
            with contextlib.suppress(Exception):  # after an error of the device, the rest goes on
                release()
        self.facts[subject]["rows"].append(row)
        self._write()
        log.info("%s | %s | %s", subject, variant.name, _line(row))


def _line(row: Mapping[str, Any]) -> str:
    if "figures" in row:
        shown = ", ".join(f"{column} {value}" for column, value in row["figures"].items())
        return f"{shown} ({row['took_s']} s)"
    return row.get("error") or f"not measured: {row['not_measured']}"


def rounded(figures: Figures) -> Figures:
    """Four digits of every number."""
    return {
        column: value if isinstance(value, str) else float(f"{value:.4g}")
        for column, value in figures.items()
    }


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after so many seconds, as soon as Python runs.

    Again every 10 seconds, because a destructor or a callback from C++ swallows it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: Any) -> None:
        raise OutOfTime(f"it did not end within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: str) -> dict[str, Any]:
    """The hardware and the versions that matter."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    facts = {
        "cpu": model[1] if model else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {"gpu": torch.cuda.get_device_name(), **facts} if device == "cuda" else facts


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
