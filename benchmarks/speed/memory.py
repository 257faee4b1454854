"""The memory that a call takes, and what there is."""

import ctypes
import gc
from pathlib import Path

import torch

from benchmarks.speed.timing import Call

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


def peak_beyond(call: Call, device: str) -> float:
    """Bytes at the peak of a call, beyond what was held before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would be no growth
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _bytes(_STATUS, "VmRSS")
    call()
    return float(_bytes(_STATUS, "VmHWM") - before)


def available(device: str) -> float:
    """Bytes that can still be had."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(_bytes(_MEMINFO, "MemAvailable"))


def _bytes(file: Path, key: str) -> int:
    """A number of Linux's, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
