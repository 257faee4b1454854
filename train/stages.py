"""The stages of a run, in order. Each one is skipped where what it makes is there, made of the same."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ddm.artifacts import digest, read_json, sha256, write_artifact, write_json, write_tensors
from ddm.bundle import MANIFEST, read_bundle, write_bundle, write_half
from ddm.errors import ArtifactError
from ddm.learning import Batches
from ddm.partition import Partition
from ddm.randomness import Use, seed_of
from ddm.schedules import schedule
from router.learning import PosteriorLearning, RouterLearning
from router.networks import DerivativeNet
from serve import SampleConfig, load
from serve.pictures import contact_sheet, to_uint8, write_png
from train.config import STAGES, Config, EvaluateConfig, claim, plain
from train.evaluate import evaluate
from train.expert_stage import expert_stem, fitted_facts, train_experts
from train.fit import fit
from train.partitioning import assign
from train.progress import bar

log = logging.getLogger(__name__)


def run(config: Config, stages: Sequence[str] = STAGES) -> None:
    """Run the stages in their order. Raises a `DdmError` that says what to mend."""
    if "evaluate" in stages:
        config.evaluate.check_files("evaluate")
        config.samplers(config.evaluate, "evaluate")
    claim(config)
    does: dict[str, Callable[[Config], None]] = {
        "partition": partition,
        "expert": train_experts,
        "router": router,
        "bundle": bundle,
        "sample": sample,
        "evaluate": evaluate_run,
    }
    for stage in STAGES:
        if stage in stages:
            does[stage](config)


def partition(config: Config) -> None:
    """Cut the data set into clusters, and draw a sheet of each cluster's pictures."""
    began = time.monotonic()
    folder = config.folder / "partition"
    pictures = config.data.build()
    key = digest([plain(config.partition), config.seed, pictures.hash])
    if (folder / "partition.json").exists():
        if read_json(folder / "stage.json").get("key") != key:
            raise ArtifactError(
                f"{folder} was cut from other pictures than data.root={config.data.root} holds now: give run=FOLDER for a new run"
            )
        log.info("partition  up to date")
        return
    cluster, names = assign(pictures, config.partition, config.seed)
    write_json(folder / "stage.json", {"key": key})
    cut = Partition.write(folder, pictures.images, cluster, names, pictures.labels)
    rows = [cut.cluster(folder, k)["images"][:16] for k in range(cut.k)]
    write_png(folder / "clusters.png", contact_sheet(rows))
    sizes = ", ".join(f"{name} {size}" for name, size in zip(cut.names, cut.sizes, strict=True))
    log.info(
        "partition  %d pictures in %d clusters (%s) in %.1f s", sum(cut.sizes), cut.k, sizes, time.monotonic() - began
    )


def router(config: Config) -> None:
    """Train the posterior net, then posterior and derivative nets together, and write both as one artifact."""
    folder = config.folder / "partition"
    cut = Partition.read(folder)
    if cut.k == 1:
        log.info("router     one cluster needs none")
        return
    stem = config.folder / "router" / "router"
    own = config.router
    key = digest([plain(own), config.schedule, config.seed, config.data.flip, cut.hash])
    if stem.with_suffix(".json").exists():
        if read_json(stem.with_suffix(".json")).get("key") != key:
            raise ArtifactError(
                f"{stem}.json was made by another config or from other pictures: move {stem.parent} away to train it anew"
            )
        log.info("router     up to date")
        return
    began = time.monotonic()
    whole = cut.all(folder)
    images, cluster = whole["images"], whole["cluster"]
    if config.data.flip:  # the experts' pictures are mirrored at random, so the mixture is over both
        images, cluster = torch.cat([images, images.flip(3)]), cluster.repeat(2)
    seed = seed_of(config.seed, Use.ROUTER, 0)
    torch.manual_seed(seed)
    posterior, _ = own.build(cut.shape, cut.pi, schedule(**config.schedule))
    batches = Batches(images, own.batch, seed)
    with bar("router", own.steps) as advance:
        done = 0

        def report(step: int, loss: float, base: int = 0) -> None:
            nonlocal done
            advance(base + step - done)
            done = base + step

        first = PosteriorLearning(posterior, batches, cluster, own)
        stage1 = stem.parent / "stage-1"
        fit(first, own.switch_step, own, stage1, config.accelerator, report)
        derivative = DerivativeNet.from_trunk(posterior.scorer, own.bands)
        second = RouterLearning(posterior, derivative, batches, cluster, own)
        stage2 = stem.parent / "stage-2"
        fit(
            second,
            own.steps - own.switch_step,
            own,
            stage2,
            config.accelerator,
            lambda s, loss: report(s, loss, own.switch_step),
        )
    facts = {"kind": "router", "key": key, **fitted_facts(own, config, cut)}
    write_artifact(stem, torch.nn.ModuleDict({"posterior": posterior, "derivative": derivative}).state_dict(), facts)
    for stage in (stage1, stage2):
        (stage / "resume.ckpt").unlink(missing_ok=True)
    log.info("router     trained in %.0f s", time.monotonic() - began)


