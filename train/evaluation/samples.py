"""The images that evaluation measures: drawn once, kept in files, each with a record of how it came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import read_json, read_tensors, write_json, write_tensors
from ddm.errors import DdmError
from serve import Model, load
from serve.model.images import to_uint8
from train.config import Precision
from train.evaluation.methods import Method
from train.launch import OnProgress, run_jobs
from train.progress import bar

_WORTH_A_PROCESS = (
    100_000  # expert evaluations: with fewer, starting processes costs more time than they save
)


@dataclass(frozen=True)
class SampleSpec:
    """A cell of the table at one seed: a method with a sampler at a number of steps, n images.

    `settings` are those of `sample`, all that matter. The ends of the first `paths` are kept as float.
    """

    method: Method
    sampler: str  # its name in the table
    steps: int
    seed: int
    n: int
    paths: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What the draw's files are called."""
        return f"{self.method.name}-{self.sampler}-{self.steps}-seed{self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """All that makes the draw what it is, but for the precision."""
        settings = {**self.settings, **self.method.settings, "steps": self.steps}
        return {
            "version": self.method.version,
            "seed": self.seed,
            "n": self.n,
            "paths": self.paths,
            **settings,
        }


@dataclass(frozen=True)
class SampleSet:
    """What a draw gave."""

    images: Tensor  # uint8 [n, C, H, W]
    ends: Tensor  # [paths, C, H, W], where the first paths ended
    t: Tensor  # [N]
    load: Tensor  # [N, K], the share of the images that each expert moved
    certainty: Tensor  # [N], the mean of the largest alpha
    alpha: Tensor  # [N, 8, K], of the first images
    chosen: Tensor  # uint8 [N, 8, K]
    calls: float  # expert evaluations an image


class SampleStore:
    """A folder of draws, all made on one device in one precision, in batches of so many."""

    def __init__(self, folder: Path, device: str, precision: Precision, batch: int) -> None:
        self.folder, self.device, self.precision, self.batch = folder, device, precision, batch

    def make(
        self, draws: Sequence[SampleSpec], calls_per_step: Sequence[float], workers: int
    ) -> None:
        """Draw what is not there yet, the longest first. Raises `DdmError` naming the draw that failed."""
        todo = [
            (round(d.n * d.steps * calls), d)
            for d, calls in zip(draws, calls_per_step, strict=True)
            if not self._is_made(d)
        ]
        todo.sort(key=lambda job: -job[0])
        if not todo:
            return
        with bar("evaluate: drawing", sum(cost for cost, _ in todo)) as advance:
            few = sum(cost for cost, _ in todo) < _WORTH_A_PROCESS
            results = run_jobs(
                partial(_work, self), todo, 1 if few else min(workers, len(todo)), advance
            )
        for (_, draw), result in zip(todo, results, strict=True):
            if isinstance(result, Exception):
                raise DdmError(f"drawing {draw.name} failed: {result}") from result

    def read(self, draw: SampleSpec) -> SampleSet:
        """What a draw gave. Raises `ArtifactError` where it is not there."""
        facts = read_json(self.stem(draw).with_suffix(".json"))
        return SampleSet(
            **read_tensors(self.stem(draw).with_suffix(".safetensors")), calls=facts["calls"]
        )

    def draw(self, draw: SampleSpec, cost: int, on_progress: OnProgress) -> None:
        """Make one draw and write its files."""
        model = _model(draw.method.run, self.device)
        settings = {**draw.settings, **draw.method.settings, "steps": draw.steps}
        with torch.autocast(
            model.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"
        ):
            images, trace = model.sample(
                draw.n,
                seed=draw.seed,
                batch=self.batch,
                trace=True,
                progress=lambda n: on_progress(n * cost / (draw.n * draw.steps)),
                **settings,
            )
        tensors = {
            "images": to_uint8(images),
            "ends": images[: draw.paths],
            "t": trace.t,
            "load": trace.chosen.float().mean(dim=1),
            "certainty": trace.alpha.amax(dim=2).mean(dim=1),
            "alpha": trace.alpha[:, :8],
            "chosen": trace.chosen[:, :8].to(torch.uint8),
        }
        write_tensors(self.stem(draw).with_suffix(".safetensors"), tensors)
        write_json(
            self.stem(draw).with_suffix(".json"),
            {**self.facts(draw), "calls": trace.calls / draw.n},
        )

    def stem(self, draw: SampleSpec) -> Path:
        """Where a draw's files lie, without their suffixes."""
        return self.folder / draw.name

    def facts(self, draw: SampleSpec) -> dict[str, Any]:
        """All that makes a draw what it is."""
        return {**draw.facts, "precision": self.precision}

    def _is_made(self, draw: SampleSpec) -> bool:
        path = self.stem(draw).with_suffix(".json")
        return path.exists() and {
            k: v for k, v in read_json(path).items() if k != "calls"
        } == self.facts(draw)


def _work(draws: SampleStore, job: tuple[int, SampleSpec], on_progress: OnProgress) -> None:
    draws.draw(job[1], job[0], on_progress)


@lru_cache(maxsize=2)
def _model(run: str, device: str) -> Model:
    """A run's model, loaded once a process."""
    return load(run, device)
