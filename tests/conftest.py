"""Fixtures for several test files: a small trained run, the real image sets, the installed program."""

import importlib.metadata
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start; before torch

import pytest
import torch

from train.config import Config, default_config, load_config
from train.evaluation import classifier
from train.stopping import SIGNALS

PRELOADED = ["train.__main__", "train.stages.run", "sklearn.datasets"]  # by forkservers
SMALL = [
    "accelerator=cpu",
    "data.limit=240",
    "partition.k=3",
    "expert.unet={channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}",
    "expert.steps=12",
    "expert.batch=12",
    "expert.warmup_steps=2",
    "expert.checkpoint_every=4",
    "expert.workers=0",
    "expert.threads=1",
    "router.net={channels: 8, multipliers: [1, 2], blocks: 1, attention: []}",
    "router.steps=10",
    "router.switch_step=4",
    "router.batch=12",
    "router.warmup_steps=2",
    "router.checkpoint_every=3",
    "sample.n=4",
    "sample.steps=3",
    "evaluate={n: 20, seeds: 1, steps: [2, 4], trajectories: 4, reference_steps: 8, batch: 20}",
    "evaluate.methods=[one-model, Naive, MoG-a, MoG-da, balanced, balanced-cv, top-1, full]",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> Iterator[None]:
    """A background job ignores SIGINT, one under `nohup` SIGHUP, and so would its children."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(
                signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            )
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power: what this process writes need not reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts are forked from one that has imported Lightning, which takes
    longer than what they do. `tests/train/test_launch.py` tests how they are started otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()  # not while the program blocks signals, which all forked from it would
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: context)


@pytest.fixture
def classifier_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`classifier_steps(steps)`: the classifiers of a test take so few steps, and no other test gets them."""

    def set_steps(steps: int) -> None:
        monkeypatch.setattr(classifier, "_STEPS", steps)
        monkeypatch.setattr(classifier, "_trained", {})

    return set_steps


@pytest.fixture
def small() -> Callable[..., Config]:
    """`small(run, *overrides)`: the config of a run on the digits that takes seconds."""
    return lambda folder, *overrides: load_config(
        default_config(), [*SMALL, f"run={folder}", *overrides]
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run. Tests that change one copy it first."""
    from train.stages.run import (
        run,  # here, because Lightning is slow to import and most tests do without
    )

    folder = tmp_path_factory.mktemp("runs") / "small"
    run(load_config(default_config(), [*SMALL, f"run={folder}"]))
    return folder


@pytest.fixture(scope="session")
def small_labels_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run whose experts are told the digits; k-means has put some digits into several clusters."""
    from train.stages.run import run

    folder = tmp_path_factory.mktemp("runs") / "labels"
    words = [*SMALL, f"run={folder}", "expert.condition=label", "partition.by=kmeans"]
    stages = ("partition", "expert", "router", "bundle")
    # Many steps, so that the condition shows.
    run(load_config(default_config(), [*words, "expert.steps=60"]), stages)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real image sets; the test skips where there is none."""
    folder = Path(os.environ.get("DDM_DATA", "data"))
    if not (folder / "cifar-10-batches-py").is_dir() or not (folder / "celeba_hq").is_dir():
        pytest.skip(f"needs CIFAR-10 and CelebA-HQ in {folder} (DDM_DATA)")
    return folder


ROOT = Path(__file__).resolve().parents[1]


def build(kind: str, source: Path, folder: Path) -> Path:
    """`sdist` or `wheel` of the project in `source`, by the setuptools of this environment."""
    # It is not imported: that fails after another import of distutils.
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    code = f"import setuptools.build_meta as m; print(m.build_{kind}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of this project."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=untracked)
    return build("sdist", folder / "source", folder)


def untracked(folder: str, names: list[str]) -> set[str]:
    """The names that belong to the checkout and not to the project."""
    outside = {"build", "data", "dist", "runs", "shared"} if Path(folder) == ROOT else set()
    return {
        name
        for name in names
        if name in outside or name.startswith(".") or name.endswith(("__pycache__", ".egg-info"))
    }


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent)


@pytest.fixture(scope="session")
def installed_ddm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `ddm` of a fresh environment that has the wheel, and all else from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "this.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    return folder / "bin" / "ddm"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose files have the names of our packages, and that raise when imported."""
    folder = tmp_path / "hostile"
    (folder / "configs").mkdir(parents=True)
    trap = 'raise SystemExit("hijacked")'
    for name in ("benchmarks", "ddm", "experts", "router", "serve", "train", "configs/__init__"):
        (folder / f"{name}.py").write_text(trap)
    return folder
