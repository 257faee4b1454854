"""Several processes that train one expert."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from ddm.artifacts import read_artifact
from ddm.errors import DdmError
from ddm.partition import Partition
from ddm.training import Batches
from train.config import Config
from train.launch import OnProgress
from train.ranks import run_ranks
from train.stages.run import run

PLAIN = ["expert.unet.dropout=0", "expert.steps=30", "expert.index=1"]


def losses(folder: Path) -> torch.Tensor:
    lines = (folder / "experts" / "01" / "losses.txt").read_text().splitlines()
    return torch.tensor([[float(word) for word in line.split()] for line in lines])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_parts_of_all_ranks_are_the_whole_batch(parts: int) -> None:
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    whole = Batches(images, 12, 7, flip=True)
    rows = torch.arange(12)
    for rank in range(3):
        share = Batches(images, 12, 7, flip=True, parts=parts, rank=rank, ranks=3)
        for part in range(parts):
            own = rows[part * 3 + rank :: 3 * parts]
            assert torch.equal(share.x0(5, part)[0], whole.x0(5)[0][own])
            assert torch.equal(share.times(5, part), whole.times(5)[own])
            assert torch.equal(share.noise(5, part), whole.noise(5)[own])


def test_ranks_have_dropout_masks_of_their_own() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    drawn = []
    for rank in range(2):
        Batches(images, 2, 7, rank=rank, ranks=2).seed_dropout(3)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)


@pytest.mark.usefixtures("forked_workers")
def test_two_ranks_learn_what_one_does(small: Callable[..., Config], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    averages = "expert.ema_also=[0.5]"
    run(small(one, *PLAIN, averages), ["partition", "expert"])
    for steps in (20, 30):  # resumed, with both averages
        words = [*PLAIN, averages, f"expert.steps={steps}", "expert.devices=2"]
        run(small(two, *words), ["partition", "expert"])
    assert losses(one).shape == (30, 2)  # each step once, by rank 0 alone
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-3, atol=0)
    expected, facts = read_artifact(one / "experts" / "01" / "expert")
    found, facts_of_two = read_artifact(two / "experts" / "01" / "expert")
    assert facts_of_two["images_seen"] == facts["images_seen"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.usefixtures("forked_workers")
def test_what_a_rank_raises_is_raised_by_name(small: Callable[..., Config], tmp_path: Path) -> None:
    config = small(tmp_path / "run", *PLAIN, "expert.devices=2")
    run(config, ["partition"])
    Partition.file(tmp_path / "run" / "partition", 1).write_bytes(b"damaged")
    with pytest.raises(DdmError, match=r"expert 01 failed: .*cluster-01.safetensors is damaged"):
        run(config, ["expert"])


def _die_first(folder: Path, on_progress: OnProgress) -> None:
    rank = os.environ["RANK"]
    if rank == "1" and not (folder / rank).exists():
        (folder / rank).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "0":
        time.sleep(1)
    on_progress(rank)


@pytest.mark.usefixtures("forked_workers")
def test_all_ranks_begin_again_when_one_has_died(tmp_path: Path) -> None:
    heard: list[str] = []
    run_ranks(partial(_die_first, tmp_path), 2, 1, 1, heard.append)
    assert heard[-1] == "0"


def _refuse(folder: Path, on_progress: OnProgress) -> None:
    with (folder / os.environ["RANK"]).open("a") as file:
        file.write("begun\n")
    if os.environ["RANK"] == "0":
        raise DdmError("the disk is full")
    time.sleep(600)  # as in a collective operation


@pytest.mark.usefixtures("forked_workers")
def test_an_error_of_the_first_rank_ends_all_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(DdmError, match="the disk is full"):
        run_ranks(partial(_refuse, tmp_path), 2, 1, 3, lambda _: None)
    assert (tmp_path / "0").read_text() == "begun\n"


PARENT = """
import os, sys, time
from functools import partial
from pathlib import Path
from train.ranks import run_ranks

def work(on_progress):
    Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    run_ranks(work, 2, 1, 0, print)
"""


def test_ranks_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    files = [tmp_path / "0", tmp_path / "1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    processes = [Path("/proc", file.read_text()) for file in files]
    for _ in range(400):
        if not any(process.exists() for process in processes):
            return
        time.sleep(0.05)
    raise AssertionError("they are still there")
