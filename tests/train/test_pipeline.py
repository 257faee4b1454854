import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from ddm.artifacts import read_artifact, read_tensors, sha256
from ddm.errors import ArtifactError, ConfigError, DdmError
from ddm.grids import time_grid
from ddm.partition import Partition
from ddm.rng import RngStream, derive_seed
from ddm.schedules import schedule
from experts.expert_module import ExpertLearning
from serve import load
from serve.model.images import to_uint8
from train.config import Config
from train.resume import read_resume
from train.stages.expert import train_expert
from train.stages.run import run


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file of a run with the time it was written and its hash."""
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "config.yaml"
    )
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256(path)) for path in files
    }


def test_a_finished_run_has_everything_and_is_not_touched_again(
    small_run: Path, small: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    before = _files(small_run)
    for name in (
        "partition/clusters.png",
        "report.html",
        "evaluate/record.json",
        "bundle/manifest.json",
        "monolith/bundle/manifest.json",
    ):
        assert name in before
    kept = {name for name in before if name.endswith((".ckpt", ".part"))}
    assert {Path(name).name for name in kept} == {"resume.ckpt"}  # with which an expert can go on
    assert all("experts/" in name for name in kept)
    with caplog.at_level("INFO"):
        run(small(small_run))
    assert _files(small_run) == before
    for stage in ("partition", "expert", "router", "bundle", "sample", "evaluate"):
        assert any(
            record.message.startswith(stage) and "up to date" in record.message
            for record in caplog.records
        ), stage


def test_the_clusters_are_the_digits_two_or_more_to_an_expert(small_run: Path) -> None:
    cut = Partition.read(small_run / "partition")
    whole = cut.all(small_run / "partition")
    assert cut.names == ["0 + 1 + 2 + 3", "4 + 5 + 6", "7 + 8 + 9"]
    assert sum(cut.sizes) == 240
    assert torch.equal(whole["cluster"], whole["labels"] * 3 // 10)
    assert sorted(whole["index"].tolist()) == list(range(240))


def test_an_artifact_says_what_it_is(small_run: Path) -> None:
    cut = Partition.read(small_run / "partition")
    _, facts = read_artifact(small_run / "experts" / "01" / "expert")
    assert facts["kind"] == "expert"
    assert facts["name"] == cut.names[1]
    assert facts["cluster"] == cut.hashes[1]
    assert facts["count"] == cut.sizes[1]
    assert facts["steps"] == 12
    assert facts["images_seen"] == 144
    assert facts["weights"] == "ema"
    assert facts["config"]["unet"]["channels"] == 8


def _by_numpy(images: torch.Tensor) -> list[torch.Tensor]:
    """Mean and variance of images in scipy's cosine basis."""
    y = dctn(images.double().numpy() / 127.5 - 1, type=2, norm="ortho", axes=(2, 3))
    return [torch.from_numpy(part).float() for part in (y.mean(0), y.var(0))]


def test_an_expert_s_artifact_holds_the_moments_of_its_own_cluster(small_run: Path) -> None:
    cut = Partition.read(small_run / "partition")
    means = []
    for k in range(3):
        tensors, _ = read_artifact(small_run / "experts" / f"{k:02d}" / "expert")
        images = cut.cluster(small_run / "partition", k)["images"]
        found = [tensors["gaussian.mean"], tensors["gaussian.variance"]]
        torch.testing.assert_close(found, _by_numpy(images), rtol=1e-4, atol=1e-5)
        means.append(found[0])
    assert (
        min(
            float((one - other).abs().max())
            for one, other in zip(means, means[1:] + means[:1], strict=True)
        )
        > 0.1
    )


def test_an_expert_that_sees_mirror_images_has_their_moments_from_its_own_file_alone(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small_run / "partition", copy / "partition")
    images = Partition.read(copy / "partition").cluster(copy / "partition", 2)["images"]
    for k in (0, 1):
        Partition.file(copy / "partition", k).unlink()
    train_expert(
        small(copy, "data.flip=true", "expert.steps=1", "expert.warmup_steps=0"), 2, lambda _: None
    )
    tensors, _ = read_artifact(copy / "experts" / "02" / "expert")
    found = [tensors["gaussian.mean"], tensors["gaussian.variance"]]
    torch.testing.assert_close(
        found, _by_numpy(torch.cat([images, images.flip(3)])), rtol=1e-4, atol=1e-5
    )
    assert (found[0] - _by_numpy(images)[0]).abs().max() > 0.1


