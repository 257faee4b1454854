"""A seed model that stays in the bundle for high noise, and experts that learn the rest alone."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddm.bundle import read_bundle
from ddm.errors import ConfigError
from serve import load
from serve.engine.local_expert import local_experts
from serve.engine.scheduler import Engine
from serve.engine.turn import Turn
from serve.model.loading import load_experts
from tests.serve.engine import harness
from train.config import Config
from train.evaluation.methods import methods
from train.evaluation.rows import METHODS
from train.stages.bundle import make_bundle
from train.stages.monolith import monolith_configs
from train.stages.run import run

STAGES = ("partition", "seed_model", "expert", "router", "bundle")
HIGH = ("seed_model.steps=6", "seed_model.above=0.6", "expert.t_max=0.7", "seed_model.t_min=0.5")


@pytest.fixture(scope="module")
def seeded(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose seed model moves the images above 0.6."""
    from tests.conftest import SMALL
    from train.config import default_config, load_config

    folder = tmp_path_factory.mktemp("runs") / "seeded"
    shutil.copytree(small_run / "partition", folder / "partition")
    run(load_config(default_config(), [*SMALL, *HIGH, f"run={folder}"]), STAGES)
    return folder


def test_experts_share_the_seed_model_and_are_it_at_high_noise(seeded: Path) -> None:
    model = load(seeded)
    assert model.above == 0.6 and "a seed model above t = 0.6" in repr(model)
    first, second, _ = model.experts
    assert first.seed_model is second.seed_model  # type: ignore[union-attr]
    x = torch.randn(4, 1, 8, 8)
    high, low = torch.tensor(0.65), torch.tensor(0.6)
    assert first(x, high).equal(second(x, high)) and not first(x, low).equal(second(x, low))
    found, _, version = load_experts(seeded, [0, 2])
    assert version == model.version
    for k, expert in zip((0, 2), found, strict=True):
        for t in (high, low):
            torch.testing.assert_close(expert(x, t), model.experts[k](x, t))


def test_the_engine_samples_the_same_images_as_the_model(seeded: Path) -> None:
    model = load(seeded)
    settings = [
        {"steps": 6, "grid": "uniform_t", "policy": policy, "sampler": sampler}
        for policy, sampler in (("switching", "heun"), ("full", "ipndm"), ("balanced", "ddim"))
    ]
    settings += [{"steps": 6, "policy": "fixed"}, {"steps": 6, "source": "combined"}]
    settings += [{"steps": 6, "autoguidance": 2.0, "guidance_interval": [0.3, 1.0]}]

    async def work() -> None:
        turn = Turn(1)
        engine = Engine(local_experts(model, turn), turn)
        engine.start()
        requests = [harness.request_for(model, 3, seed=4, trace=True, **one) for one in settings]
        try:
            await asyncio.gather(*(engine.run(request) for request in requests))
            for request, one in zip(requests, settings, strict=True):
                expected, trace = model.sample(3, seed=4, trace=True, **one)
                harness.same(harness.images(request), expected)
                harness.same_trace(request, trace)
                above = trace.t.float() > 0.6
                assert trace.chosen[above].sum(dim=2).eq(1).all()
        finally:
            await engine.close()

    harness.run(work)


def test_a_seed_model_that_moves_no_image_guides(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "partition", folder / "partition")
    words = ("seed_model.steps=20", "seed_model.above=1", "expert.steps=40")
    run(small(folder, *words), STAGES)
    model = load(folder)
    assert model.above == 1 and "a seed model\n" in repr(model)
    plain = model.sample(3, steps=5)
    guided, trace = model.sample(3, steps=5, autoguidance=3.0, trace=True)
    assert trace.calls == 2 * 3 * 5 and not plain.allclose(guided, atol=1e-2)
    high = model.sample(3, steps=5, autoguidance=3.0, guidance_interval=[0.999, 1.0], trace=True)
    assert high[1].calls == 3 * 5 + 3
    half = model.half().sample(3, steps=5, autoguidance=3.0)
    torch.testing.assert_close(half, guided, rtol=0, atol=0.2)
    with pytest.raises(ConfigError, match=r"sample.autoguidance must be left at 1 .* got 2"):
        load(small_run).sample(1, autoguidance=2)


def test_a_bundle_of_a_run_gets_a_seed_model_and_loses_it(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "partition", folder / "partition")
    words = ("seed_model.steps=2", "expert.steps=2")
    run(small(folder, *words), ("seed_model", "expert", "bundle"))
    assert read_bundle(folder / "bundle").seed_model is None
    for above in (0.6, 0.7):
        make_bundle(small(folder, *words, f"seed_model.above={above}"))
        bundle = read_bundle(folder / "bundle")
        assert bundle.above == above and bundle.seed_model is not None
        assert f"At t above {above} the seed model" in (folder / "bundle/README.md").read_text()
    run(
        small(folder, *words, "update.cluster=" + bundle.mixture.names[0], "seed_model.above=0.7"),
        ["remove"],
    )
    assert read_bundle(folder / "bundle").above == 0.7


def test_one_model_learns_all_times_and_naive_draws_where_the_seed_model_ends(
    small_run: Path, small: Callable[..., Config]
) -> None:
    config = small(small_run, *HIGH)
    for monolith in monolith_configs(config, config.evaluate).values():
        assert monolith.expert.t_max is None and monolith.seed_model.above == 1
        assert monolith.expert.init == str(small_run / "seed_model" / "seed_model")
    rows = {row.name: row.settings for row in methods(config, {}, METHODS, 3)}
    assert rows["Naive"]["policy"] == "fixed" and rows["Naive"]["source"] == config.sample.source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed_model.above=0.6"], "seed_model.above must be null without a seed model: give"),
        (
            [*HIGH[:1], "seed_model.above=1.1"],
            r"seed_model.above must be in \[0.001, 1\], from where",
        ),
        ([*HIGH[:1], "seed_model.above=0.0005"], r"above must be in \[0.001, 1\], .* got 0.0005"),
        (
            [*HIGH[:2], "seed_model.t_min=0.7"],
            r"seed_model.above must be in \[0.7, 1\], .* got 0.6",
        ),
        (
            ["expert.t_max=0.6"],
            "expert.t_max must be null, or at least seed_model.above, .* got 0.6",
        ),
        (["sample.autoguidance=2"], "sample.autoguidance must be left at 1 without a seed model"),
        ([*HIGH[:2], "expert.t_max=0.5"], "expert.t_max must be null, or at least .* got 0.5"),
        ([*HIGH, "router.data=experts"], "expert.t_max must be null with router.data=experts"),
        (
            [*HIGH, "watch.sheet_every=2"],
            "expert.t_max must be null with watch.sheet_every above 0",
        ),
        (
            [*HIGH, "expert.condition=label", "seed_model.data={name: digits}"],
            "seed_model.above must be null for a seed model of its own images with expert.condition",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_key(
    small: Callable[..., Config], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, *words)


def test_a_table_that_needs_a_guide_is_refused_before_anything_is_trained(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    words = ["table.samplers={strong: {autoguidance: 3}}"]
    config = small(tmp_path, *words)
    with pytest.raises(
        ConfigError, match=r"table.samplers.strong: sample.autoguidance must .* got 3"
    ):
        config.samplers(config.table, "table")
    config = small(tmp_path, *words, *HIGH[:1], "seed_model.above=1")
    assert config.samplers(config.table, "table")["strong"].autoguidance == 3
