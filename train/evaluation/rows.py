"""The rows that a table can have, one line per method."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A method: which experts update the image, and where alpha comes from.

    `source` None is the config's, at its temperature; a source of the row's own has temperature 1.
    `more` are other settings of `sample`.
    """

    meaning: str
    colour: str  # of Okabe and Ito's, distinct also to the colour-blind; the same everywhere
    policy: str
    source: str | None = None
    control_variate: str = "none"
    more: Mapping[str, Any] = {}

    @property
    def routed_one(self) -> bool:
        """Whether it evaluates one expert per step, selected by alpha."""
        return self.policy in ("stochastic", "balanced", "switching") or self.more == {"top_k": 1}


ROWS = {
    "one-model": Row(
        "one model on all images, of the compute of all experts together",
        "#000000",
        "full",
        "prior",
    ),
    "one-model-time": Row(
        "one model on all images, trained for as long as one expert: what one machine does while each "
        "of the others trains an expert",
        "#555555",
        "full",
        "prior",
    ),
    "Naive": Row(
        "one expert per image, sampled from the mixture weights", "#999999", "fixed", "prior"
    ),
    "MoG-a": Row(
        "one expert per step, sampled from the posterior net's alpha",
        "#56B4E9",
        "stochastic",
        "posterior",
    ),
    "MoG-da": Row(
        "one expert per step, sampled from the integrated alpha",
        "#0072B2",
        "stochastic",
        "combined",
    ),
    "switching": Row(
        "one expert per step, kept until a Poisson process samples another from the posterior net's alpha",
        "#CC0000",
        "switching",
        "posterior",
    ),
    "switching-gaussian": Row(
        "switching, with alpha from one Gaussian per cluster: no router",
        "#FF7777",
        "switching",
        "gaussian",
    ),
    "balanced": Row("one expert per step, with error feedback", "#D55E00", "balanced"),
    "balanced-cv": Row(
        "balanced, with the Gaussian control variate", "#E69F00", "balanced", None, "gaussian"
    ),
    "adaptive": Row(
        "balanced-cv, with a second expert where alpha is undecided",
        "#882255",
        "adaptive",
        None,
        "gaussian",
    ),
    "top-1": Row("the most likely expert of each step", "#CC79A7", "top_k", more={"top_k": 1}),
    "top-2": Row(
        "the two most likely experts of each step, weighted by alpha",
        "#DDAADD",
        "top_k",
        more={"top_k": 2},
    ),
    "nucleus": Row(
        "the fewest experts per step that carry 0.9 of alpha, weighted by alpha",
        "#AA9900",
        "nucleus",
        more={"nucleus_p": 0.9},
    ),
    "full": Row("all experts at each step, weighted by alpha", "#009E73", "full"),
}
ONE_MODEL = ("one-model", "one-model-time")  # the rows without experts
PAPER = ("one-model", "Naive", "MoG-a", "MoG-da")  # the rows of the paper's table
METHODS = tuple(ROWS)