def test_another_config_is_refused_with_every_key_that_differs_and_nothing_lost(
    small_run: Path, small: Callable[..., Config]
) -> None:
    before = _files(small_run)
    with pytest.raises(
        ArtifactError,
        match=r"expert.learning_rate is 0.002 there, 0.1 here; router.steps is 10 there, 20 here",
    ):
        run(small(small_run, "expert.learning_rate=0.1", "router.steps=20"))
    assert _files(small_run) == before


def test_sampling_may_change_without_training_again(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    experts = _files(copy / "experts")
    run(small(copy, "expert.checkpoint_every=7", "router.checkpoint_every=2"), ["expert", "router"])
    run(small(copy, "sample.policy=stochastic", "sample.seed=7"), ["sample"])
    run(small(copy, "sample.control_variate=none"), ["sample"])
    assert (copy / "samples" / "posterior-stochastic-ipndm-3-n4-seed7.png").exists()
    assert (
        copy / "samples" / "posterior-switching-ipndm-3-control_variate=none-n4-seed0.png"
    ).exists()
    assert (copy / "samples" / "posterior-switching-ipndm-3-n4-seed0.png").exists()
    assert _files(copy / "experts") == experts


def test_one_lost_expert_is_named_and_trained_again_alone_to_the_same_weights(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    lost = sha256(copy / "experts" / "01" / "expert.safetensors")
    kept = _files(copy / "experts" / "00")
    shutil.rmtree(copy / "experts" / "01")
    with pytest.raises(
        ArtifactError, match=r"experts/01/expert.json is missing: train it .* expert.index=1"
    ):
        run(small(copy), ["bundle"])
    # Expert 1 needs its own cluster's file and no other.
    for k in (0, 2):
        Partition.file(copy / "partition", k).unlink()
    run(small(copy, "expert.index=1"), ["expert"])
    assert sha256(copy / "experts" / "01" / "expert.safetensors") == lost
    assert _files(copy / "experts" / "00") == kept


def test_experts_go_on_to_the_weights_of_as_many_steps_at_once(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small_run / "partition", copy / "partition")
    run(small(copy, "expert.steps=7", "expert.index=1"), ["expert"])
    (facts,) = [read_artifact(copy / "experts" / "01" / "expert")[1]]
    assert facts["steps"] == 7
    run(small(copy), ["expert"])
    for k in range(3):
        for name in ("expert.safetensors", "expert.json", "losses.txt"):
            ours, theirs = (run / "experts" / f"{k:02d}" / name for run in (copy, small_run))
            assert ours.read_bytes() == theirs.read_bytes(), (k, name)
    with pytest.raises(ArtifactError, match="expert.steps is 12 there, 7 here"):
        run(small(copy, "expert.steps=7"), ["expert"])
    (copy / "experts" / "02" / "resume.ckpt").unlink()
    message = r"02/resume.ckpt is missing, so expert 02 cannot go on from step 12 to 20: give exp"
    with pytest.raises(ArtifactError, match=message):
        run(small(copy, "expert.steps=20"), ["expert"])
    run(small(copy, "expert.steps=14", "expert.checkpoint_every=5", "expert.index=0"), ["expert"])
    run(small(copy, "expert.steps=14", "expert.index=0"), ["expert"])
    assert read_artifact(copy / "experts" / "00" / "expert")[1]["steps"] == 14


@pytest.mark.usefixtures("forked_workers")
def test_experts_trained_side_by_side_are_those_trained_one_after_another(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copytree(small_run / "partition", copy / "partition")
    run(small(copy, "expert.workers=2"), ["expert"])
    for k in range(3):
        assert sha256(copy / "experts" / f"{k:02d}" / "expert.safetensors") == sha256(
            small_run / "experts" / f"{k:02d}" / "expert.safetensors"
        )


def test_an_expert_that_fails_costs_only_itself(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copytree(small_run / "partition", copy / "partition")
    Partition.file(copy / "partition", 1).write_bytes(b"damaged")
    with pytest.raises(DdmError, match=r"expert 01 failed: .*cluster-01.safetensors is damaged"):
        run(small(copy), ["expert"])
    assert (copy / "experts" / "00" / "expert.json").exists()
    assert (copy / "experts" / "02" / "expert.json").exists()


def test_an_expert_that_diverges_stops_at_its_last_good_state_and_the_others_go_on(
    tmp_path: Path, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small(tmp_path), ["partition"])
    bad = derive_seed(0, RngStream.EXPERT, 1)
    real = ExpertLearning.training_step

    def diverge(self: ExpertLearning, batch: object, index: int) -> torch.Tensor:
        loss = real(self, batch, index)
        return loss * torch.nan if (self.batches.seed, self.global_step) == (bad, 6) else loss

    monkeypatch.setattr(ExpertLearning, "training_step", diverge)
    said = f"expert 01 failed: the loss .* NaN or infinite at step 7, in the batch of seed {bad} "
    with pytest.raises(DdmError, match=said):
        run(small(tmp_path), ["expert"])
    saved = read_resume(tmp_path / "experts" / "01")
    assert saved is not None
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert (tmp_path / "experts" / "02" / "expert.json").exists()
    with pytest.raises(ArtifactError, match=r"expert.json is missing"):
        run(small(tmp_path), ["bundle"])


def test_a_changed_data_set_is_refused_not_partitioned_over(
    small_run: Path, small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    digits.images[0, 0, 0] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    copy = shutil.copytree(small_run, tmp_path / "run")
    with pytest.raises(
        ArtifactError, match="was cut from other images than data.root=data holds now"
    ):
        run(small(copy), ["partition"])


def test_one_cluster_is_the_monolith_through_every_stage(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    run(small(tmp_path / "mono", "partition.k=1"))
    record = json.loads((tmp_path / "mono" / "evaluate" / "record.json").read_text())
    assert {cell["method"] for cell in record["cells"]} == {"one-model"}
    assert (tmp_path / "mono" / "report.html").exists()
    assert len(load(tmp_path / "mono").experts) == 1


FEWER = [
    "data.limit=60",
    "expert.steps=4",
    "router.steps=4",
    "router.switch_step=2",
    "sample.steps=4",
    "evaluate={n: 20, steps: [3, 4], trajectories: 4, reference_steps: 6, batch: 20, monolith_steps: 0}",
]


def test_a_run_with_the_schedule_and_the_grid_of_edm_goes_through_every_stage(
    small: Callable[..., Config], tmp_path: Path, means: Path
) -> None:
    folder = tmp_path / "edm"
    run(
        small(
            folder, *FEWER, "schedule.name=edm", "sample.grid=edm", f"evaluate.features=[{means}]"
        )
    )
    record = json.loads((folder / "evaluate" / "record.json").read_text())
    assert len(record["cells"]) == 14 and all(
        np.isfinite(cell["scores"]["means"]["frechet"]) for cell in record["cells"]
    )
    assert all(np.isfinite(cell["trajectory_error"]) for cell in record["cells"])
    assert (folder / "report.html").exists()
    model = load(folder)
    assert model.schedule == schedule("edm")
    images, trace = model.sample(4, steps=4, grid="edm", trace=True)
    drawn = read_tensors(
        folder / "samples" / "posterior-switching-ipndm-4-grid=edm-n4-seed0.safetensors"
    )["images"]
    assert torch.equal(to_uint8(images), drawn)
    torch.testing.assert_close(trace.t, time_grid("edm", 4, model.schedule)[:-1])
    with pytest.raises(
        ConfigError, match=r"grid must be another for .*, such as edm: uniform_t is"
    ):
        model.sample(1, grid="uniform_t")


def test_a_run_with_vp_cosine_is_drawn_by_unipc_on_even_log_snr(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "cosine"
    words = (
        "schedule.name=vp_cosine",
        "sample.sampler=unipc",
        "sample.order=2",
        "sample.grid=uniform_log_snr",
    )
    run(small(folder, *FEWER, *words), ["partition", "expert", "router", "bundle", "sample"])
    model = load(folder)
    assert model.schedule == schedule("vp_cosine")
    images, trace = model.sample(
        4, steps=4, sampler="unipc", order=2, grid="uniform_log_snr", trace=True
    )
    name = "posterior-switching-unipc-4-grid=uniform_log_snr-order=2-n4-seed0.safetensors"
    drawn = read_tensors(folder / "samples" / name)["images"]
    assert torch.equal(to_uint8(images), drawn)
    torch.testing.assert_close(trace.t, time_grid("uniform_log_snr", 4, model.schedule)[:-1])
    assert trace.calls == 4 * 4


def test_training_an_expert_tells_how_far_it_is(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copytree(small_run / "partition", copy / "partition")
    told: list[tuple[int, int, float]] = []
    train_expert(small(copy), 2, told.append)
    assert [(k, step) for k, step, _ in told] == [(2, step) for step in range(1, 13)]
    assert all(loss > 0 for _, _, loss in told)


def test_a_signature_goes_into_the_bundle_and_not_beyond_the_artifact_it_is_of(
    small_run: Path, small: Callable[..., Config], tmp_path: Path
) -> None:
    copy = shutil.copytree(small_run, tmp_path / "run")
    signature = copy / "experts" / "00" / "expert.json.minisig"
    signature.write_text("alice's")
    run(small(copy), ["bundle"])
    assert (copy / "bundle" / "expert-00.json.minisig").read_text() == "alice's"
    run(small(copy, "expert.steps=13", "expert.index=0"), ["expert"])
    assert not signature.exists()
