"""The samples that evaluation measures: made as the run makes them, once, with a record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.artifacts import read_json
from ddm.errors import DdmError
from serve import load
from serve.model.images import to_uint8
from train.evaluation.methods import Method
from train.evaluation.samples import SampleSpec, SampleStore

PLAIN = {"source": "posterior", "policy": "balanced", "control_variate": "none"}


def row(run: Path, name: str = "some", **settings: Any) -> Method:
    return Method(name, str(run), load(run).version, {**PLAIN, **settings})


def spec_of(
    method: Method, steps: int = 2, seed: int = 0, n: int = 5, **settings: Any
) -> SampleSpec:
    return SampleSpec(method, "own", steps, seed, n, 2, settings)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def test_samples_are_made_again_only_if_they_change(small_run: Path, tmp_path: Path) -> None:
    store, method = SampleStore(tmp_path, "cpu", "32-true", 20), row(small_run)
    first = spec_of(method)
    store.make([first], [1], 1)
    before = files(tmp_path)
    assert set(before) == {"some-own-2-seed0.json", "some-own-2-seed0.safetensors"}
    store.make([first, spec_of(method, steps=3), spec_of(method, seed=1)], [1, 1, 1], 1)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        f"some-own-{rest}.{suffix}"
        for rest in ("3-seed0", "2-seed1")
        for suffix in ("json", "safetensors")
    }
    changes = [
        spec_of(method, n=6),
        spec_of(method, n=6, grid="quadratic"),
        spec_of(row(small_run, policy="full"), n=6, grid="quadratic"),
        spec_of(Method("some", str(small_run), "another", PLAIN)),
    ]
    for changed in changes:
        store.make([changed], [1], 1)
        assert (before := after) != (after := files(tmp_path)), changed
        assert len(store.read(changed).images) == changed.n


def test_a_method_s_settings_override_those_of_the_sampler(small_run: Path, tmp_path: Path) -> None:
    model, store = (
        load(small_run),
        SampleStore(tmp_path, "cpu", "32-true", 3),
    )  # batches that do not divide n
    for control_variate in ("none", "gaussian"):
        given = {
            "sampler": "unipc",
            "order": 2,
            "grid": "quadratic",
            "control_variate": "ignored",
            "policy": "full",
        }
        spec = spec_of(
            row(small_run, control_variate, control_variate=control_variate),
            steps=5,
            seed=3,
            n=4,
            **given,
        )
        store.make([spec], [1], 1)
        expected, trace = model.sample(
            4,
            seed=3,
            trace=True,
            **PLAIN | {"control_variate": control_variate},
            sampler="unipc",
            order=2,
            grid="quadratic",
            steps=5,
        )
        found = store.read(spec)
        torch.testing.assert_close(found.ends, expected[:2], rtol=0, atol=1e-4)
        assert (found.images.int() - to_uint8(expected).int()).abs().max() <= 1
        torch.testing.assert_close(found.load, trace.chosen.float().mean(dim=1))
        assert found.nfe == trace.calls / 4
        assert found.chosen.bool().equal(trace.chosen[:, :8])


def test_bf16_samples_are_close_to_float32_and_recorded_as_such(
    small_run: Path, tmp_path: Path
) -> None:
    spec = spec_of(row(small_run, control_variate="gaussian"), steps=6, n=8)
    single, half = (
        SampleStore(tmp_path / "single", "cpu", "32-true", 20),
        SampleStore(tmp_path / "half", "cpu", "bf16-mixed", 20),
    )
    for store in (single, half):
        store.make([spec], [1], 1)
    a, b = single.read(spec), half.read(spec)
    same = (
        (a.chosen == b.chosen).all(dim=2).all(dim=0)
    )  # a choice may turn, and then the image is another
    assert same.sum() >= 6
    apart = (a.images[same].float() - b.images[same].float()).abs()
    assert 0 < apart.mean() < 2  # of 255
    assert a.ends.dtype == b.ends.dtype == torch.float32
    facts = [read_json(store.file(spec, ".json")) for store in (single, half)]
    assert [part.pop("precision") for part in facts] == ["32-true", "bf16-mixed"]
    assert facts[0] == facts[1]
    written = files(half.folder)
    SampleStore(half.folder, "cpu", "bf16-mixed", 20).make([spec], [1], 1)
    assert files(half.folder) == written
    SampleStore(half.folder, "cpu", "32-true", 20).make([spec], [1], 1)
    assert torch.equal(half.read(spec).images, a.images)


def test_failing_samples_are_named_and_the_others_made(small_run: Path, tmp_path: Path) -> None:
    store = SampleStore(tmp_path, "cpu", "32-true", 20)
    good, bad = spec_of(row(small_run)), spec_of(row(small_run, "wrong", policy="best"), steps=4)
    with pytest.raises(
        DdmError, match="sampling wrong-own-4-seed0 failed: sample.policy must be one of"
    ):
        store.make([bad, good], [1, 1], 1)
    assert len(store.read(good).images) == 5
