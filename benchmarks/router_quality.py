"""How well each router knows the cluster of a noisy image, on held-out images, by band of t.

Trains routers of a config (default: the built-in digits, a fifth of them held out) with and without
the Gaussians' start, at its number of steps and a quarter of it, and on images sampled from the
experts. Prints the cross-entropy of the cluster, and the divergence KL(exact posterior, alpha), in
nats, beside those of the Gaussians alone; mean and standard deviation over seeds of the training.
What is trained stays in RUN-router-quality; the same command goes on from there.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cli import Parser, run
from ddm.bundle import read_artifact
from ddm.device import pick_device
from ddm.errors import require
from ddm.gaussian import Gaussians
from ddm.partition import Partition
from ddm.rng import RngStream, normal, uniform
from ddm.schedules import schedule
from ddm.training import to_float
from router.sources import Alpha
from router.targets import exact_posterior, mirrored
from serve.model.build import build_gaussians, build_router
from train.config import Config, config_file, default_config, load_config
from train.stages.expert import expert_stem
from train.stages.run import run as run_stages

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
DRAWS = 8  # times and noises per image and band
MEASURES = ("Cross-entropy", "KL to the exact posterior")
VARIANTS = {
    "network alone": ["router.gaussians=false"],
    "Gaussian start": ["router.gaussians=true"],
    "Gaussian start, of experts": ["router.gaussians=true", "router.data=experts"],
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("router_quality", __doc__)
    help_text = "as for python -m train"
    parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=help_text)
    parser.add_argument("--seeds", type=int, default=3, help="of the training; default 3")
    return run(parser, _measure, words)


@dataclass(frozen=True)
class Examples:
    """Noisy held-out images of one band of t, the cluster of each, and the exact posterior."""

    x: Tensor
    t: Tensor
    cluster: Tensor
    exact: Tensor

    def losses(self, alpha: Alpha) -> Tensor:
        """Both measures in nats, `[2]`."""
        log_alpha = alpha(self.x, self.t).clamp_min(1e-30).log()
        divergence = F.kl_div(log_alpha, self.exact, reduction="batchmean")
        return torch.stack([F.nll_loss(log_alpha, self.cluster), divergence])


def _measure(arguments: argparse.Namespace) -> None:
    require(arguments.seeds >= 1, "--seeds", "be at least 1", arguments.seeds)
    logging.getLogger().setLevel(logging.WARNING)
    path, words = default_config(), list(arguments.words)
    if words and "=" not in words[0]:
        name = words.pop(0)
        path = config_file(name) or Path(name)
    words = ["partition.holdout=0.2", *words]
    base = load_config(path, words)
    found: dict[tuple[str, str], list[Tensor]] = {}
    for seed in range(arguments.seeds):
        folder = f"{base.run}-router-quality/seed-{seed}"
        of_seed = load_config(path, [*words, f"run={folder}", f"seed={seed}"])
        run_stages(of_seed, ["partition", "expert"])
        examples, gaussians = _examples(of_seed)
        pi = Partition.read(of_seed.folder / "partition").pi

        def by_gaussians(
            x: Tensor, t: Tensor, of: Gaussians = gaussians, pi: Tensor = pi
        ) -> Tensor:
            return of.posterior(x, t, pi)

        found.setdefault(("Gaussians alone", "0"), []).append(_losses(by_gaussians, examples))
        for (name, changes), share in product(VARIANTS.items(), (1, 4)):
            steps, switch = base.router.steps // share, base.router.switch_step // share
            variant = f"{folder}/{name.replace(',', '').replace(' ', '-')}-{steps}"
            sizes = [f"router.steps={steps}", f"router.switch_step={switch}"]
            given = [*words, f"seed={seed}", *changes, *sizes, f"run={variant}"]
            alpha = _router(load_config(path, given), of_seed, gaussians)
            found.setdefault((name, str(steps)), []).append(_losses(alpha, examples))
    _print({key: torch.stack(losses) for key, losses in found.items()})


def _router(config: Config, of_seed: Config, gaussians: Gaussians) -> Alpha:
    """The posterior net of a config, trained on the partition and the experts of its seed."""
    config.folder.mkdir(parents=True, exist_ok=True)
    for name in ("partition", "experts"):
        link = config.folder / name
        if not link.exists():
            link.symlink_to((of_seed.folder / name).resolve())
    run_stages(config, ["router"])
    cut = Partition.read(config.folder / "partition")
    belongs = {"mixture": cut.mixture.hash}
    artifact = read_artifact(config.folder / "router" / "router", None, belongs)
    device = torch.device(pick_device(config.accelerator))
    return build_router(artifact, cut.shape, cut.pi, gaussians, device)[0]


def _examples(config: Config) -> tuple[list[Examples], Gaussians]:
    """Examples for each band, and the Gaussians of the experts' artifacts."""
    folder, process = config.folder / "partition", schedule(**config.schedule)
    cut = Partition.read(folder)
    whole, held = cut.all(folder), cut.holdout(folder)
    images, labels = whole["images"], whole["cluster"]
    if config.data.flip:
        images, labels = mirrored(images, labels)
    x0, cluster = to_float(held["images"]).repeat(DRAWS, 1, 1, 1), held["cluster"].repeat(DRAWS)
    examples = []
    for band, (low, high) in enumerate(pairwise(TIMES)):
        index = torch.arange(len(x0))
        t = low + (high - low) * uniform(0, RngStream.TIME, index, band)[:, 0].float()
        eps = normal(0, RngStream.NOISE, index, band, x0.shape[1:])
        a, s, _, _ = process(t).broadcast_to(x0)
        x = a * x0 + s * eps
        exact = exact_posterior(x, t, images, labels, process, cut.k)
        examples.append(Examples(x, t, cluster, exact))
    artifacts = [read_artifact(expert_stem(config, k), None, {}) for k in range(cut.k)]
    return examples, build_gaussians(artifacts, process, torch.device("cpu"))


@torch.inference_mode()
def _losses(alpha: Alpha, examples: Sequence[Examples]) -> Tensor:
    """Both measures of each band, `[bands, 2]`."""
    return torch.stack([each.losses(alpha) for each in examples])


def _print(found: dict[tuple[str, str], Tensor]) -> None:
    bands = [f"t {low:g} to {high:g}" for low, high in pairwise(TIMES)]
    for i, measure in enumerate(MEASURES):
        title = f"{measure} on held-out images, nats"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("router", "steps", *bands):
            table.add_column(name, justify="left" if name == "router" else "right")
        for (name, steps), losses in found.items():
            of_measure = losses[:, :, i]
            spread = of_measure.std(dim=0) if len(losses) > 1 else torch.zeros(len(bands))
            cells = zip(of_measure.mean(dim=0), spread, strict=True)
            table.add_row(name, steps, *(f"{mean:.3f} ± {dev:.3f}" for mean, dev in cells))
        Console(width=130).print(table)


if __name__ == "__main__":
    sys.exit(main())
