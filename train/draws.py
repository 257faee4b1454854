"""The pictures that evaluation measures: drawn once, kept in files, each with a record of how it came about."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddm.artifacts import read_json, read_tensors, write_json, write_tensors
from ddm.errors import DdmError
from serve import Model, SampleConfig, load
from serve.pictures import to_uint8
from train.pool import Tell, run_jobs
from train.progress import bar


@dataclass(frozen=True)
class Method:
    """A row of the table: its name, the run it samples and its version, where alpha comes from, who moves the picture."""

    name: str
    run: str
    version: str
    source: str
    policy: str
    control: str = "none"


@dataclass(frozen=True)
class Draw:
    """A cell of the table: a method at a number of steps, n pictures of seed 0; the first `paths` are kept as float."""

    method: Method
    steps: int
    n: int
    paths: int


@dataclass(frozen=True)
class Drawn:
    """What a draw gave."""

    images: Tensor  # uint8 [n, C, H, W]
    ends: Tensor  # [paths, C, H, W], where the first paths ended
    t: Tensor  # [N]
    load: Tensor  # [N, K], the share of the pictures that each expert moved
    certainty: Tensor  # [N], the mean of the largest alpha
    alpha: Tensor  # [N, 8, K], of the first pictures
    chosen: Tensor  # uint8 [N, 8, K]
    calls: float  # expert evaluations a picture


class Draws:
    """A folder of draws, all made with the same settings of the sampler."""

    def __init__(self, folder: Path, settings: SampleConfig, device: str, batch: int) -> None:
        self.folder, self.device, self.batch = folder, device, batch
        kept = ("sampler", "order", "grid", "pull", "t_min", "clip")
        self.settings = {key: getattr(settings, key) for key in kept}

    def make(self, draws: Sequence[Draw], calls_per_step: Sequence[int], workers: int) -> None:
        """Draw what is not there yet, the longest first. Raises `DdmError` naming the draw that failed."""
        todo = [
            (d.n * d.steps * calls, d) for d, calls in zip(draws, calls_per_step, strict=True) if not self._is_made(d)
        ]
        todo.sort(key=lambda job: -job[0])
        if not todo:
            return
        with bar("evaluate: drawing", sum(cost for cost, _ in todo)) as advance:
            results = run_jobs(partial(_work, self), todo, min(workers, len(todo)), advance)
        for (_, draw), result in zip(todo, results, strict=True):
            if isinstance(result, Exception):
                raise DdmError(f"drawing {draw.method.name} at {draw.steps} steps failed: {result}") from result

    def read(self, draw: Draw) -> Drawn:
        """What a draw gave. Raises `ArtifactError` where it is not there."""
        facts = read_json(self._stem(draw).with_suffix(".json"))
        return Drawn(**read_tensors(self._stem(draw).with_suffix(".safetensors")), calls=facts["calls"])

    def draw(self, draw: Draw, cost: int, tell: Tell) -> None:
        """Make one draw and write its files."""
        model = _model(draw.method.run, self.device)
        per_step = cost // (draw.n * draw.steps)
        method = draw.method
        chosen = {"source": method.source, "policy": method.policy, "control": method.control, "steps": draw.steps}
        images, trace = model.sample(
            draw.n, batch=self.batch, trace=True, progress=lambda n: tell(n * per_step), **self.settings, **chosen
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
        write_tensors(self._stem(draw).with_suffix(".safetensors"), tensors)
        write_json(self._stem(draw).with_suffix(".json"), {**self._facts(draw), "calls": trace.calls / draw.n})

    def _stem(self, draw: Draw) -> Path:
        return self.folder / f"{draw.method.name}-{draw.steps}"

    def _facts(self, draw: Draw) -> dict[str, Any]:
        return {"draw": asdict(draw), "settings": self.settings}

    def _is_made(self, draw: Draw) -> bool:
        path = self._stem(draw).with_suffix(".json")
        return path.exists() and {
            key: value for key, value in read_json(path).items() if key != "calls"
        } == self._facts(draw)


def _work(draws: Draws, job: tuple[int, Draw], tell: Tell) -> None:
    draws.draw(job[1], job[0], tell)


@lru_cache(maxsize=2)
def _model(run: str, device: str) -> Model:
    """A run's model, loaded once a process."""
    return load(run, device)
