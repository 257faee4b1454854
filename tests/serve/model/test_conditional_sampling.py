"""Sampling by a condition: which clusters serve it, guidance, and the same images in the engine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.condition import Conditions
from ddm.errors import ArtifactError, ConfigError
from ddm.partition import Partition
from serve import Model, load
from serve.engine.local_expert import local_experts
from serve.engine.scheduler import Engine
from serve.engine.turn import Turn
from tests.serve.engine.harness import images, request_for, same, same_trace


@pytest.fixture(scope="module")
def model(small_labels_run: Path) -> Model:
    return load(small_labels_run)


@pytest.fixture(scope="module")
def shares(small_labels_run: Path) -> Tensor:
    """The fraction of each cluster's images that are of each digit, `[K, 10]`."""
    folder = small_labels_run / "partition"
    cut = Partition.read(folder)
    labels = [cut.cluster(folder, k)["labels"] for k in range(cut.k)]
    counts = torch.stack([torch.bincount(one, minlength=10) for one in labels])
    return counts / counts.sum(dim=1, keepdim=True)


def prior_of(model: Model, **settings: Any) -> Tensor:
    router = model.plan(model.settings(**settings)).router
    return router.start(torch.zeros(1, *model.shape), torch.tensor([0.5])).alpha[0]


def test_pi_of_a_condition_is_by_bayes_from_the_clusters_counts(
    model: Model, shares: Tensor
) -> None:
    for digit in range(10):
        expected = model.pi * shares[:, digit]
        found = prior_of(model, condition=str(digit))
        torch.testing.assert_close(found, expected / expected.sum())
    assert torch.equal(prior_of(model), model.pi)


@pytest.mark.parametrize("policy", ["switching", "full", "stochastic", "top_k"])
def test_a_cluster_without_a_class_never_serves_it(
    model: Model, shares: Tensor, policy: str
) -> None:
    missing = (shares == 0).nonzero()
    assert len(missing) > 0
    k, digit = missing[0].tolist()
    _, trace = model.sample(
        8, steps=4, condition=str(digit), policy=policy, trace=True, control_variate="none"
    )
    assert not trace.chosen[:, :, k].any()
    assert trace.alpha[:, :, k].abs().max() == 0


def test_conditions_and_guidance_change_the_image_and_nfe_counts_both(model: Model) -> None:
    given: dict[str, Any] = {"n": 4, "steps": 5, "policy": "fixed", "trace": True}
    one, once = model.sample(condition="1", **given)
    other, _ = model.sample(condition="4", clusters=None, **given)
    strong, twice = model.sample(condition="1", guidance=3.0, **given)
    part, some = model.sample(
        condition="1", guidance=3.0, guidance_interval=[0.3, 0.7], grid="uniform_t", **given
    )
    assert (once.calls, twice.calls) == (20, 40) and 20 < some.calls < 40
    for found in (other, strong, part):
        assert (found - one).abs().max() > 1e-3
    again, _ = model.sample(condition={"1": 1}, guidance=1, **given)
    assert torch.equal(again, one)
    without, none = model.sample(condition="1", guidance=0.0, **given)
    assert none.calls == 40
    reached = {"1": 1}  # guidance 0 is no condition, by the same clusters
    counts = [counts.fraction(reached) for counts in model._counts]
    clusters = dict(zip(model.names, counts, strict=True))
    plain, _ = model.sample(clusters=clusters, **given)
    torch.testing.assert_close(without, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said", "key"),
    [
        ({"condition": "frog"}, "sample.condition must name one of the class names 0, 1, 2", None),
        (
            {"condition": {"3": 2}},
            "sample.condition must be a class, an attribute, or an obj",
            None,
        ),
        ({"condition": 3.5}, "sample.condition must be a class, an attribute, or", None),
        ({"condition": {"3": 0}}, "sample.condition must name one class, got {'3': 0}", None),
        ({"guidance": 2.0}, "sample.guidance must be left at 1 without a condition", "guidance"),
        ({"condition": "3", "guidance": -1}, "sample.guidance must be a number in", "guidance"),
        (
            {"condition": "3", "guidance_interval": [0.5, 0.2]},
            "sample.guidance_interval must be two times in",
            "guidance_interval",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    model: Model, settings: dict[str, Any], said: str, key: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        model.sample(1, **settings)
    assert str(error.value).startswith(said)
    assert error.value.key == f"sample.{key or 'condition'}"


def test_a_class_that_no_chosen_cluster_has_is_refused(model: Model, shares: Tensor) -> None:
    k, digit = (shares == 0).nonzero()[0].tolist()
    name = model.names[k]
    with pytest.raises(ConfigError, match=f"training images of a cluster of {name} show, got"):
        model.sample(1, condition=str(digit), clusters=[name])


def test_a_bundle_without_a_vocabulary_refuses_conditions(small_run: Path) -> None:
    found = load(small_run)
    assert found.vocabulary is None
    with pytest.raises(ConfigError, match=r"sample.condition must be left out for a bundle whose"):
        found.sample(1, condition="3")


def test_the_engine_shares_calls_between_conditions_and_gives_the_images_of_sample(
    model: Model,
) -> None:
    asked: list[dict[str, Any]] = [
        {"condition": "1", "guidance": 2.5},
        {"condition": "4"},
        {},
        {"condition": "7", "guidance": 4.0, "guidance_interval": [0.2, 0.8]},
    ]
    given: dict[str, Any] = {"steps": 6, "policy": "full", "source": "prior", "sampler": "heun"}

    async def work() -> None:
        turn = Turn(1)
        experts = local_experts(model, turn)
        engine = Engine(experts, turn)
        sizes: list[int] = []
        run = experts[0].run

        def spied(x: Tensor, t: Tensor, told: Conditions | None = None) -> Tensor:
            assert told is not None
            sizes.append(len({*map(tuple, told.vector.tolist())}))
            return run(x, t, told)

        experts[0].run = spied  # type: ignore[assignment]
        engine.start()
        requests = [
            request_for(model, 3, seed=i, trace=True, **given, **settings)
            for i, settings in enumerate(asked)
        ]
        costs = [request.cost for request in requests]
        await asyncio.gather(*(engine.run(request) for request in requests))
        await engine.close()
        assert max(sizes) > 1  # images of several conditions in one call
        for i, (request, settings, cost) in enumerate(zip(requests, asked, costs, strict=True)):
            expected, trace = model.sample(3, seed=i, trace=True, **given, **settings)
            same(images(request), expected)
            same_trace(request, trace)
            assert (
                sum(record.nfe for one in request.records.values() for record in one) == trace.calls
            )
            assert trace.calls <= cost <= 2 * trace.calls

    asyncio.run(work())


def test_experts_of_another_vocabulary_do_not_make_a_bundle(
    small_labels_run: Path, tmp_path: Path
) -> None:
    from ddm.bundle import read_bundle

    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in (small_labels_run / "bundle").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "expert-01.json"
    facts = json.loads(path.read_text())
    facts["condition"]["names"][0] = "nought"
    path.write_text(json.dumps(facts))
    manifest = json.loads((folder / "manifest.json").read_text())
    from ddm.artifacts import sha256

    manifest["artifacts"]["expert-01"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"expert-01.json does not fit .*expert-00.json: its"):
        read_bundle(folder)
