"""A bundle of nine digits is joined by the tenth, and left by the first.

Ten experts of one digit each are trained alone. Nine are bundled and routed; then the tenth joins and
0 leaves, and each time the images of `source=gaussian`, at once, and of the router, trained on from
the one before, are given to a small classifier. For each state: the fraction of images of the new
digit and of the one that leaves, with what pi says and its standard error, and how sure the
classifier is of its class on average (of real images it has not seen: the last row). The files of
the experts that stay must keep their hashes. Words with = are keys of the config.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cli import Parser, run
from benchmarks.lab.markdown import table
from ddm.artifacts import sha256
from ddm.errors import ArtifactError, ConfigError
from ddm.partition import Partition
from serve import load
from serve.model.images import contact_sheet, to_uint8, write_png
from train.config import Config, default_config, load_config
from train.evaluation.classifier import classifier_network, held_out
from train.evaluation.feature_network import FeatureNetwork
from train.stages.run import run as run_stages

_WORDS = ["partition.k=10", "router.data=experts", "router.samples=4000"]
_NEW, _LEAVING = 9, 0


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("joining", __doc__)
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of the config")
    parser.add_argument("--folder", default="runs/joining", help="default runs/joining")
    parser.add_argument("--n", type=int, default=500, help="images of each state; default 500")
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    if (folder / "mixed").exists():
        raise ConfigError(f"{folder / 'mixed'} is there: move it away, or give --folder FOLDER")

    def config(name: str, *words: str) -> Config:
        given = [*_WORDS, *arguments.words, f"run={folder / name}"]
        return load_config(default_config(), [*given, *words])

    run_stages(config("alone"), ["partition", "expert"])
    experts = [folder / "alone" / "experts" / f"{k:02d}" for k in range(10)]
    states = _States(folder, arguments.n)
    nine = ", ".join(map(str, experts[:_NEW]))
    mixed = config("mixed", f"bundle.experts=[{nine}]")
    run_stages(mixed, ["bundle"])
    states.add(mixed, "nine digits", "gaussian")
    run_stages(mixed, ["reroute"])
    states.add(mixed, "nine digits", "posterior")
    before = _files(mixed)
    run_stages(config("mixed", f"update.expert={experts[_NEW]}"), ["grow"])
    states.add(mixed, "9 has joined", "gaussian")
    run_stages(mixed, ["reroute"])
    states.add(mixed, "9 has joined", "posterior")
    run_stages(config("mixed", f"update.cluster={_LEAVING}"), ["remove"])
    states.add(mixed, "0 has left", "gaussian")
    run_stages(mixed, ["reroute"])
    states.add(mixed, "0 has left", "posterior")
    after = _files(mixed)
    for name, found in before.items():
        if after.get(name, found) != found:
            raise ArtifactError(f"{mixed.folder / 'bundle' / name} has changed")
    states.show()
    kept = len(before.keys() & after.keys())
    print(f"{kept} files of experts that stay are unchanged. Sheets, a row per class: {folder}")


def _files(config: Config) -> dict[str, str]:
    return {path.name: sha256(path) for path in (config.folder / "bundle").glob("expert-*")}


class _States:
    """What was sampled from a bundle, state by state."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self.rows: list[list[str]] = []
        clusters = folder / "alone" / "partition"
        self.real = Partition.read(clusters).all(clusters)
        self.classifier: FeatureNetwork = classifier_network(self.real, 0, "cpu")

    def add(self, config: Config, state: str, source: str) -> None:
        """Sample from the bundle as it is now."""
        model = load(config.folder, device=config.device)
        images = to_uint8(model.sample(self.n, source=source))
        pi = dict(zip(model.names, model.pi.tolist(), strict=True))
        self._row(state, source, images, pi)
        name = f"{state}, {source}".replace(" ", "-").replace(",", "")
        write_png(self.folder / f"{name}.png", contact_sheet(self._by_class(images)))

    def show(self) -> None:
        """Print the table, with real images for comparison."""
        unseen = self.real["images"][held_out(len(self.real["images"]), 0)]
        self._row("real images", "", unseen, {})
        head = ["state", "source", "9s", "pi of 9", "0s", "pi of 0", "how sure"]
        print(table(head, self.rows))

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.classifier(images, lambda _: None).logits
        assert logits is not None
        return torch.as_tensor(logits)

    def _row(self, state: str, source: str, images: Tensor, pi: dict[str, float]) -> None:
        sure, classes = self._logits(images).softmax(dim=1).max(dim=1)
        row = [state, source]
        for digit in (_NEW, _LEAVING):
            fraction = float((classes == digit).double().mean())
            error = (fraction * (1 - fraction) / len(images)) ** 0.5
            row += [f"{fraction:.3f} ± {error:.3f}", f"{pi.get(str(digit), 0):.3f}" if pi else ""]
        self.rows.append([*row, f"{float(sure.mean()):.3f}"])

    def _by_class(self, images: Tensor) -> list[Tensor]:
        """The first ten images of each class that the classifier sees."""
        classes = self._logits(images).argmax(dim=1)
        rows = [images[classes == digit][:10] for digit in range(10)]
        return [row for row in rows if len(row)]


if __name__ == "__main__":
    sys.exit(main())
