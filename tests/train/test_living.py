"""A bundle whose experts come, change and go, one at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddm.artifacts import read_facts, sha256
from ddm.bundle import Bundle, read_bundle
from ddm.bundle_history import read_history
from ddm.bundle_writing import write_half
from ddm.errors import ArtifactError, ConfigError
from ddm.mixture import Mixture
from serve import load
from train.config import Config
from train.stages import living
from train.stages.run import run


@pytest.fixture
def two(small_run: Path, tmp_path: Path, small: Callable[..., Config]) -> Path:
    """A run that has bundled experts 0 and 1 of the small run, with their router."""
    folder = tmp_path / "run"
    paths = ", ".join(str(small_run / "experts" / f"{k:02d}") for k in range(2))
    run(small(folder, f"bundle.experts=[{paths}]"), ["bundle"])
    run(small(folder, "router.data=experts", SAMPLES), ["reroute"])
    return folder


SAMPLES = "router.samples=30"
ROUTED = ("router.data=experts", SAMPLES)


def hashes(bundle: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in bundle.glob("expert-*")}


def bundle_of(folder: Path) -> Bundle:
    return read_bundle(folder / "bundle")


def third(small_run: Path) -> str:
    return f"update.expert={small_run / 'experts' / '02'}"


def test_an_expert_joins_and_the_others_files_stay(
    two: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    before, old = hashes(two / "bundle"), bundle_of(two)
    assert old.router is not None
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    after, new = hashes(two / "bundle"), bundle_of(two)
    assert before.items() < after.items()
    assert after.keys() - before.keys() == {"expert-02.json", "expert-02.safetensors"}
    torch.testing.assert_close(new.mixture.pi, load(small_run).pi)
    assert new.router is None and new.old_router is not None
    assert new.old_router.facts["sha256"] == old.router.facts["sha256"]
    model = load(two)
    assert model.sample(4, steps=3, source="gaussian").isfinite().all()
    with pytest.raises(ConfigError, match=r"whose router was trained for other experts \(python"):
        model.sample(1)
    run(small(two, *ROUTED, third(small_run)), ["grow"])  # again: it is there
    assert len(read_history(two / "bundle")) == 3
    run(small(two, *ROUTED), ["reroute"])
    assert hashes(two / "bundle") == after
    routed = bundle_of(two)
    assert routed.router is not None and routed.old_router is None
    assert routed.router.facts["init"]["sha256"] == old.router.facts["sha256"]
    assert load(two).sample(4, steps=3).isfinite().all()
    assert [event["what"] for event in read_history(two / "bundle")] == [
        "bundle",
        "reroute",
        "grow 7 + 8 + 9",
        "reroute",
    ]


def test_a_router_goes_on_from_the_rows_of_the_clusters_that_stay(
    two: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    router = bundle_of(two).router
    assert router is not None
    old = router.tensors
    still = (*ROUTED, "router.learning_rate=1e-30")
    (two / "config.yaml").unlink()
    run(small(two, *still, third(small_run)), ["grow", "reroute"])
    new = bundle_of(two).router
    assert new is not None
    for name, tensor in new.tensors.items():
        if name == "posterior.log_pi":
            torch.testing.assert_close(tensor, load(two).pi.log())
            continue
        expected = old[name]
        if ".head." in name:
            expected = torch.cat([expected, expected.mean(dim=0, keepdim=True)])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_an_expert_is_trained_from_its_shard_and_joins(
    two: Path, small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    shutil.copytree(small_run / "partition", tmp_path / "central" / "partition")
    run(small(tmp_path / "central"), ["export"])
    shard = f"expert.shard={tmp_path / 'central' / 'shards' / '02'}"
    words = (*ROUTED, shard, "update.cluster=late", "expert.steps=3", "expert.init=null")
    (two / "config.yaml").unlink()
    run(small(two, *words), ["grow"])
    bundle = bundle_of(two)
    assert bundle.mixture.names[2] == "late"
    assert (bundle.experts[2].facts["name"], bundle.experts[2].facts["steps"]) == ("7 + 8 + 9", 3)
    run(small(two, *ROUTED, shard, "update.cluster=late", "expert.steps=5"), ["retrain"])
    longer = bundle_of(two)
    assert longer.experts[2].facts["steps"] == 5
    assert longer.mixture == bundle.mixture
    assert longer.files == ["expert-00", "expert-01", "expert-02"]


def test_an_expert_leaves_and_its_number_is_not_given_again(
    two: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    before = hashes(two / "bundle")
    run(small(two, *ROUTED, "update.cluster=7 + 8 + 9"), ["remove"])
    bundle = bundle_of(two)
    assert bundle.files == ["expert-00", "expert-01"]
    gone = {"expert-02.json", "expert-02.safetensors"}
    assert hashes(two / "bundle") == {k: v for k, v in before.items() if k not in gone}
    torch.testing.assert_close(bundle.mixture.pi.sum(), torch.tensor(1.0))
    assert bundle.old_names == ["0 + 1 + 2 + 3", "4 + 5 + 6"]
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    assert bundle_of(two).files == ["expert-00", "expert-01", "expert-03"]
    (_, _, grown, removed, _) = read_history(two / "bundle")
    assert removed["what"] == "remove 7 + 8 + 9"
    assert grown["added"]["expert-02"] == removed["removed"]["expert-02"]


def test_an_expert_is_replaced_in_its_place(
    two: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    before, old = hashes(two / "bundle"), bundle_of(two)
    run(small(two, *ROUTED, third(small_run), "update.cluster=0 + 1 + 2 + 3"), ["retrain"])
    new = bundle_of(two)
    assert new.mixture.names == old.mixture.names
    facts = read_facts(small_run / "experts" / "02" / "expert")
    assert new.mixture.clusters == [facts["cluster"], old.mixture.clusters[1]]
    assert new.mixture.weights == [facts["count"], old.mixture.weights[1]]
    assert new.router is None
    same = {name: value for name, value in hashes(two / "bundle").items() if before[name] == value}
    assert same.keys() == {"expert-01.json", "expert-01.safetensors"}


def test_a_changed_bundle_is_not_made_over(
    small_run: Path, tmp_path: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    run(small(copy, "update.cluster=4 + 5 + 6"), ["remove"])
    version = bundle_of(copy).version
    run(small(copy), ["bundle"])
    assert bundle_of(copy).version == version
    assert "stays as it is, after remove 4 + 5 + 6: move it away to make it anew" in caplog.text
    router = sha256(copy / "router" / "router.safetensors")
    run(small(copy), ["reroute"])  # from the run's own images
    assert bundle_of(copy).router is not None
    assert sha256(copy / "router" / "router.safetensors") == router
    assert load(copy).sample(1, steps=2, source="analytic").isfinite().all()
    shutil.rmtree(copy / "partition")
    shutil.copytree(copy / "monolith" / "partition", copy / "partition")
    with pytest.raises(ArtifactError, match="does not hold the images of cluster"):
        load(copy).sample(1, steps=2, source="analytic")


def test_what_would_not_fit_is_refused_before_it_is_trained(
    two: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    for side in (4, 8):
        images = torch.zeros(20, 1, side, side, dtype=torch.uint8)
        save_file({"images": images}, tmp_path / f"{side}.safetensors")
        out, root = (
            f"shard.out={tmp_path / str(side)}",
            f"data.root={tmp_path / str(side)}.safetensors",
        )
        run(small(tmp_path / f"owner-{side}", out, "data.name=tensors", root), ["shard"])

    def refused(message: str, *words: str, side: int = 8) -> None:
        given = (f"update.bundle={two / 'bundle'}", f"expert.shard={tmp_path / str(side)}")
        with pytest.raises(ConfigError, match=message):
            run(small(tmp_path / "owner", *ROUTED, *given, *words), ["grow"])

    refused(r"expert.shard must hold images of \[1, 8, 8\], got", side=4)
    refused("update.cluster must be a new name", "update.cluster=4 + 5 + 6")
    refused("update.weight must be above 0 and at most 2.40, got -1", "update.weight=-1")
    seed = ("seed_model.above=0.6", "seed_model.steps=4", "router.data=shards")
    refused("expert.condition must be none, as of the bundle's", "expert.condition=label")
    refused("expert.t_max must be at least 1, up to where", "expert.t_max=0.6", *seed)
    assert not (tmp_path / "owner" / "owners").exists()


def test_a_bundle_that_another_command_has_changed_is_not_overwritten(
    two: Path, small_run: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = living._given_expert

    def slowly(config: Config, bundle: Bundle, others: Mixture) -> Path:
        monkeypatch.undo()
        words = (f"update.bundle={two / 'bundle'}", "update.cluster=4 + 5 + 6")
        run(small(two.with_name("other"), *ROUTED, *words), ["remove"])
        return given(config, bundle, others)

    monkeypatch.setattr(living, "_given_expert", slowly)
    with pytest.raises(ArtifactError, match="bundle has changed from version .* since this comm"):
        run(small(two, *ROUTED, third(small_run)), ["grow"])
    assert bundle_of(two).mixture.names == ["0 + 1 + 2 + 3"]
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    assert bundle_of(two).mixture.names == ["0 + 1 + 2 + 3", "7 + 8 + 9"]


def test_the_copy_in_half_precision_changes_along(
    two: Path, small_run: Path, small: Callable[..., Config]
) -> None:
    write_half(two / "bundle", two / "bundle-half")
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    assert read_bundle(two / "bundle-half").mixture == bundle_of(two).mixture
    card = (two / "bundle-half" / "README.md").read_text()
    assert f"the half precision of bundle `{bundle_of(two).version[:12]}`" in card
    shutil.rmtree(two / "bundle-half")  # as if it had been killed before it wrote it
    shutil.copytree(small_run / "bundle", two / "bundle-half")
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    assert read_bundle(two / "bundle-half").mixture == bundle_of(two).mixture


def test_what_cannot_change_is_refused_by_key(
    two: Path, small_run: Path, tmp_path: Path, small: Callable[..., Config]
) -> None:
    def refused(command: str, message: str, *words: str) -> None:
        with pytest.raises(ConfigError, match=message):
            run(small(two, *ROUTED, *words), [command])

    with pytest.raises(ArtifactError, match=r"bundle is missing: make it with the stage 'bundle'"):
        run(small(tmp_path / "none", third(small_run)), ["grow"])
    first = f"update.expert={small_run / 'experts' / '00'}"
    several = "has 3 experts: give one of them, such as .*experts/00"
    with pytest.raises(ArtifactError, match=several):
        run(small(two, *ROUTED, f"update.expert={small_run}"), ["grow"])
    same = "update.cluster must be of images that no expert has learned, got those of '0"
    refused("grow", same, first, "update.cluster=late")
    second = f"update.expert={small_run / 'experts' / '01'}"
    same = "update.cluster must be of images that no expert has learned, got those of '4"
    refused("retrain", same, second, "update.cluster=0 + 1 + 2 + 3")
    refused("grow", "update.expert must be the artifact of an expert, or expert.shard")
    refused("grow", "update.cluster must be a new name, got '4", first, "update.cluster=4 + 5 + 6")
    refused(
        "remove",
        "update.cluster must be one of the bundle's clusters, .*, got 'x'",
        "update.cluster=x",
    )
    refused("retrain", "update.cluster must be one of the bundle's clusters, .*, got None", first)
    other = small(two, "router.data=pooled", SAMPLES)
    run(small(two, *ROUTED, "update.cluster=4 + 5 + 6"), ["remove"])
    refused(
        "remove",
        "update.cluster must leave an expert in the bundle",
        "update.cluster=0 + 1 + 2 + 3",
    )
    run(small(two, *ROUTED, third(small_run)), ["grow"])
    with pytest.raises(ConfigError, match="router.data must be experts where images are elsewhere"):
        run(other, ["reroute"])
    paths = f"bundle.experts=[{small_run / 'experts' / '00'}]"
    run(small(tmp_path / "one", paths, "bundle.weights=[0.5]"), ["bundle"])
    with pytest.raises(
        ConfigError, match=r"update.weight must be given for .*, \[0.5\], are not num"
    ):
        run(small(tmp_path / "one", third(small_run)), ["grow"])
    run(small(tmp_path / "one", third(small_run), "update.weight=1.5"), ["grow"])
    torch.testing.assert_close(load(tmp_path / "one").pi, torch.tensor([0.25, 0.75]))
