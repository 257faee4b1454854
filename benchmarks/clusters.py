"""python -m benchmarks.clusters [--images 1000000] [--k 64] [--classes 64] [--files] [--folder runs/clusters] [key=value ...]

Makes up images of 32 x 32 pixels, smooth ones of each class with noise on them, cuts them into clusters by
`python -m train partition` with k-means of two levels, and prints the time, the most memory of the process,
and how well the clusters agree with the classes. Exits with status 2 above 2 GiB. The images are one mapped
file, or, with --files, a PNG file each, which are decoded first. For a million images it takes 6 GB of disk,
or 14, and about ten minutes on two cores, or thirty.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cli import Parser, run
from ddm.artifacts import read_json
from ddm.errors import ConfigError, DdmError, require
from ddm.row_file import Rows, write_streamed
from serve.model.images import encoded
from train.data.mapped import mapped
from train.progress import bar

_SHAPE = (3, 32, 32)
_CHUNK = 10_000
_NOISE = 40  # standard deviation, of 255
_LIMIT_BYTES = 2 * 2**30


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser("clusters", __doc__)
    parser.add_argument("words", nargs="*", help="key=value, as for python -m train")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--classes", type=int, default=64)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/clusters"))
    return run(parser, _measure, words)


def _measure(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    if arguments.images < arguments.classes:
        raise ConfigError(f"--images must be at least --classes, got {arguments.images}")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"images-{arguments.images}-{arguments.classes}.safetensors"
    if not data.exists():
        _make_up(data, arguments.images, arguments.classes)
    name, root = "tensors", data
    if arguments.files:
        name, root = "folder", data.with_suffix("")
        if not root.exists():
            _write_files(data, root)
    settings = [
        f"run={folder / f'run-{name}'}",
        f"data={{name: {name}, root: {root}, size: {_SHAPE[1]}}}",
        f"partition={{by: kmeans, k: {arguments.k}, fine: 1024}}",
    ]
    new = not (folder / f"run-{name}").exists()
    require(new, "--folder", "hold no run of before, which would be up to date", str(folder))
    began = time.monotonic()
    command = [sys.executable, "-m", "train", "partition", *settings, *arguments.words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.absolute() / "cache")}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        status, peak_bytes = pool.submit(_measured, command, environment).result()
    if status != 0:
        raise DdmError(f"the stage partition ended with status {status}")
    found = read_json(folder / f"run-{name}" / "partition" / "quality.json")
    print(
        f"{arguments.images} images in {arguments.k} clusters: {time.monotonic() - began:.0f} s, at most "
        f"{peak_bytes / 2**30:.2f} GiB; sizes {min(found['sizes'])} to {max(found['sizes'])}, silhouette "
        f"{found['silhouette']:.3f}, purity {found['purity']:.3f}, ARI {found['adjusted_rand_index']:.3f}"
    )
    if peak_bytes > _LIMIT_BYTES:
        raise DdmError(f"{peak_bytes} bytes are more than 2 GiB")


def _measured(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """The exit status of a command and its bytes at the peak.

    To be called in a small process: Linux counts, for a command's peak, that of the process it was started from.
    """
    status = subprocess.run(command, env=environment, check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return status, peak * (1 if sys.platform == "darwin" else 1024)


def _make_up(path: Path, count: int, classes: int) -> None:
    """Write the images and their classes, some at a time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(classes, 3, 4, 4, generator=generator) * 255
    smooth = F.interpolate(coarse, _SHAPE[1:], mode="bicubic")
    labels = torch.randint(classes, (count,), generator=generator)

    def noisy() -> Iterator[Tensor]:
        for some in labels.split(_CHUNK):
            noise = _NOISE * torch.randn(len(some), *_SHAPE, generator=generator)
            yield (smooth[some] + noise).clamp(0, 255).to(torch.uint8)

    images = Rows(torch.uint8, [count, *_SHAPE], noisy())
    write_streamed(path, {"images": images, "labels": Rows(torch.int64, [count], [labels])})


def _write_files(data: Path, folder: Path) -> None:
    """Write the images of a file as PNG files, one folder for each class."""
    tensors, release = mapped(data)
    images, labels = tensors["images"], tensors["labels"]
    scratch = folder.with_suffix(".part")
    for label in labels.unique().tolist():
        (scratch / f"{label:03d}").mkdir(parents=True, exist_ok=True)
    with bar("PNG files", len(images)) as advance:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = scratch / f"{label:03d}" / f"{i:07d}.png"
            path.write_bytes(encoded(image))
            advance()
            if i % _CHUNK == 0:
                release()
    scratch.replace(folder)


if __name__ == "__main__":
    sys.exit(main())
