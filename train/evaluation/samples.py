"""The samples that evaluation measures: made once, kept in files, each with its record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import read_json, read_tensors, write_json, write_tensors
from ddm.errors import ArtifactError, DdmError
from serve import Model, SampleConfig, load
from serve.model.images import to_uint8
from serve.model.params import over
from train.evaluation.methods import Method
from train.evaluation_config import Precision
from train.launch import OnProgress, run_jobs
from train.progress import bar

# Expert evaluations: for fewer, starting processes costs more time than they save.
_WORTH_A_PROCESS = 100_000
_FOLLOWED = 8  # images whose alpha and experts are kept at every step


@dataclass(frozen=True)
class SampleSpec:
    """A cell of the table at one seed: a method with a sampler at a number of steps, n images.

    `settings` are those of `sample`, complete. The final x of the first `trajectories` images is
    kept as float.
    """

    method: Method
    sampler: str  # its name in the table
    steps: int
    seed: int
    n: int
    trajectories: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What the files of the samples are called."""
        return f"{self.method.name}-{self.sampler}-{self.steps}-seed{self.seed}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of sampling: the sampler's, and above them the method's."""
        return {**over(self.settings, self.method.settings), "steps": self.steps}

    @property
    def facts(self) -> dict[str, Any]:
        """All that the samples depend on, except the precision."""
        return {
            "version": self.method.version,
            "seed": self.seed,
            "n": self.n,
            "trajectories": self.trajectories,
            **self.parameters,
        }


@dataclass(frozen=True)
class SampleSet:
    """Samples, and how they came about: N steps, K experts."""

    images: Tensor  # uint8 [n, C, H, W]
    ends: Tensor  # [trajectories, C, H, W], the final x
    t: Tensor  # [N]
    load: Tensor  # [N, K], the fraction of the images that each expert was evaluated for
    certainty: Tensor  # [N], the mean of the largest alpha
    alpha: Tensor  # [N, 8, K], of the first images
    chosen: Tensor  # uint8 [N, 8, K]
    nfe: float  # expert evaluations per image


class SampleStore:
    """A folder of samples, all made on one device in one precision, in batches of one size."""

    def __init__(self, folder: Path, device: str, precision: Precision, batch: int) -> None:
        self.folder = folder
        self.device = device
        self.precision = precision
        self.batch = batch

    def make(
        self, specs: Sequence[SampleSpec], nfe_per_step: Sequence[float], workers: int
    ) -> None:
        """Sample what is not there yet, the longest first. Raises `DdmError` naming what failed."""
        todo = [
            (round(spec.n * spec.steps * nfe), spec)
            for spec, nfe in zip(specs, nfe_per_step, strict=True)
            if not self._is_made(spec)
        ]
        if not todo:
            return
        todo.sort(key=lambda job: -job[0])
        total = sum(nfe for nfe, _ in todo)
        workers = 0 if total < _WORTH_A_PROCESS else min(workers, len(todo))
        with bar("evaluate: sampling", total) as advance:
            results = run_jobs(partial(_work, self), todo, workers, advance)
        for (_, spec), result in zip(todo, results, strict=True):
            if isinstance(result, Exception):
                raise DdmError(f"sampling {spec.name} failed: {result}") from result

    def read(self, spec: SampleSpec) -> SampleSet:
        """The samples. Raises `ArtifactError` naming a file that is missing or of another kind."""
        record, tensors = self.file(spec, ".json"), self.file(spec, ".safetensors")
        try:
            return SampleSet(**read_tensors(tensors), nfe=read_json(record)["nfe"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{record} and {tensors.name} do not hold samples ({error!r}): move them away"
            ) from error

    def sample(self, spec: SampleSpec, total_nfe: int, on_progress: OnProgress) -> None:
        """Make one set of samples and write its files; progress is reported up to `total_nfe`."""
        model = _model(spec.method.run, self.device, spec.method.version)
        nfe_per_step = total_nfe / (spec.n * spec.steps)
        half = self.precision == "bf16-mixed"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            images, trace = model.sample(
                spec.n,
                seed=spec.seed,
                batch=self.batch,
                trace=True,
                progress=lambda n: on_progress(n * nfe_per_step),
                **spec.parameters,
            )
        tensors = {
            "images": to_uint8(images),
            "ends": images[: spec.trajectories],
            "t": trace.t,
            "load": trace.chosen.float().mean(dim=1),
            "certainty": trace.alpha.amax(dim=2).mean(dim=1),
            "alpha": trace.alpha[:, :_FOLLOWED],
            "chosen": trace.chosen[:, :_FOLLOWED].to(torch.uint8),
        }
        write_tensors(self.file(spec, ".safetensors"), tensors)
        write_json(self.file(spec, ".json"), {**self.facts(spec), "nfe": trace.calls / spec.n})

    def file(self, spec: SampleSpec, suffix: str) -> Path:
        """Where the samples, or their record, are."""
        return self.folder / f"{spec.name}{suffix}"

    def facts(self, spec: SampleSpec) -> dict[str, Any]:
        """All that the samples depend on."""
        return {**spec.facts, "precision": self.precision}

    def _is_made(self, spec: SampleSpec) -> bool:
        record = self.file(spec, ".json")
        if not record.exists() or not self.file(spec, ".safetensors").exists():
            return False
        usual = asdict(SampleConfig())  # a key that is younger than the record has its default
        found, wanted = {**usual, **read_json(record)}, {**usual, **self.facts(spec)}
        found.pop("nfe", None)
        return found == wanted


def _work(store: SampleStore, job: tuple[int, SampleSpec], on_progress: OnProgress) -> None:
    total_nfe, spec = job
    store.sample(spec, total_nfe, on_progress)


@lru_cache(maxsize=2)
def _model(run: str, device: str, version: str) -> Model:
    """A run's model, loaded once per process and `version` of its bundle."""
    return load(run, device)
