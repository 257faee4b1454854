"""What a variant takes over from the config it changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.ablations.__main__ import _check_features, _copy_same_parts
from benchmarks.ablations.variants import GROUPS, _other_k
from ddm.errors import ConfigError
from train.config import Config, load_config
from train.stages.run import run

PARTS = {"partition", "seed_model", "experts", "router"}


@pytest.mark.parametrize(
    ("word", "copied"),
    [
        ("seed_model.above=0.6", PARTS),
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
    assert parts_copied(base, variant) == copied


@pytest.mark.parametrize("word", ["expert.batch=8", "router.data=pooled"])
def test_a_router_of_the_experts_images_goes_with_them(word: str, tmp_path: Path) -> None:
    base = load_config(None, ["router.data=experts", f"run={tmp_path / 'base'}"])
    variant = load_config(None, ["router.data=experts", word, f"run={tmp_path / 'variant'}"])
    assert "router" not in parts_copied(base, variant)


def parts_copied(base: Config, variant: Config) -> set[str]:
    for part in PARTS:
        (base.folder / part).mkdir(parents=True)
    _copy_same_parts(variant, base)
    return {part.name for part in variant.folder.glob("*")}


def test_other_batches_hold_the_same_number_of_images_also_of_the_seed_model() -> None:
    base = load_config(None, ["seed_model.steps=50", "expert.steps=100", "expert.batch=16"])
    (half, *_) = GROUPS["batch"][1]
    assert half.words(base) == ["expert.batch=8", "expert.steps=200", "seed_model.steps=100"]


def test_more_clusters_than_the_images_have_groups_are_left_out(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    config = small(tmp_path / "run")
    run(config, ["partition"])  # three clusters of ten digits
    assert _other_k(10).words(config) is not None
    assert _other_k(11).words(config) is None


def test_a_classifier_of_clusters_that_change_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.safetensors"
    save_file({"images": torch.zeros(8, 1, 8, 8, dtype=torch.uint8)}, file)
    words = [f"data={{name: tensors, root: {file}}}", "partition={by: kmeans, k: 2}"]
    base = load_config(None, words)
    _check_features(base, {"ema": {"x": ["expert.ema_decay=0.0"]}})
    with pytest.raises(ConfigError, match="table.features must be without classifier .* 'K = 2'"):
        _check_features(base, {"clusters": {"K = 2": ["partition.k=2"]}})
