"""`grow`, `retrain`, `remove` and `reroute`: a bundle whose experts change one at a time.

The files of the other experts stay as they are, the mixture weights follow, and `source=gaussian` routes at once. A router
that was trained for other clusters stays in the bundle as the one that `reroute` starts from.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ddm.artifacts import digest, file_of, sha256
from ddm.bundle import Artifact, Bundle, expert_number, read_bundle, restore_bundle
from ddm.bundle_history import read_history
from ddm.bundle_writing import Parts, mixture_of, write_bundle, write_half
from ddm.conversion import check_conversion
from ddm.errors import ArtifactError, ConfigError, require
from ddm.mixture import Mixture
from ddm.partition import Partition
from ddm.schedules import schedule
from train.config import Config, SeedModelConfig
from train.model_card import write_card, write_cards
from train.run_folder import claim, read_clusters
from train.stages.bundle import is_half_of
from train.stages.denoiser import artifact_stem, initial
from train.stages.expert import expert_stem, train_experts
from train.stages.router import make_router
from train.stages.router_data import data_of

log = logging.getLogger(__name__)


def grow(config: Config) -> None:
    """Add an expert: `update.expert`, or one that is trained here from `expert.shard`."""
    bundle = _bundle(config)
    _check_weight(config, bundle)
    old = bundle.mixture
    stem = _given_expert(config, bundle, old)
    added = _mixture(config, stem)
    name, cluster = added.names[0], added.clusters[0]
    if name in old.names:
        here = bundle.experts[old.names.index(name)]
        if sha256(here.json) == sha256(file_of(stem, ".json")):
            log.info("grow       up to date: %s is in the bundle", name)
            _write_copies(config)
            return
    _check_new(name, cluster, old)
    mixture = replace(
        old,
        names=[*old.names, name],
        weights=[*old.weights, *added.weights],
        clusters=[*old.clusters, *added.clusters],
    )
    experts = {**Parts.of(bundle).experts, _free_name(config, bundle): stem}
    _write(config, bundle, mixture, experts, f"grow {name}")


def retrain(config: Config) -> None:
    """Put another expert in the place of one, `update.cluster`: given or trained as in `grow`."""
    bundle = _bundle(config)
    k = _place(config, bundle)
    _check_weight(config, bundle)
    mixture = bundle.mixture
    others = _without(mixture, k)
    stem = _given_expert(config, bundle, others)
    other = _mixture(config, stem)
    _check_new(mixture.names[k], other.clusters[0], others)
    weights, clusters = [*mixture.weights], [*mixture.clusters]
    weights[k], clusters[k] = other.weights[0], other.clusters[0]
    experts = {**Parts.of(bundle).experts, bundle.files[k]: stem}
    mixture = replace(mixture, weights=weights, clusters=clusters)
    _write(config, bundle, mixture, experts, f"retrain {mixture.names[k]}")


def remove(config: Config) -> None:
    """Take an expert, `update.cluster`, out of the bundle."""
    bundle = _bundle(config)
    k, left = _place(config, bundle), bundle.mixture
    if left.k == 1:
        raise ConfigError(
            f"update.cluster must leave an expert in the bundle, {left.names[0]!r} is its last",
            "update.cluster",
        )
    experts = Parts.of(bundle).experts
    del experts[bundle.files[k]]
    _write(config, bundle, _without(left, k), experts, f"remove {left.names[k]}")


def reroute(config: Config) -> None:
    """Train the router of the bundle as it is now, from the weights of the one before if there was one."""
    bundle = _bundle(config)
    if bundle.mixture.k == 1 or bundle.router is not None:
        why = "one expert needs no router" if bundle.router is None else "the router fits"
        log.info("reroute    up to date: %s", why)
        return
    require(
        config.schedule == bundle.schedule,
        "schedule",
        f"be {bundle.schedule}, the bundle's",
        config.schedule,
    )
    start = (bundle.old_router, bundle.old_names) if bundle.old_router else None
    made_of = [expert.facts["sha256"] for expert in bundle.experts]
    if start is not None:
        made_of.append(start[0].facts["sha256"])
    made_of.append(digest([bundle.old_names, config.router.data]))
    stem = config.folder / f"router-{digest([made_of, bundle.mixture.hash])[:12]}" / "router"

    def experts() -> list[Artifact]:
        return bundle.experts

    with ExitStack() as stack:
        images = partial(_images, config, bundle.mixture)
        data = partial(data_of, config, bundle.mixture, experts, images, stack)
        make_router(config, bundle.mixture, stem, made_of, data, start)
    parts = replace(Parts.of(bundle), router=stem, old_router=None)
    _save(config, bundle, parts, "reroute")


def _folder(config: Config) -> Path:
    return Path(config.update.bundle) if config.update.bundle else config.folder / "bundle"


def _bundle(config: Config) -> Bundle:
    folder = _folder(config)
    restore_bundle(folder)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is missing: make it with the stage 'bundle', or give update.bundle=FOLDER"
        )
    return read_bundle(folder)


def _given_expert(config: Config, bundle: Bundle, others: Mixture) -> Path:
    """The artifact to put into the bundle beside these others, trained first if it is given as a shard.

    Raises `ConfigError` before that if what is trained would not fit into the bundle.
    """
    if config.update.expert is not None:
        return artifact_stem(config.update.expert)
    if config.expert.shard is None:
        raise ConfigError(
            "update.expert must be the artifact of an expert, or expert.shard the shard to train it from, got neither",
            "update.expert",
        )
    _, shard = read_clusters(config)
    _check_fits(config, bundle, shard)
    start = initial(config)
    owner = replace(
        config,
        run=str(config.folder / "owners" / shard.hashes[0][:12]),
        seed_model=SeedModelConfig(above=config.seed_model.above),
        expert=replace(config.expert, init=None if start is None else str(start)),
    )
    stem = expert_stem(owner, owner.expert.index or 0)
    if not file_of(stem, ".json").exists():  # else it may be in the bundle already
        _check_new(config.update.cluster or shard.names[0], shard.hashes[0], others)
    train_experts(owner)
    return stem


def _check_fits(config: Config, bundle: Bundle, shard: Partition) -> None:
    """Raise `ConfigError` if an expert trained from a shard would not fit into the bundle."""
    shape = bundle.mixture.shape
    require(shard.shape == shape, "expert.shard", f"hold images of {shape}", shard.shape)
    check_conversion(schedule(**bundle.schedule), schedule(**config.schedule))
    condition = (bundle.experts[0].facts.get("condition") or {}).get("kind", "none")
    rule = f"be {condition}, as of the bundle's experts"
    require(config.expert.condition == condition, "expert.condition", rule, config.expert.condition)
    t_max = config.expert.t_max
    if t_max is not None and config.schedule == bundle.schedule:
        rule = f"be at least {bundle.above:g}, up to where the bundle's experts move images"
        require(t_max >= bundle.above, "expert.t_max", rule, t_max)


def _check_new(name: str, cluster: str, others: Mixture) -> None:
    """Raise `ConfigError` if the others have an expert of this name, or of these images."""
    if name in others.names:
        raise ConfigError(
            f"update.cluster must be a new name, got {name!r}: that cluster is retrained with the command retrain",
            "update.cluster",
        )
    if cluster in others.clusters:
        same = others.names[others.clusters.index(cluster)]
        raise ConfigError(
            f"update.cluster must be of images that no expert has learned, got those of {same!r}: its expert is "
            "replaced with the command retrain",
            "update.cluster",
        )


def _without(mixture: Mixture, k: int) -> Mixture:
    rest = [i for i in range(mixture.k) if i != k]
    return Mixture(
        mixture.shape,
        [mixture.names[i] for i in rest],
        [mixture.weights[i] for i in rest],
        [mixture.clusters[i] for i in rest],
    )


def _mixture(config: Config, stem: Path) -> Mixture:
    """The mixture of the given expert alone: its name and weight here, and its cluster."""
    name, weight = config.update.cluster, config.update.weight
    return mixture_of([stem], [] if name is None else [name], [] if weight is None else [weight])


def _check_weight(config: Config, bundle: Bundle) -> None:
    """Raise `ConfigError` if it is not clear how much another expert would weigh in the bundle."""
    weight = config.update.weight
    rule = "be above 0 and at most 2^40"
    require(weight is None or 0 < weight <= 2**40, "update.weight", rule, weight)
    counts = [expert.facts.get("count") for expert in bundle.experts]
    if weight is None and counts != [*bundle.mixture.weights]:
        raise ConfigError(
            "update.weight must be given for the expert: the weights of the bundle, "
            f"{[*bundle.mixture.weights]}, are not numbers of images",
            "update.weight",
        )


def _place(config: Config, bundle: Bundle) -> int:
    """Where `update.cluster` is among the experts."""
    name, names = config.update.cluster, bundle.mixture.names
    require(name in names, "update.cluster", f"be one of the bundle's clusters, {names}", name)
    return names.index(str(name))


def _free_name(config: Config, bundle: Bundle) -> str:
    """The name of a new expert's files: a number that no expert of this bundle has ever had."""
    used = {*bundle.files}.union(*(event["added"] for event in read_history(_folder(config))))
    return f"expert-{1 + max(map(expert_number, used)):02d}"


