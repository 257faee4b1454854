"""What a variant takes over from the config it changes."""

from pathlib import Path

import pytest

from benchmarks.ablations.__main__ import _copy_same_parts
from train.config import load_config


@pytest.mark.parametrize(
    ("word", "copied"),
    [
        ("seed_model.above=0.6", {"partition", "seed_model", "experts", "router"}),
        ("expert.batch=8", {"partition", "router"}),
        ("router.batch=8", {"partition", "seed_model", "experts"}),
        ("seed=1", set()),
    ],
)
def test_a_variant_takes_over_the_parts_that_its_change_leaves_alone(
    word: str, copied: set[str], tmp_path: Path
) -> None:
    base = load_config(None, ["seed_model.steps=5", f"run={tmp_path / 'base'}"])
    variant = load_config(None, ["seed_model.steps=5", word, f"run={tmp_path / 'variant'}"])
    for part in ("partition", "seed_model", "experts", "router"):
        (base.folder / part).mkdir(parents=True)
    _copy_same_parts(variant, base)
    found = {part.name for part in variant.folder.iterdir()} if variant.folder.exists() else set()
    assert found == copied
