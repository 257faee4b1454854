"""What several test files need: a small run, trained once a session, and the real image sets where they are."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.config import Config, default_config, load_config

SMALL = [
    "accelerator=cpu",
    "data.limit=240",
    "partition.k=3",
    "expert.unet={channels: 8, multipliers: [1, 2], blocks: 1, attention: [4], dropout: 0.1}",
    "expert.steps=12",
    "expert.batch=12",
    "expert.warmup_steps=2",
    "expert.checkpoint_every=4",
    "expert.workers=1",
    "router.net={channels: 8, multipliers: [1, 2], blocks: 1, attention: []}",
    "router.steps=10",
    "router.switch_step=4",
    "router.batch=12",
    "router.warmup_steps=2",
    "router.checkpoint_every=3",
    "sample.n=4",
    "sample.steps=3",
    "evaluate={n: 20, steps: [2, 4], trajectories: 4, reference_steps: 8, batch: 20}",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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
def real_data() -> Path:
    """The folder of the real image sets; the test skips where there is none."""
    folder = Path(os.environ.get("DDM_DATA", "data"))
    if not (folder / "cifar-10-batches-py").is_dir() or not (folder / "celeba_hq").is_dir():
        pytest.skip(f"needs CIFAR-10 and CelebA-HQ in {folder} (DDM_DATA)")
    return folder
