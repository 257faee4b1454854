"""`--dry-run`: what each stage would take, and what would stop it, before an hour is lost."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddm.artifacts import file_of, read_facts
from ddm.errors import ConfigError, DataError, require
from train.clustering import assign, check_left, held_out
from train.config import Config
from train.costs import FLOAT_BYTES, expert_cost, forward_s, router_cost, states
from train.evaluation.rows import ROWS
from train.evaluation_config import EvaluateConfig
from train.kmeans import MEMORY_BYTES
from train.launch import workers_for
from train.run_folder import read_clusters
from train.stages.denoiser import check_networks, seed_stem
from train.stages.expert import expert_stem
from train.stages.run import check_before
from train.time_spent import duration

_CHECKPOINTS = (
    3  # the newest, which an expert keeps, the one before it, and the one that is being written
)


class Data(NamedTuple):
    """The clusters as far as they are known."""

    images: Tensor  # of one of them, uint8 [n, C, H, W]: to measure with
    names: list[str]
    sizes: list[int]  # to learn from
    is_guess: bool  # k-means has not been fitted: the sizes are taken to be equal
    is_cut: bool

    @property
    def shape(self) -> list[int]:
        return list(self.images.shape[1:])

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape)


class Row(NamedTuple):
    """A line of the plan."""

    what: str
    parameters: int = 0
    memory_bytes: float = 0.0
    seconds: float = 0.0
    disk_bytes: float = 0.0


def dry_run(config: Config, stages: Sequence[str]) -> None:
    """Print every stage with parameters, memory, time and disk; nothing is written.

    Raises the `DdmError` of a run that would be refused, and `DataError` or `ConfigError` for clusters that are smaller
    than a batch and for a disk that is too small.
    """
    check_before(config, stages)
    data = _data(config)
    check_networks(config, data.shape)
    _check_sizes(config, data)
    plan = _Plan(config, data)
    rows = {stage: row for stage in stages if (row := getattr(plan, stage)()) is not None}
    _show(rows, data)
    _check_disk(config, sum(row.disk_bytes for row in rows.values()))


def _data(config: Config) -> Data:
    shard = config.expert.shard is not None
    if shard or (config.folder / "partition" / "partition.json").exists():
        folder, cut = read_clusters(config)
        index = 0 if shard else config.expert.index or 0
        require(index < cut.k, "expert.index", f"be in [0, {cut.k - 1}]", index)
        own = cut.cluster(folder, index)
        return Data(own["images"], cut.names, cut.sizes, is_guess=False, is_cut=True)
    whole = config.data.build()
    held = held_out(len(whole.images), config.partition, config.seed)
    k = config.partition.k
    if config.partition.by == "kmeans" and k is not None and k > 1:
        size = int((~held).sum()) // k
        first = whole.images[(~held).nonzero()[: max(1, size), 0]]
        names = [f"cluster {i}" for i in range(k)]
        return Data(first, names, [size] * k, is_guess=True, is_cut=False)
    cluster, names = assign(whole, config.partition, config.seed, held)
    check_left(cluster, names, held, config.partition)
    sizes = torch.bincount(cluster[~held], minlength=len(names)).tolist()
    first = whole.images[(cluster == 0) & ~held]
    return Data(first, names, sizes, is_guess=False, is_cut=False)


def _check_sizes(config: Config, data: Data) -> None:
    batch = config.expert.batch
    for k, (name, size) in enumerate(zip(data.names, data.sizes, strict=True)):
        if size < batch:
            raise DataError(
                f"cluster {k} ({name}) has {size} images to learn from, fewer than expert.batch={batch}: "
                "give fewer clusters (partition.k), another rule (partition.by), or a smaller batch"
            )


class _Plan:
    """A row per stage; None for a stage that has nothing to do in this run."""

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.k, self.total = len(data.sizes), sum(data.sizes)
        cfg = config.expert
        self.cost = expert_cost(config, data.images, self.k)
        self.weights_bytes = self.cost.parameters * FLOAT_BYTES
        self.saved_bytes = self.weights_bytes * states(cfg.ema_decay, len(cfg.ema_also))
        self.forward_s = forward_s(config, data.shape)
        self.router_bytes = 0

    def partition(self) -> Row:
        image_bytes = self.data.image_bytes
        if self.data.is_cut:
            return Row(f"made: {self.total} images in {self.k} clusters")
        fraction = self.config.partition.holdout
        held = round(self.total * fraction / (1 - fraction))
        disk = (self.total + held) * (image_bytes + 16)
        what = f"{self.total} images in {self.k} clusters, {held} held out"
        memory = (self.total + held) * image_bytes
        if (
            self.config.partition.by == "kmeans"
        ):  # pixels or features as float32, as far as they fit
            memory += min(self.total * image_bytes * FLOAT_BYTES, MEMORY_BYTES)
        return Row(what, 0, memory, 0, disk)

    def seed_model(self) -> Row | None:
        steps = self.config.seed_model.steps
        if steps == 0:
            return None
        if file_of(seed_stem(self.config), ".json").exists():
            steps = 0
        return self._on_all([steps])

    def expert(self) -> Row:
        cfg = self.config.expert
        wanted = range(self.k) if cfg.index is None else [cfg.index]
        left = [max(0, cfg.steps - _steps_of(expert_stem(self.config, k))) for k in wanted]
        todo = sum(steps > 0 for steps in left)
        asked = cfg.workers if cfg.index is None else 0
        workers = max(1, workers_for(todo, self.config.device, asked, cfg.devices))
        memory = self.cost.memory_bytes + max(self.data.sizes) * self.data.image_bytes
        seconds = math.ceil(todo / workers) * max(left) * self.cost.step_s
        disk = todo * (self.weights_bytes + self.saved_bytes)
        disk += min(workers, todo) * (_CHECKPOINTS - 1) * self.saved_bytes
        what = f"{todo} of {len(left)}, {workers} at a time, {max(left) or cfg.steps} steps each"
        return Row(what, self.cost.parameters, memory, seconds, disk)

    def router(self) -> Row | None:
        if self.k == 1:
            return None
        cost, seconds = router_cost(self.config, self.data.images, self.data.sizes)
        self.router_bytes = cost.parameters * FLOAT_BYTES
        if file_of(self.config.folder / "router" / "router", ".json").exists():
            return Row("made", cost.parameters)
        cfg = self.config.router
        disk = self.router_bytes * (1 + _CHECKPOINTS * states(cfg.ema_decay))
        return Row(f"{cfg.steps} steps", cost.parameters, cost.memory_bytes, seconds, disk)

    def bundle(self) -> Row:
        whole = self._loaded_bytes
        disk = whole * (1.5 if self.config.bundle.half else 1.0)
        return Row(f"{self.k} experts", 0, self.weights_bytes, 0, disk)

    def monolith(self) -> Row | None:
        asked, steps = self.config.evaluate, self.config.expert.steps
        alike = steps * self.k if asked.monolith_steps is None else asked.monolith_steps
        rows = {"one-model": ("monolith", alike), "one-model-time": ("monolith-time", steps)}
        wanted = [place for row, place in rows.items() if row in asked.methods and place[1] > 0]
        if self.k == 1 or not wanted:
            return None
        folder = self.config.folder
        done = [_steps_of(folder / name / "experts" / "00" / "expert") for name, _ in wanted]
        left = [max(0, count - made) for (_, count), made in zip(wanted, done, strict=True)]
        new = done.count(0)
        return self._on_all(left, new * (self.weights_bytes + self.total * self.data.image_bytes))

    def sample(self) -> Row:
        cfg = self.config.sample
        calls = cfg.n * cfg.steps * (self.k if cfg.policy == "full" else 1)
        disk = 2 * cfg.n * self.data.image_bytes
        what = f"{cfg.n} images in {cfg.steps} steps"
        return Row(what, 0, self._loaded_bytes, calls * self.forward_s, disk)

    def evaluate(self) -> Row:
        calls, images = _evaluation(self.config.evaluate, self.k)
        what = f"{images} images, {calls} network evaluations"
        disk = images * self.data.image_bytes
        return Row(what, 0, self._loaded_bytes, calls * self.forward_s, disk)

    @property
    def _loaded_bytes(self) -> int:
        networks = self.k + (self.config.seed_model.above is not None)
        return networks * self.weights_bytes + self.router_bytes

    def _on_all(self, steps: list[int], more_bytes: int = 0) -> Row:
        """Networks like an expert's, one after another, on the images of all clusters."""
        memory = self.cost.memory_bytes + self.total * self.data.image_bytes
        todo = sum(count > 0 for count in steps)
        disk = todo * (self.weights_bytes + _CHECKPOINTS * self.saved_bytes) + more_bytes
        what = " and ".join(f"{count} steps" if count else "made" for count in steps)
        return Row(what, self.cost.parameters, memory, sum(steps) * self.cost.step_s, disk)


