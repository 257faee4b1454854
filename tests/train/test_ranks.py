"""Several processes that train one expert."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddm.artifacts import read_artifact
from ddm.errors import DdmError
from ddm.partition import Partition
from ddm.training import Batches
from train.config import Config
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


def test_two_ranks_learn_what_one_does_and_resume(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(small(one, *PLAIN), ["partition", "expert"])
    run(small(two, *PLAIN, "expert.devices=2"), ["partition", "expert"])
    assert losses(one).shape == (30, 2)  # each step once, by rank 0 alone
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-3, atol=0)
    expected, facts = read_artifact(one / "experts" / "01" / "expert")
    found, facts_of_two = read_artifact(two / "experts" / "01" / "expert")
    assert facts_of_two["images_seen"] == facts["images_seen"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3)


def test_what_a_rank_raises_is_raised_by_name(small: Callable[..., Config], tmp_path: Path) -> None:
    config = small(tmp_path / "run", *PLAIN, "expert.devices=2")
    run(config, ["partition"])
    Partition.file(tmp_path / "run" / "partition", 1).write_bytes(b"damaged")
    with pytest.raises(DdmError, match=r"expert 01 failed: .*cluster-01.safetensors is damaged"):
        run(config, ["expert"])
