"""The settings of sampling: names, defaults, ranges and descriptions, the same in configs, Python
and HTTP.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypedDict

from ddm.errors import require, within
from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS
from router.policies import POLICIES
from router.sources import SOURCES

CONTROL_VARIATES = ("none", "gaussian")


def _setting(
    default: Any,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    names: tuple[str, ...] | None = None,
) -> Any:
    """A field with its description; its value must be in [low, high], or one of `names`."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "names": names})


@dataclass
class SampleConfig:
    """How images are sampled."""

    steps: int = _setting(25, "steps of the sampler", 1, 1000)
    sampler: str = _setting("ipndm", "how the ODE or SDE is integrated", names=SAMPLERS)
    grid: str = _setting("cosine", "the times of the steps", names=GRIDS)
    source: str = _setting(
        "posterior", "where alpha, the experts' probabilities, comes from", names=SOURCES
    )
    policy: str = _setting("switching", "which experts move the image, given alpha", names=POLICIES)
    top_k: int = _setting(1, "experts per step of policy=top_k", 1, 2**31)
    nucleus_p: float = _setting(0.9, "mass of alpha that policy=nucleus covers", 1e-6, 1)
    budget: float = _setting(
        1.5, "expert calls per step of policy=adaptive, on average at most", 1, 1_000_000
    )
    switch_rate: float = _setting(
        1.0, "redraws of an image's expert under policy=switching, per unit of t", 0, 1000
    )
    temperature: float = _setting(
        1.0,
        "the policy sees alpha^(1/temperature), renormalized: below 1 more decided",
        0.01,
        100,
    )
    control_variate: str = _setting(
        "gaussian",
        "what replaces the experts that are not called, unless policy is fixed or switching",
        names=CONTROL_VARIATES,
    )
    order: int = _setting(3, "order of sampler=unipc, 2 or 3, or ipndm, 1 to 4", 1, 4)
    relaxation_rate: float = _setting(
        40.0,
        "how fast source=combined relaxes to the posterior net, per unit of t",
        0,
        1_000_000,
    )
    t_min: float = _setting(0.0, "time at which the grid ends", 0, 0.999)
    clip: bool = _setting(True, "clip the denoised images to [-1, 1], after mixing")
    clusters: Any = _setting(  # noqa: RUF009
        None, "sample from these clusters only: names, or a factor of pi for each; none for all"
    )
    condition: Any = _setting(  # noqa: RUF009
        None, "what the images show: a class, or attributes with 1 or 0; none for anything"
    )
    guidance: float = _setting(
        1.0, "weight of the condition in the experts' answers; any but 1 costs a second NFE", 0, 100
    )
    autoguidance: float = _setting(
        1.0,
        "weight of the experts' answers against those of the bundle's seed model; any but 1 costs a second NFE",
        0,
        100,
    )
    guidance_interval: Any = _setting(  # noqa: RUF009
        None, "the first and last t at which guidance and autoguidance apply; none for all"
    )

    def __post_init__(self) -> None:
        """`clusters` becomes an object of weights, or None, and `condition` one of 1 and 0; a name
        that YAML read as a number becomes text, and an interval a list, as in JSON.
        """
        weights = [self.clusters] if isinstance(self.clusters, str) else self.clusters
        weights = weights or None
        if isinstance(weights, list | tuple) and all(
            isinstance(name, str | int) for name in weights
        ):
            weights = dict.fromkeys(weights, 1.0)
        if isinstance(weights, Mapping):
            weights = {str(name): weight for name, weight in weights.items()}
        self.clusters = weights
        wanted = self.condition
        if isinstance(wanted, str | int) and not isinstance(wanted, bool):
            wanted = {str(wanted): 1} if wanted != "" else None
        if isinstance(wanted, Mapping):
            wanted = {str(name): _bit(value) for name, value in wanted.items()}
        self.condition = None if wanted == {} else wanted
        if isinstance(self.guidance_interval, tuple):
            self.guidance_interval = list(self.guidance_interval)

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, setting.name)) for setting in SETTINGS))

    def check(self) -> None:
        """Raise `ConfigError` naming the key `sample.…` of an unknown or out-of-range value."""
        with within("sample"):
            for setting in SETTINGS:
                _check(setting, getattr(self, setting.name))
            require(
                self.policy == "switching" or self.switch_rate == SampleConfig.switch_rate,
                "switch_rate",
                f"be left at {SampleConfig.switch_rate:g} for policy={self.policy}, which has none",
                self.switch_rate,
            )
            require(
                bool(self.condition) or self.guidance == SampleConfig.guidance,
                "guidance",
                f"be left at {SampleConfig.guidance:g} without a condition",
                self.guidance,
            )