def _steps_of(stem: Path) -> int:
    """The steps of an artifact; 0 if it is not there."""
    return int(read_facts(stem)["steps"]) if file_of(stem, ".json").exists() else 0


def _evaluation(cfg: EvaluateConfig, k: int) -> tuple[int, int]:
    """The network evaluations and the images of an evaluation, about."""
    calls = images = 0
    for method in cfg.methods:
        per_step = k if ROWS[method].policy == "full" and "one-model" not in method else 1
        for steps in cfg.steps_for(method):
            images += cfg.n * cfg.seeds
            calls += cfg.n * cfg.seeds * steps * per_step
        calls += cfg.trajectories * cfg.reference_steps
    samplers = list(cfg.samplers.values()) or [{}]
    each = [
        1 + sum(one.get(key, 1) != 1 for key in ("guidance", "autoguidance")) for one in samplers
    ]
    return calls * sum(each), images * len(each)


def _check_disk(config: Config, needed: float) -> None:
    folder = config.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"run={config.run} needs about {_size(needed)} of disk, {folder} has {_size(free)} free: "
            "give run=FOLDER on another disk",
            "run",
        )


def _show(rows: dict[str, Row], data: Data) -> None:
    table = [("stage", "what", "parameters", "memory", "time", "disk")]
    for stage, row in rows.items():
        parameters = f"{row.parameters / 1e6:.2f}M" if row.parameters else ""
        memory, disk = _size(row.memory_bytes), _size(row.disk_bytes)
        table.append((stage, row.what, parameters, memory, duration(row.seconds), disk))
    seconds = sum(row.seconds for row in rows.values())
    disk_bytes = sum(row.disk_bytes for row in rows.values())
    table.append(("all", "", "", "", duration(seconds), _size(disk_bytes)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        words = [word.ljust(width) for word, width in zip(line, widths, strict=True)]
        print("  ".join(words).rstrip())
    sizes = f"{min(data.sizes)} to {max(data.sizes)} images to learn from"
    guess = ", if k-means cuts them evenly" if data.is_guess else ""
    print(
        f"Clusters have {sizes}{guess}. Memory is that of one process, without the libraries' own. Times are for "
        "this machine, scaled up from a few steps, without start-up."
    )


def _size(count: float) -> str:
    if count == 0:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
