"""A router that starts from one of other clusters."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddm.bundle import Artifact
from router.networks import DerivativeNet, PosteriorNet

log = logging.getLogger(__name__)


def start_from(
    posterior: PosteriorNet,
    derivative: DerivativeNet,
    old: Artifact,
    old_names: Sequence[str],
    names: Sequence[str],
) -> bool:
    """Give fresh nets the weights of an old router whose outputs were the clusters `old_names`.

    A cluster that stays keeps its output; a new one gets the mean of the old ones, so that at first its Gaussian alone
    tells it from them. pi stays as it is in the nets. Returns whether the networks are alike; others stay fresh.
    """
    both = nn.ModuleDict({"posterior": posterior, "derivative": derivative})
    fresh = both.state_dict()
    found = {
        name: _rows(tensor, old_names, names) if ".head." in name else tensor
        for name, tensor in old.tensors.items()
    }
    found["posterior.log_pi"] = fresh["posterior.log_pi"]
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if shapes != {name: tensor.shape for name, tensor in fresh.items()}:
        log.warning(
            "router     %s is another network: the router is trained from scratch", old.stem
        )
        return False
    both.load_state_dict(found)
    return True


def _rows(head: Tensor, old: Sequence[str], new: Sequence[str]) -> Tensor:
    """The rows of an output layer `[K, ...]` for other clusters."""
    mean = head.mean(dim=0)
    return torch.stack([head[old.index(name)] if name in old else mean for name in new])