def _write(
    config: Config, bundle: Bundle, mixture: Mixture, experts: dict[str, Path], what: str
) -> None:
    """Write the bundle with other experts; a router that does not fit them becomes the old one."""
    parts = replace(Parts.of(bundle), mixture=mixture, experts=experts)
    if bundle.router is not None and mixture.hash != bundle.mixture.hash:
        old = (bundle.router.stem, bundle.mixture.names)
        parts = replace(parts, router=None, old_router=old)
    _save(config, bundle, parts, what)


def _save(config: Config, before: Bundle, parts: Parts, what: str) -> None:
    """Write the parts as the bundle that was read `before`, and its copy in half precision.

    Raises `ArtifactError` if another process has written it since: its change would be lost.
    """
    claim(config)
    folder = _folder(config)
    write_bundle(folder, parts, what, before.version)
    _write_copies(config)
    bundle = read_bundle(folder)
    pi = ", ".join(
        f"{name} {p:.3f}" for name, p in zip(bundle.mixture.names, bundle.mixture.pi, strict=True)
    )
    log.info("%s: pi %s; version %s", what, pi, bundle.version[:12])
    if bundle.seed_model is not None and what != "reroute":
        log.info(
            "its seed model stays as it is: it guides, and at t above %g moves images, by what it has learned",
            bundle.above,
        )
    if bundle.mixture.k > 1 and bundle.router is None:
        log.info(
            "its router does not fit: sample.source=gaussian routes until 'reroute' has trained it on"
        )


