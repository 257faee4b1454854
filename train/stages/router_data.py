"""What the router is trained on: the images of all clusters (`pooled`), the answers of their owners
(`shards`), or images that the experts sample (`experts`).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ddm.bundle import Artifact
from ddm.errors import require
from ddm.gaussian import Gaussians
from ddm.mixture import Mixture
from ddm.rng import RngStream, derive_seed, normal
from ddm.samplers import sample
from ddm.schedules import schedule
from router.owners import Ask, Owner, Owners, here
from router.targets import mirrored
from serve.model.build import build_expert, build_gaussians
from serve.model.images import to_uint8
from train.config import Config
from train.progress import bar

_SAMPLE_STEPS, _SAMPLE_BATCH = 25, 250

# Images, the cluster of each, and the clusters' Gaussians.
Data = tuple[Tensor | Owners, Tensor, Gaussians]


def of_images(config: Config, clusters: Sequence[Tensor]) -> Data:
    """The training data of images of all clusters, uint8 `[n, C, H, W]` each: pooled, or each with
    its owner in this process.
    """
    if config.router.data == "shards":
        process = schedule(**config.schedule)
        owners = [Owner(images, process, config.data.flip) for images in clusters]
        return of_owners(config, here(owners), len(owners))
    images = torch.cat([*clusters])
    sizes = torch.tensor([len(one) for one in clusters])
    cluster = torch.repeat_interleave(torch.arange(len(clusters)), sizes)
    gaussians = Gaussians.of_clusters(clusters, schedule(**config.schedule), config.data.flip)
    if config.data.flip:  # the experts see mirror images, so the mixture is over both
        images, cluster = mirrored(images, cluster)
    return images, cluster, gaussians


@torch.inference_mode()
def sampled(config: Config, mixture: Mixture, artifacts: list[Artifact]) -> Data:
    """The training data of images sampled from the experts in proportion to pi; the Gaussians are those that their
    artifacts carry.

    Raises `ConfigError` for an expert that has not learned to sample alone.
    """
    for artifact in artifacts:
        t_max = artifact.facts.get("config", {}).get("t_max")
        rule = f"be pooled or shards: {artifact.json} has learned no t above {t_max}"
        require(t_max is None, "router.data", rule, "experts")
    process, device = schedule(**config.schedule), torch.device(config.device)
    images, labels = [], []
    with bar("router: sampling", config.router.samples) as advance:
        for k, artifact in enumerate(artifacts):
            expert = build_expert(artifact, process, device)
            seed = derive_seed(config.seed, RngStream.ROUTER, 1 + k)
            count = max(1, round(float(mixture.pi[k]) * config.router.samples))
            for index in torch.arange(count, device=device).split(_SAMPLE_BATCH):
                noise = normal(seed, RngStream.START, index, 0, mixture.shape)
                x = noise * process(torch.tensor(1.0)).s
                made = sample(expert, x, process, "ipndm", _SAMPLE_STEPS, "cosine")
                images.append(to_uint8(made).cpu())
                labels.append(torch.full((len(made),), k))
                advance(len(made))
    gaussians = build_gaussians(artifacts, process, torch.device("cpu"))
    return torch.cat(images), torch.cat(labels), gaussians


def of_owners(config: Config, ask: Ask, k: int) -> Data:
    """The training data of k owners who keep their images."""
    process = schedule(**config.schedule)
    owners = Owners(ask, k, process, config.data.flip)
    means, variances = (torch.stack(part) for part in zip(*owners.moments(), strict=True))
    return owners, owners.cluster, Gaussians(means, variances, process)


def data_of(
    config: Config,
    mixture: Mixture,
    experts: Callable[[], list[Artifact]],
    images: Callable[[], Iterable[Tensor]],
    stack: ExitStack,
) -> Data:
    """What `router.data` asks for, of the experts' artifacts or of each cluster's images, uint8
    `[n, C, H, W]`. Owners on a Ray cluster are reached until `stack` closes.
    """
    if config.router.data == "experts":
        return sampled(config, mixture, experts())
    if config.router.data == "shards" and config.launch.backend == "ray":
        from train.ray_owners import asked  # Ray takes seconds to import

        ask = stack.enter_context(asked(config, mixture.names, mixture.clusters))
        return of_owners(config, ask, mixture.k)
    return of_images(config, [*images()])
