"""What is changed: groups of variants of a config."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ddm.partition import Partition
from ddm.schedules import schedule
from ddm.training import Batches
from router.targets import exact_posterior_rate, mirrored
from train.config import Config

Words = Callable[[Config], Sequence[str] | None]


@dataclass(frozen=True)
class Variant:
    """A row: the change as `key=value` words, which may depend on the config that is changed; None
    if it does not apply to the config.
    """

    name: str
    words: Words


def _set(*words: str) -> Variant:
    return Variant(" ".join(words), lambda _: words)


def _times(key: str, factor: float) -> Variant:
    def words(config: Config) -> list[str]:
        section, *path = key.split(".")
        value = getattr(config, section)
        for name in path:
            value = getattr(value, name)
        return [f"{key}={round(value * factor)}"]

    return Variant(f"{key} × {factor:g}", words)


def _ema(power: float) -> Variant:
    """An EMA over `power` times as many steps, and no other average."""
    return Variant(
        f"an EMA over {power:g} times as many steps",
        lambda config: [
            f"expert.ema_decay={1 - (1 - config.expert.ema_decay) / power:.6g}",
            "expert.ema_also=[]",
        ],
    )


_NO_EMA = Variant("expert.ema_decay=0.0", lambda _: ["expert.ema_decay=0.0", "expert.ema_also=[]"])


def _batches(factor: float) -> Variant:
    """The same number of images in batches of another size."""

    def words(config: Config) -> list[str]:
        steps = {"expert": config.expert.steps, "seed_model": config.seed_model.steps}
        more = [f"{of}.steps={round(count / factor)}" for of, count in steps.items() if count > 0]
        return [f"expert.batch={round(config.expert.batch * factor)}", *more]

    return Variant(f"expert.batch × {factor:g}, steps × {1 / factor:g}", words)


def _seeded(name: str, *more: str) -> Variant:
    return Variant(name, lambda config: [*_half_in_a_seed_model(config), *more])


def _half_in_a_seed_model(config: Config) -> list[str]:
    steps = _expert_steps(config) // 2
    seed_steps = steps * _clusters(config)
    return [f"seed_model.steps={seed_steps}", "seed_model.above=null", f"expert.steps={steps}"]


def _none_in_a_seed_model(config: Config) -> list[str]:
    steps = _expert_steps(config)
    return ["seed_model.steps=0", "seed_model.above=null", f"expert.steps={steps}"]


def _half_on_faces(config: Config) -> list[str] | None:
    root = config.data.root
    if config.data.name != "cifar10" or not (Path(root) / "celeba_hq").exists():
        return None
    faces = json.dumps({"name": "celeba_hq", "root": root, "size": 32, "flip": config.data.flip})
    return [*_half_in_a_seed_model(config), f"seed_model.data={faces}"]


def _expert_steps(config: Config) -> int:
    """Steps per expert at equal total compute without a seed model."""
    return config.expert.steps + config.seed_model.steps // _clusters(config)


def _clusters(config: Config) -> int:
    return Partition.read(config.folder / "partition").k


def _groups(config: Config) -> int:
    """The classes, or combinations of attributes, that the clusters hold."""
    names = Partition.read(config.folder / "partition").names
    return sum(len(name.split(" + ")) for name in names)


def _other_k(k: int) -> Variant:
    """Another number of clusters; all experts together see the same number of images."""

    def words(config: Config) -> list[str] | None:
        if config.partition.by != "kmeans" and k > _groups(config):
            return None
        steps = config.expert.steps * _clusters(config) // k
        return [f"partition.k={k}", f"expert.steps={steps}"]

    return Variant(f"K = {k}", words)


@torch.inference_mode()
def energy_bands(config: Config, images: int = 256, times: int = 64) -> list[float]:
    """The two times that divide `E |d alpha/dt|^2` over [t_min, 1] into thirds, measured on the
    training set.
    """
    cut = Partition.read(config.folder / "partition")
    whole = cut.all(config.folder / "partition")
    known = whole["images"], whole["cluster"]
    if config.data.flip:
        known = mirrored(*known)
    data = (*known, schedule(**config.schedule), cut.k)
    batches = Batches(known[0], images, 0)
    x0, _place = batches.x0(0)
    low = config.router.t_min
    at = low + (1 - low) * (torch.arange(times, dtype=torch.float64) + 0.5) / times
    energy = []
    for step, t in enumerate(at):
        _, rate = exact_posterior_rate(x0, batches.noise(step), t, *data)
        energy.append(rate.square().sum(dim=1).mean())
    total = torch.stack(energy).double().cumsum(dim=0)
    return [float(at[(total >= total[-1] * part).nonzero()[0, 0]]) for part in (1 / 3, 2 / 3)]


def _bands(config: Config) -> list[str]:
    edges = ",".join(f"{t:.3f}" for t in energy_bands(config))
    return [f"router.bands=[{edges}]"]


_GRIDS = ("uniform_t", "uniform_log_snr", "quadratic")
GROUPS: dict[str, tuple[str, list[Variant]]] = {
    "chance": ("Chance: the same config with another seed", [_set("seed=1")]),
    "parameterization": (
        "What the network predicts",
        [_set("expert.parameterization=raw"), _set("expert.parameterization=preconditioned")],
    ),
    "loss": (
        "The weight of the loss over t",
        [_set(f"expert.loss_weight={kind}") for kind in ("constant", "snr", "min_snr")],
    ),
    "times": (
        "The distribution of training times",
        [_set(f"expert.times={kind}") for kind in ("uniform", "uniform_log_snr", "logit_normal")],
    ),
    "batch": ("The same number of images in smaller batches", [_batches(1 / 2), _batches(1 / 4)]),
    "ema": ("The EMA of the weights", [_NO_EMA, _ema(4)]),
    "flips": (
        "Mirrored images",
        [Variant("data.flip inverted", lambda config: [f"data.flip={not config.data.flip}"])],
    ),
    "seed": (
        "A seed model of half of the compute; at high noise, too; and experts of the rest alone",
        [
            _seeded("half of the steps in a seed model"),
            *(
                _seeded(" ".join(more), *more)
                for more in (
                    ("seed_model.above=0.6",),
                    ("seed_model.above=0.6", "expert.t_max=0.6"),
                    ("seed_model.above=0.3", "expert.t_max=0.3"),
                )
            ),
        ],
    ),
    "images of the seed model": (
        "What a seed model of half of the compute has seen",
        [
            _seeded("the images of all clusters"),
            Variant("other images: faces", _half_on_faces),
            _seeded("noisy ones alone", "seed_model.t_min=0.6"),
            _seeded(
                "noisy ones alone; it moves images at these t, and experts learn the others",
                "seed_model.t_min=0.6",
                "seed_model.above=0.6",
                "expert.t_max=0.6",
            ),
            Variant("no seed model", _none_in_a_seed_model),
        ],
    ),
    "dropout": ("Dropout", [_set("expert.unet.dropout=0.0"), _set("expert.unet.dropout=0.1")]),
    "clusters": (
        "Clusters",
        [
            Variant(
                "by k-means",
                lambda config: ["partition.by=kmeans", f"partition.k={_clusters(config)}"],
            ),
            _other_k(2),
            _other_k(10),
        ],
    ),
    "targets": (
        "The targets of the posterior net",
        [_set("router.posterior_weight=0.0"), _set("router.label_weight=0.0")],
    ),
    "router": (
        "The size of the router",
        [_times("router.net.channels", 0.5), _times("router.net.channels", 2)],
    ),
    "bands": (
        "The edges of the derivative nets' bands",
        [Variant("a third of the energy of d alpha/dt in each", _bands)],
    ),
    "temperature": (
        "The temperature of alpha",
        [_set(f"sample.temperature={value}") for value in (0.5, 0.8, 1.25)],
    ),
    "source": (
        "Where alpha comes from",
        [_set(f"sample.source={name}") for name in ("posterior", "analytic", "prior")],
    ),
    "sampler": (
        "Sampler and grid",
        [
            _set(f"sample.sampler={name}", f"sample.grid={grid}")
            for name, grid in product(("ddim", "dpmpp_2m", "unipc"), _GRIDS)
        ],
    ),
}