SETTINGS = fields(SampleConfig)


def over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `given` over those of `base`, whose `switch_rate` goes with its policy, and
    `guidance` with its condition.
    """
    settings = {**base, **given}
    if settings["policy"] != "switching" and "switch_rate" not in given:
        settings["switch_rate"] = SampleConfig.switch_rate
    if "guidance" in base and "guidance" not in given and not settings.get("condition"):
        settings["guidance"] = SampleConfig.guidance
    return settings


class SampleSettings(TypedDict, total=False):
    """The fields of `SampleConfig` as keywords."""

    steps: int
    sampler: str
    grid: str
    source: str
    policy: str
    top_k: int
    nucleus_p: float
    budget: float
    switch_rate: float
    temperature: float
    control_variate: str
    order: int
    relaxation_rate: float
    t_min: float
    clip: bool
    clusters: str | Mapping[str, float] | Sequence[str]
    condition: str | Mapping[str, int]
    guidance: float
    autoguidance: float
    guidance_interval: Sequence[float]


_RULES = {
    "clusters": (
        "be a list of clusters, or an object with a finite weight of at least 0 for each, not all 0"
    ),
    "condition": "be a class, an attribute, or an object with 1 or 0 for each attribute",
    "guidance_interval": "be two times in [0, 1], the first below the last",
}


def rule(setting: Field[Any]) -> str:
    """What the value of a setting must be, in words that follow `must`."""
    bounds = setting.metadata
    if bounds["names"]:
        return f"be one of {' '.join(bounds['names'])}"
    if setting.name in _RULES:
        return _RULES[setting.name]
    if setting.type is bool:
        return "be true or false"
    kind = "a whole number" if setting.type is int else "a number"
    return f"be {kind} in [{bounds['low']}, {bounds['high']}]"


def _check(setting: Field[Any], value: Any) -> None:
    require(_holds(setting, value), setting.name, rule(setting), value)


def _holds(setting: Field[Any], value: Any) -> bool:
    bounds = setting.metadata
    if bounds["names"]:
        return value in bounds["names"]
    match setting.name:
        case "clusters":
            return value is None or _are_weights(value)
        case "condition":
            return value is None or _is_condition(value)
        case "guidance_interval":
            return value is None or _is_interval(value)
    if setting.type is bool:
        return isinstance(value, bool)
    number = isinstance(value, int if setting.type is int else int | float)
    return number and not isinstance(value, bool) and bounds["low"] <= value <= bounds["high"]


def _are_weights(value: Any) -> bool:
    weights: list[Any] = list(value.values()) if isinstance(value, dict) else [None]
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
    return numbers and all(0 <= w < math.inf for w in weights) and max(weights) > 0


def _is_condition(value: Any) -> bool:
    return isinstance(value, dict) and all(type(v) is int and v in (0, 1) for v in value.values())


def _is_interval(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    numbers = all(isinstance(t, int | float) and not isinstance(t, bool) for t in value)
    return numbers and 0 <= value[0] < value[1] <= 1


def _bit(value: Any) -> Any:
    """true and false as 1 and 0."""
    return int(value) if isinstance(value, bool) else value


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset(value.items())
    return tuple(value) if isinstance(value, list) else value


def described(own: Mapping[str, Any] | None = None) -> str:
    """One line per setting: its default, that of `own` if it is there, description and rule."""
    lines = []
    for setting in SETTINGS:
        value = (own or {}).get(setting.name, getattr(SampleConfig(), setting.name))
        lines.append(f"{setting.name}={value!r}: {setting.metadata['doc']}; must {rule(setting)}")
    return "\n".join(lines)


SampleConfig.__doc__ = f"{SampleConfig.__doc__}\n\n{described()}"
