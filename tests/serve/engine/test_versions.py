"""New weights in a running service: requests under way end on the old, later ones begin on the new."""

import asyncio
import gc
import shutil
import weakref
from pathlib import Path

import pytest

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.errors import ArtifactError, ConfigError
from serve import load
from serve.engine.expert import ServingError
from serve.engine.metrics import Metrics
from serve.engine.service import SamplingParams, Service
from serve.engine.turn import Turn
from serve.model.model import Model
from serve.settings import settings
from tests.serve.engine.service_harness import (
    STEPS,
    Connected,
    Fake,
    images,
    run,
    same,
    serving,
    until,
)


@pytest.fixture(scope="module")
def other_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run's bundle with other weights, all hashes right."""
    bundle = shutil.copytree(small_run / "bundle", tmp_path_factory.mktemp("other") / "bundle")
    manifest = read_json(bundle / "manifest.json")
    for k in range(3):
        stem = bundle / f"expert-{k:02d}"
        tensors, facts = read_artifact(stem)
        changed = {
            name: tensor
            if name.startswith("gaussian.") or not tensor.is_floating_point()
            else 1.3 * tensor + 0.02
            for name, tensor in tensors.items()
        }
        write_artifact(
            stem, changed, {key: value for key, value in facts.items() if key != "sha256"}
        )
        manifest["artifacts"][stem.name] = sha256(stem.with_suffix(".json"))
    write_json(bundle / "manifest.json", manifest)
    return bundle


def test_after_a_switch_old_requests_end_on_the_old_weights_and_new_ones_begin_on_the_new(
    small_run: Path, other_run: Path
) -> None:
    old, new = load(small_run), load(other_run)
    assert (
        old.sample(2, seed=1, steps=STEPS) - new.sample(2, seed=1, steps=STEPS)
    ).abs().max() > 0.01

    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(small_run, connect=connect) as service:
            begun, ordered = (
                service.admit(SamplingParams(2, seed=1)),
                service.admit(SamplingParams(2, seed=2)),
            )
            first = begun.version
            making = asyncio.create_task(service.run(begun))
            await until(lambda: connect.asked > 0)
            await service.switch(other_run)
            assert service.current is not None
            assert service.current.model.version == new.version
            assert service.versions == [first, service.current]
            late = service.admit(SamplingParams(2, seed=1))
            assert late.version.model.version == new.version
            assert service.pending == 6 * STEPS
            connect.free.set()
            await asyncio.gather(making, service.run(late))
            same(images(begun), old.sample(2, seed=1, steps=STEPS))
            same(images(late), new.sample(2, seed=1, steps=STEPS))
            assert service.versions == [
                first,
                service.current,
            ]  # one was ordered of the old, and not made
            await service.run(ordered)
            same(images(ordered), old.sample(2, seed=2, steps=STEPS))
            assert ordered.version.model.version == old.version
            assert service.versions == [service.current]
            assert not first.engine._workers
            with pytest.raises(ServingError, match="stopping"):
                await service.run(begun)

    run(work)


def test_a_version_that_nobody_needs_goes_at_once_with_its_weights(
    small_run: Path, other_run: Path
) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            assert service.current is not None
            await service.run(service.admit(SamplingParams(1)))
            model = weakref.ref(service.current.model)
            await service.switch(other_run)
            assert len(service.versions) == 1
            gc.collect()
            assert model() is None
            order = service.admit(SamplingParams(1, seed=4))
            await service.run(order)
            same(images(order), load(other_run).sample(1, seed=4, steps=STEPS))

    run(work)


def test_switching_to_the_same_weights_changes_nothing(small_run: Path) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            before = service.current
            await service.switch(small_run)
            assert service.current is before and service.versions == [before]

    run(work)


def test_a_bundle_that_is_broken_or_does_not_suit_leaves_the_old_in_service(
    small_run: Path, other_run: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(other_run, tmp_path / "broken")
    path = broken / "expert-01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    class Refusing(Connected):
        def __call__(self, model: Model, folder: Path, turn: Turn) -> list[Fake]:
            if folder == other_run:
                raise ConfigError("run must have another number of experts")
            return super().__call__(model, folder, turn)

    async def work() -> None:
        async with serving(small_run, connect=Refusing()) as service:
            before = service.current
            for folder, error, said in (
                (broken, ArtifactError, "expert-01.safetensors is damaged or foreign"),
                (tmp_path / "nothing", ArtifactError, "nothing is not a folder"),
                (other_run, ConfigError, "another number"),
            ):
                with pytest.raises(error, match=said):
                    await service.switch(folder)
                assert service.current is before and service.versions == [before]
            order = service.admit(SamplingParams(1, seed=1))
            await service.run(order)
            same(images(order), load(small_run).sample(1, seed=1, steps=STEPS))

    run(work)


def test_weights_that_came_before_the_service_began_are_those_it_begins_with(
    small_run: Path, other_run: Path
) -> None:
    async def work() -> None:
        service = Service(settings({"run": str(small_run), "sample": {"steps": STEPS}}), Metrics())
        with pytest.raises(ServingError, match="no bundle is in service"):
            service.admit(SamplingParams())
        await service.switch(other_run)
        await service.start()
        assert service.current is not None
        assert service.current.model.version == load(other_run).version
        await service.stop()

    run(work)


def test_two_versions_that_end_together_are_each_closed_once(
    small_run: Path, other_run: Path
) -> None:
    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(small_run, connect=connect) as service:
            orders = [service.admit(SamplingParams(1, seed=1))]
            for folder in (other_run, small_run):
                await service.switch(folder)
                orders.append(service.admit(SamplingParams(1, seed=1)))
            making = [asyncio.create_task(service.run(order)) for order in orders]
            await until(lambda: all(order.version.engine.requests for order in orders))
            for task in making[:2]:
                task.cancel()
            await asyncio.wait(making[:2])
            assert all(task.cancelled() for task in making[:2])
            assert service.versions == [service.current]
            assert not any(order.version.engine._workers for order in orders[:2])
            connect.free.set()
            await making[2]

    run(work)


def test_a_switch_that_is_under_way_when_the_service_stops_begins_nothing(
    small_run: Path, other_run: Path
) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            switching = asyncio.create_task(service.switch(other_run))
            await asyncio.sleep(0)
            await service.stop()
            await switching
            assert service.current is None and not service.versions

    run(work)
