"""`privacy.sigma`: what an expert's artifact says of its cluster, with noise."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ddm.artifacts import read_facts, read_tensors
from ddm.errors import ConfigError
from ddm.gaussian import MOMENTS
from ddm.privacy import gaussian_epsilon
from train.config import Config
from train.stages.expert import expert_stem, train_experts
from train.stages.partition import make_partition

PRIVATE = ("router.data=experts", "privacy.sigma=2")


def test_the_moments_of_an_expert_are_private_and_say_how_much(
    tmp_path: Path, small: Callable[..., Config]
) -> None:
    config = small(tmp_path / "a", *PRIVATE, "expert.index=0", "expert.steps=1")
    make_partition(config)
    train_experts(config)
    stem = expert_stem(config, 0)
    found = read_facts(stem)["privacy"]
    assert found["sigma"] == 2
    assert found["epsilon"] == pytest.approx(gaussian_epsilon(2, 1e-5))
    private = read_tensors(stem.with_suffix(".safetensors"))

    plain = small(tmp_path / "b", "expert.index=0", "expert.steps=1")
    make_partition(plain)
    train_experts(plain)
    other = read_tensors(expert_stem(plain, 0).with_suffix(".safetensors"))
    assert "privacy" not in read_facts(expert_stem(plain, 0))
    for name, tensor in other.items():
        assert tensor.equal(private[name]) == (name not in MOMENTS)


@pytest.mark.parametrize("data", ["pooled", "shards"])
def test_noise_on_moments_is_refused_where_images_leave(
    data: str, tmp_path: Path, small: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=rf"router\.data must be experts .* got '?{data}"):
        small(tmp_path, f"router.data={data}", "privacy.sigma=1")
    with pytest.raises(ConfigError, match=r"seed_model\.data must be given with privacy\.sigma"):
        small(tmp_path, *PRIVATE, "seed_model.steps=5")
    small(tmp_path, *PRIVATE, "seed_model.steps=5", "expert.init=elsewhere")
