import json
import shutil
from pathlib import Path

import pytest
import torch

from ddm.errors import ArtifactError, ConfigError
from router.policies import POLICIES
from router.sources import SOURCES
from serve import load


@pytest.mark.parametrize("policy", ["balanced", "stochastic", "fixed", "full"])
def test_a_picture_is_the_same_alone_and_among_others(small_run: Path, policy: str) -> None:
    model = load(small_run)
    many, traced = model.sample(8, seed=0, steps=6, policy=policy, trace=True)
    one, alone = model.sample(1, first_index=3, seed=0, steps=6, policy=policy, trace=True)
    assert torch.equal(traced.chosen[:, 3], alone.chosen[:, 0])
    assert torch.allclose(many[3], one[0], atol=1e-4)


def test_the_size_of_the_batch_changes_no_picture(small_run: Path) -> None:
    model = load(small_run)
    whole, by_three = (model.sample(8, seed=1, steps=5, batch=batch) for batch in (8, 3))
    assert torch.allclose(whole, by_three, atol=1e-4)


def test_another_seed_gives_other_pictures(small_run: Path) -> None:
    model = load(small_run)
    assert (model.sample(2, seed=0, steps=3) - model.sample(2, seed=1, steps=3)).abs().mean() > 0.05


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_source_goes_with_every_policy(small_run: Path, source: str, policy: str) -> None:
    images, trace = load(small_run).sample(3, steps=4, source=source, policy=policy, trace=True)
    assert images.dtype == torch.float32
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert torch.allclose(trace.alpha.sum(dim=2), torch.ones(4, 3), atol=1e-5)
    assert trace.calls == int(trace.chosen.sum())


def test_a_trace_counts_one_call_a_step_or_one_an_expert(small_run: Path) -> None:
    model = load(small_run)
    assert model.sample(5, steps=4, policy="balanced", trace=True)[1].calls == 5 * 4
    assert model.sample(5, steps=4, policy="full", trace=True)[1].calls == 5 * 4 * 3
    assert model.sample(5, steps=4, policy="top_k", top_k=2, trace=True)[1].calls == 5 * 4 * 2


def test_a_bundle_carried_away_gives_the_same_pictures(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "bundle", tmp_path / "elsewhere")
    there, here = load(tmp_path / "elsewhere"), load(small_run)
    assert there.version == here.version
    assert torch.equal(there.sample(2, steps=3), here.sample(2, steps=3))
    with pytest.raises(ConfigError, match="source=analytic needs the training pictures"):
        there.sample(1, source="analytic")


def test_a_clipped_picture_differs_only_where_it_would_leave_the_range(small_run: Path) -> None:
    model = load(small_run)
    free = model.sample(4, steps=1, clip=False)
    assert torch.allclose(model.sample(4, steps=1, clip=True), free.clamp(-1, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, r"sample.steps must be in \[1, 1000\], got 0"),
        ({"steps": 2.5}, r"sample.steps must be in \[1, 1000\], got 2.5"),
        ({"sampler": "eular"}, "sample.sampler must be one of euler ddim, got 'eular'"),
        ({"policy": "best"}, "sample.policy must be one of full top_k .*, got 'best'"),
        ({"source": "oracle"}, "sample.source must be one of prior .*, got 'oracle'"),
        ({"grid": "even"}, "sample.grid must be one of uniform_t .*, got 'even'"),
        ({"policy": "top_k", "top_k": 0}, "sample.top_k must be at least 1, got 0"),
        ({"policy": "nucleus", "nucleus_p": 1.5}, r"sample.nucleus_p must be in \(0, 1\], got 1.5"),
        ({"step": 3}, "sample has no setting 'step'; it takes steps, sampler"),
        ({"seed": -1}, "sample.seed must be"),
        ({"first_index": -1}, "sample.first_index must be a whole number, at least 0, got -1"),
        ({"batch": 0}, "sample.batch must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_by_name(small_run: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(small_run).sample(1, **settings)  # type: ignore[call-overload]


def test_no_pictures_are_refused(small_run: Path) -> None:
    with pytest.raises(ConfigError, match="sample.n must be a whole number, at least 1, got 0"):
        load(small_run).sample(0)


def test_a_changed_weight_is_refused_with_file_and_hashes(small_run: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    path = bundle / "expert-01.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"expert-01.safetensors is damaged or foreign: its SHA-256 is \w{64}, expected \w{64}"
    ):
        load(bundle)


def test_an_expert_of_another_run_is_refused_even_with_its_hash_in_the_manifest(
    small_run: Path, tmp_path: Path
) -> None:
    from ddm.artifacts import sha256

    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    facts = json.loads((bundle / "expert-01.json").read_text())
    (bundle / "expert-01.json").write_text(json.dumps({**facts, "partition": "0" * 64}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["artifacts"]["expert-01"] = sha256(bundle / "expert-01.json")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="expert-01.json does not belong to this bundle: its partition is '000"):
        load(bundle)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        load(tmp_path)
