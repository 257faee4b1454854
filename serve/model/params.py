"""The parameters of sampling: their names, defaults and ranges; those of configs, Python and HTTP alike."""

import math
from dataclasses import dataclass, field

from ddm.errors import one_of, require, within
from ddm.grids import GRIDS
from ddm.samplers import SAMPLERS, sampler
from router.policies import POLICIES, policy
from router.sources import SOURCES

CONTROL_VARIATES = ("none", "gaussian")


@dataclass
class SampleConfig:
    """How images are drawn; the names are those of configs, code and HTTP."""

    steps: int = 25
    sampler: str = "dpmpp_2m"
    grid: str = "uniform_t"
    source: str = "combined"
    policy: str = "balanced"
    top_k: int = 1  # for policy=top_k
    nucleus_p: float = 0.9  # for policy=nucleus
    budget: float = 1.5  # for policy=adaptive: calls a step, on average at most
    temperature: float = (
        1.0  # alpha^(1/temperature), renormalized, is what the policy sees: below 1 more decided
    )
    control_variate: str = (
        "gaussian"  # what stands in for the experts that are not asked; none for nothing
    )
    order: int = 3  # for sampler=unipc
    relaxation_rate: float = 40.0  # for source=combined, towards the posterior net, a unit of t
    t_min: float = 0.0  # where the grid ends
    clip: bool = True  # bound the denoised images to [-1, 1], after mixing
    clusters: dict[str, float] = field(
        default_factory=dict
    )  # factors of their shares, 0 for others; none for all

    def check(self) -> None:
        """Raise `ConfigError` naming the key `sample.…` of a value that is unknown or out of range."""
        with within("sample"):
            self._check()

    def _check(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        require(whole and 1 <= self.steps <= 1000, "steps", "be in [1, 1000]", self.steps)
        for key, names in (
            ("sampler", SAMPLERS),
            ("grid", GRIDS),
            ("source", SOURCES),
            ("policy", POLICIES),
        ):
            if getattr(self, key) not in names:
                raise one_of(key, getattr(self, key), names)
        if self.control_variate not in CONTROL_VARIATES:
            raise one_of("control_variate", self.control_variate, CONTROL_VARIATES)
        policy(self.policy, self.top_k, self.nucleus_p, self.budget)
        require(
            0.01 <= self.temperature <= 100,
            "temperature",
            "be in [0.01, 100]",
            self.temperature,
        )
        sampler(self.sampler, self.order)
        require(self.relaxation_rate >= 0, "relaxation_rate", "be at least 0", self.relaxation_rate)
        require(0 <= self.t_min <= 0.999, "t_min", "be in [0, 0.999]", self.t_min)
        enough = (
            all(0 <= weight < math.inf for weight in self.clusters.values())
            and sum(self.clusters.values()) > 0
        )
        require(
            not self.clusters or enough,
            "clusters",
            "have finite weights of at least 0, not all 0",
            self.clusters,
        )