def bundle(config: Config) -> None:
    """Put partition, experts and router together as one folder that can be carried away and served."""
    cut = Partition.read(config.folder / "partition")
    experts = [expert_stem(config, k) for k in range(cut.k)]
    for k, stem in enumerate(experts):
        if not stem.with_suffix(".json").exists():
            raise ArtifactError(f"{stem}.json is missing: train it with the stage 'expert' and expert.index={k}")
    router_stem = config.folder / "router" / "router"
    has_router = cut.k > 1 and router_stem.with_suffix(".json").exists()
    stems = experts + ([router_stem] if has_router else [])
    folder, half = config.folder / "bundle", config.folder / "bundle-half"
    listed = read_json(folder / MANIFEST).get("artifacts", {}) if (folder / MANIFEST).exists() else {}
    if sorted(listed.values()) == sorted(sha256(stem.with_suffix(".json")) for stem in stems):
        log.info("bundle     up to date")
    else:
        write_bundle(folder, cut, experts, router_stem if has_router else None)
        made = f"{cut.k} experts{' and their router' if has_router else ' without a router'}"
        log.info("bundle     %s, version %s", made, read_bundle(folder).version[:12])
    if config.bundle.half and not (
        half.exists() and read_json(half / "expert-00.json").get("half_of") == sha256(folder / MANIFEST)
    ):
        write_half(folder, half)
        size = sum(file.stat().st_size for file in half.iterdir()) / 1e6
        log.info("bundle     in half precision, %.1f MB: %s", size, half)


def sample(config: Config) -> None:
    """Draw `sample.n` pictures into `samples/`: a sheet, the pictures as numbers, and a record of how they came about."""
    own = config.sample
    model = load(config.folder, device=config.device)
    settings = {key: value for key, value in plain(own).items() if key not in ("n", "seed")}
    record = {"version": model.version, "n": own.n, "seed": own.seed, **settings}
    named, usual = ("source", "policy", "sampler", "steps"), SampleConfig()
    others = [f"{key}={value}" for key, value in settings.items() if key not in named and value != getattr(usual, key)]
    stem = config.folder / "samples" / "-".join([*(str(settings[key]) for key in named), *others, f"seed{own.seed}"])
    if stem.with_suffix(".json").exists() and read_json(stem.with_suffix(".json")) == record:
        log.info("sample     up to date: %s.png", stem)
        return
    with bar("sample", own.n * own.steps) as advance:
        images = model.sample(own.n, seed=own.seed, progress=advance, **settings)
    side = max(1, round(own.n**0.5))
    write_png(stem.with_suffix(".png"), contact_sheet(to_uint8(images).split(side)))
    write_tensors(stem.with_suffix(".safetensors"), {"images": to_uint8(images)})
    write_json(stem.with_suffix(".json"), record)
    log.info("sample     %d pictures: %s.png", own.n, stem)


def evaluate_run(config: Config) -> None:
    """Train the monolith that the table compares with, if it is wanted, then measure."""
    evaluate(config, train_monolith(config, config.evaluate))


def train_monolith(config: Config, own: EvaluateConfig) -> Config | None:
    """The run with `partition.k=1` of the row DDIM, trained; None where no such row is wanted.

    The same network and, unless `monolith_steps` says otherwise, as many pictures seen as all experts together.
    """
    cut = Partition.read(config.folder / "partition")
    steps = config.expert.steps * cut.k if own.monolith_steps is None else own.monolith_steps
    if steps == 0 or cut.k == 1 or "DDIM" not in own.methods:
        return None
    monolith = replace(
        config,
        run=str(config.folder / "monolith"),
        partition=replace(config.partition, k=1),
        expert=replace(config.expert, steps=steps, index=None),
    )
    log.info("monolith   one model on all pictures, in %s", monolith.folder)
    run(monolith, ("partition", "expert", "bundle"))
    return monolith