def _write_copies(config: Config) -> None:
    """What follows from the bundle: its copy in half precision, if there is one, and the cards."""
    folder, own, half = _folder(config), config.folder / "bundle", config.folder / "bundle-half"
    if half.is_dir() and folder.resolve() == own.resolve():
        if not is_half_of(half, folder):
            write_half(folder, half)
        write_cards(config)
    else:
        write_card(config, folder)


def _images(config: Config, mixture: Mixture) -> Iterator[Tensor]:
    """The images of each cluster, from the run's partition, its shards, or `update.shards`."""
    held: dict[str, tuple[Path, Partition, int]] = {}
    own = [config.folder / "partition", *sorted((config.folder / "shards").glob("*"))]
    for folder in (*own, *map(Path, config.update.shards)):
        if folder in own and not (folder / "partition.json").exists():
            continue
        partition = Partition.read(folder)
        held |= {value: (folder, partition, k) for k, value in enumerate(partition.hashes)}
    for name, cluster in zip(mixture.names, mixture.clusters, strict=True):
        if cluster not in held:
            raise ConfigError(
                f"router.data must be experts where images are elsewhere, got {config.router.data!r}: those of "
                f"{name!r} are not in {config.folder}, nor is its shard in update.shards",
                "router.data",
            )
        folder, partition, k = held[cluster]
        yield partition.cluster(folder, k)["images"]
