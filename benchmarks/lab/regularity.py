"""Which assumptions of the convergence theorem a schedule meets."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.errors import require
from ddm.schedules import Schedule


class Regularity(NamedTuple):
    """What the convergence theorem assumes of a schedule: the bounds it uses, and every assumption
    that fails.
    """

    s_min: float  # the smallest s: the theorem's constants grow with its inverse
    max_da: float
    max_ds: float
    max_d2a: float  # infinite where da jumps
    max_d2s: float
    failures: tuple[str, ...]  # sentences; empty for a regular schedule


def regularity(schedule: Schedule, t_min: float = 1e-3, t_max: float = 1.0) -> Regularity:
    """Check a schedule: a(0) = 1, s(0) = 0; a never rising, s and s/a rising; a and s twice
    differentiable with finite bounds.

    The second derivatives are differences of da and ds over 4,096 intervals. Where one of them
    jumps, halving its interval again and again does not make the difference smaller, and the
    sentence says where.

    Raises `ConfigError` for times not in 0 < t_min < t_max <= 1.
    """
    require(
        0 < t_min < t_max <= 1,
        "t_min and t_max",
        "be in 0 < t_min < t_max <= 1",
        (t_min, t_max),
    )
    t = torch.linspace(t_min, t_max, 4097, dtype=torch.float64)
    c, start, failures = schedule(t), schedule(torch.zeros((), dtype=torch.float64)), []
    if abs(float(start.a) - 1) > 1e-12 or abs(float(start.s)) > 1e-12:
        failures.append(
            f"a(0) must be 1 and s(0) 0, they are {float(start.a):g} and {float(start.s):g}"
        )
    if not all(part.isfinite().all() for part in c):
        failures.append(f"a, s and their derivatives must be finite on [{t_min:g}, {t_max:g}]")
    for name, rule, falling, may_stand in (
        ("a", "never rise", c.a, True),
        ("s", "rise everywhere", -c.s, False),
        ("a/s", "fall everywhere", c.a / c.s, False),
    ):
        change = falling.diff()
        worst = int(change.argmax())
        if change[worst] > 0 or (change[worst] == 0 and not may_stand):
            failures.append(f"{name} must {rule} in t, it fails to after t = {float(t[worst]):.4g}")
    second = []
    for i, name in ((2, "da/dt"), (3, "ds/dt")):
        jump, where = _jump(lambda at, i=i: schedule(at)[i], t)  # type: ignore[misc]
        if jump:
            failures.append(f"{name} must be continuous, it jumps by {jump:.2g} at t = {where:.4g}")
        second.append(math.inf if jump else float((c[i].diff() / t.diff()).abs().max()))
    bounds = (float(c.da.abs().max()), float(c.ds.abs().max()), second[0], second[1])
    return Regularity(float(c.s.min()), *bounds, tuple(failures))


def _jump(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[float, float]:
    """The size and place of the largest jump of a function over the intervals of t; size 0 where it
    is continuous.
    """
    left, right = t[:-1], t[1:]
    first = (function(right) - function(left)).abs()
    for _ in range(20):
        middle = (left + right) / 2
        at_left, at_middle, at_right = function(torch.stack([left, middle, right]))
        lower = (at_middle - at_left).abs() > (at_right - at_middle).abs()
        left, right = torch.where(lower, left, middle), torch.where(lower, middle, right)
    last = (function(right) - function(left)).abs()
    jumps = torch.where((last > 1e-3 * first) & (last > 1e-9 * function(t).abs().max()), last, 0)
    worst = int(jumps.argmax())
    return float(jumps[worst]), float(left[worst])
