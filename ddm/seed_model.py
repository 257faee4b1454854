"""The seed model as the denoiser of high noise: at t > t* (`above`) it moves every image, and at
t <= t* the experts do, from one that is drawn from alpha(x, t*).

At high noise alpha is undecided and all experts say nearly the same, so that there one network, which
has seen all images, can take their place (eDiff-I, arXiv 2211.01324, has a network per noise level).

Exact, if the networks and alpha are. Let the seed model be the denoiser of the mixture
`p(x, t) = sum_k pi_k p_k(x, t)`. Its ODE carries `p(., 1)` to `p(., t*)`, whatever expert is noted
beside x. At t* an expert k is drawn from `alpha_k(x, t*) = pi_k p_k(x, t*) / p(x, t*)`, so the pair
(x, k) has the law `pi_k p_k(x, t*)`, which is that of ancestral sampling, and of the policies `fixed`
and `switching` at t* (`router.policies.Switching`): what they do below has the law that it had. A
policy that follows the mixture (`full`) follows it above t* as well, by one network in place of K.

The seed model is the mixture's if it has seen the images of all clusters, each as often as pi says.
Other weights of the clusters (`sample.clusters`) then hold below t* alone.

At t* = 1 the seed model moves no image, and is there to guide: experts know more than what they all
started from, and `sample.autoguidance` goes on in that direction (`ddm.condition.guided`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.conversion import time_of
from ddm.errors import ArtifactError, shown
from ddm.grids import log_sigma
from ddm.schedules import schedule

KINDS = ("seed_model", "expert")  # of an artifact that may be one: an expert of one cluster, too


def is_above(t: Tensor, above: float) -> Tensor:
    """Where the seed model moves the images, bool of the shape of t.

    In float32, as networks see t: the router and an expert elsewhere must not differ on it.
    """
    return t.float() > above


def check_above(path: Path, above: Any, listed: bool) -> float:
    """t* of a manifest, also 1 without a seed model; `listed`: whether it names one.

    Raises `ArtifactError` naming the file.
    """
    if above is None and not listed:
        return 1.0
    if not listed:
        raise ArtifactError(f"{path} is damaged: above is {shown(above)}, but it has no seed model")
    if not isinstance(above, float) or not 0 < above <= 1:
        raise ArtifactError(
            f"{path} is damaged: above must be a number in (0, 1], got {shown(above)}"
        )
    return above


def check_learned(
    above: float,
    process: Mapping[str, Any],
    seed_model: Mapping[Path, Mapping[str, Any]],
    experts: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Raise `ArtifactError` naming the file of a network that has not learned the times at which it
    moves images: the seed model's above t*, an expert's at most t*. All are facts, by file.
    """
    for file, facts in seed_model.items():
        if facts.get("kind") not in KINDS:
            raise ArtifactError(
                f"{file} is not a seed model: its kind must be one of {' '.join(KINDS)}, "
                f"got {shown(facts.get('kind'))}"
            )
        first = learned_from(file, facts, process)
        last = _converted(_time(file, facts, "t_max", 1.0), facts["schedule"], process)
        if first > above * (1 + 1e-6) or last < 1 - 1e-6:
            raise ArtifactError(
                f"{file} must have learned all t above {above:g} to be the seed model of this "
                f"bundle, it has learned t in [{first:g}, {last:g}]"
            )
    for file, facts in experts.items():
        last = _time(file, facts, "t_max", 1.0)
        wanted = _converted(above, process, facts["schedule"])
        if last < wanted * (1 - 1e-6):
            raise ArtifactError(
                f"{file} has learned t up to {last:g} alone, and must move images from {wanted:g} "
                "on in this bundle: give it a seed model (seed_model.above)"
            )


def learned_from(file: Path, facts: Mapping[str, Any], process: Mapping[str, Any]) -> float:
    """The first time that a network has learned, as that of equal s/a on `process`. Raises
    `ArtifactError` naming the file.
    """
    return _converted(_time(file, facts, "t_min", 0.0), facts["schedule"], process)


def _time(file: Path, facts: Mapping[str, Any], key: str, usual: float) -> float:
    """A time in the config of an artifact."""
    config = facts.get("config")
    value = config.get(key) if isinstance(config, dict) else None
    if value is None:
        return usual
    if not isinstance(value, int | float):
        raise ArtifactError(f"{file} is damaged: config.{key} must be a number, got {shown(value)}")
    return value


def _converted(t: float, outer: Mapping[str, Any], inner: Mapping[str, Any]) -> float:
    """The time on `inner` of the s/a that `outer` has at t; the ends are each other's."""
    if outer == inner or t in (0, 1):
        return t
    wanted = log_sigma(torch.tensor([t], dtype=torch.float64), schedule(**outer))
    return float(time_of(wanted, schedule(**inner)))
