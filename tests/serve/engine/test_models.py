"""Several bundles in one server: loaded when asked for, dropped when room is needed."""

import asyncio
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.drill import other_weights
from ddm.errors import ConfigError, DdmError
from serve import load
from serve.engine.expert import ServingError
from serve.engine.metrics import Prometheus
from serve.engine.models import Models, UnknownModelError, _weights_mib
from serve.engine.service import BusyError, SamplingParams
from serve.engine.shares import Key
from serve.settings import settings
from tests.serve.conftest import Start, pixels, same
from tests.serve.engine.harness import run
from tests.serve.http.test_app import images


def models_of(folders: dict[str, Path], **serve: Any) -> Models:
    tree = {
        "models": {name: str(folder) for name, folder in folders.items()},
        "serve": {"device": "cpu", **serve},
        "sample": {"steps": 3},
    }
    return Models(settings(tree), Prometheus())


def names(models: Models) -> list[str]:
    return [service.name for service in models.services]


@pytest.fixture
def three(small_run: Path) -> dict[str, Path]:
    return dict.fromkeys(("a", "b", "c"), small_run)


@pytest.fixture
def room(small_run: Path) -> float:
    """For two of the three, in MiB."""
    return 2.5 * _weights_mib(str(small_run))


def test_a_model_that_a_request_is_prepared_for_stays(three: dict[str, Path], room: float) -> None:
    async def work() -> None:
        models = models_of(three, models_MiB=room)
        await models.start()
        a, b = await models.get("a"), await models.get("b")
        with a.held(), b.held(), pytest.raises(BusyError):
            await models.get("c")
        with a.held():
            await models.get("c")
        assert names(models) == ["a", "c"]
        await models.stop()

    run(work)


def test_models_are_loaded_on_demand_and_the_least_recently_used_is_dropped(
    three: dict[str, Path], room: float
) -> None:
    async def work() -> None:
        models = models_of(three, models_MiB=room)
        await models.start()
        assert names(models) == ["a"]
        b = await models.get("b")
        assert (await models.get()).name == "a"
        assert (await models.get("b")) is b
        await models.get("a")
        await models.get("c")
        assert names(models) == ["a", "c"]
        assert b.current is None and not b.versions
        with pytest.raises(UnknownModelError):
            await models.get("d")
        await models.stop()

    run(work)


def test_a_model_in_use_is_not_dropped(three: dict[str, Path], small_run: Path) -> None:
    async def work() -> None:
        models = models_of(three, models_MiB=1.5 * _weights_mib(str(small_run)))
        await models.start()
        service = await models.get("a")
        admitted = service.admit(SamplingParams(2, seed=1))
        with pytest.raises(BusyError, match="no memory for this model while others are in use"):
            await models.get("b")
        await service.run(admitted)
        del admitted
        both = await asyncio.gather(models.get("b"), models.get("b"))
        assert both[0] is both[1] and names(models) == ["b"]
        await models.stop()

    run(work)


def test_models_share_limits_and_quotas(three: dict[str, Path]) -> None:
    async def work() -> None:
        models = models_of(three, limits={"pending": 9})
        await models.start()
        first, second = await models.get("a"), await models.get("b")
        key = Key("one", requests=1)
        held = first.admit(SamplingParams(2, key=key))
        assert second.pending == 6
        with pytest.raises(BusyError, match="6 expert evaluations are pending"):
            second.admit(SamplingParams(2))
        with pytest.raises(BusyError, match="1 requests of this key"):
            second.admit(SamplingParams(1, key=key))
        await asyncio.gather(first.run(held), second.run(second.admit(SamplingParams(1))))
        await models.stop()

    run(work)


def test_a_request_gets_back_what_it_did_not_need(three: dict[str, Path]) -> None:
    key = Key("mine", nfe_per_minute=0.01)

    async def work() -> None:
        models = models_of(three)
        await models.start()
        service = await models.get("a")
        sparing = {"policy": "nucleus", "nucleus_p": 1e-6}
        admitted = service.admit(SamplingParams(2, settings=sparing, key=key))
        used = partial(service.shared.quotas._now_used, key, "nfe", 0.01)
        assert used() == pytest.approx(2 * 3 * 3, abs=0.1)  # of each of three experts in each step
        await service.run(admitted)
        assert used() == pytest.approx(2 * 3, abs=0.1)
        await models.stop()

    run(work)


def test_a_bundle_that_cannot_be_loaded_costs_only_itself(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "bundle", tmp_path / "bad")

    async def work() -> None:
        models = models_of({"a": small_run, "bad": tmp_path / "bad"})
        next((tmp_path / "bad").glob("*.safetensors")).write_bytes(b"no")
        await models.start()
        with pytest.raises(ServingError, match="bad cannot be loaded"):
            await models.get("bad")
        assert names(models) == ["a"]
        await models.stop()

    run(work)


def test_a_folder_that_is_gone_or_damaged_costs_only_its_own_model(
    small_run: Path, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("a", "b", "c")}
    for name in ("a", "b"):
        shutil.copytree(small_run / "bundle", folders[name])

    async def work() -> None:
        models = models_of(folders, models_MiB=2.5 * _weights_mib(str(small_run)))
        await models.start()
        await models.get("b")
        with pytest.raises(ServingError, match="c cannot be loaded: .*c is not a folder"):
            await models.get("c")
        shutil.rmtree(folders["a"])
        shutil.copytree(small_run / "bundle", folders["c"])
        await models.get("c")  # a is dropped for it, though its folder is gone
        assert names(models) == ["b", "c"]
        service = await models.get("c")
        assert service.current is not None
        before = service.current.model.version
        shutil.rmtree(folders["b"])
        shutil.rmtree(folders["c"])
        other_weights(str(small_run), folders["c"])
        with pytest.raises(DdmError, match="^b: .*b is not a folder: [^;]*$"):
            await models.reload()
        assert service.current.model.version != before
        await models.stop()

    run(work)


def test_what_makes_no_sense_for_several_models_is_refused(small_run: Path) -> None:
    size = _weights_mib(str(small_run))
    for tree, said in (
        ({"run": "x", "models": {"a": "y"}}, "run must be left out where models are given"),
        ({"models": {"a": "y"}, "serve": {"name": "z"}}, "serve.name must be left out"),
        ({"models": {"a": "y"}, "serve": {"placement": "ray"}}, "serve.placement must be local"),
        ({"models": {"a/b": "y"}}, "models must have 1 to 256 printable characters"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings(tree)
    with pytest.raises(ConfigError, match="serve.models_MiB must be at least the .* MiB of a"):
        models_of({"a": small_run}, models_MiB=size / 2)


def test_a_request_names_its_model(small_run: Path, small_labels_run: Path, start: Start) -> None:
    words = [f"models.small={small_run}", f"models.labels={small_labels_run}", "sample.steps=3"]
    server = start(Path("serve.device=cpu"), *words)
    cards = server.request("/v1/models").json["data"]
    assert [(card["id"], card["loaded"]) for card in cards] == [("small", True), ("labels", False)]
    for name, folder in ((None, small_run), ("labels", small_labels_run), ("small", small_run)):
        body = {"seed": 4, "n": 2, "format": "npz", **({"model": name} if name else {})}
        reply = server.request("/v1/samples", body)
        assert same(images(reply), pixels(load(folder).sample(2, seed=4, steps=3)))
    job = server.request("/v1/jobs", {"model": "labels"}).json
    assert job["model"] == "labels"
    ready = server.request("/readyz").json
    assert set(ready["models"]) == {"small", "labels"} and "labels/expert-00" in ready["experts"]
    assert server.request("/v1/models/labels").json["vocabulary"] is not None
    reply = server.request("/v1/samples", {"model": "other"})
    assert (reply.status, reply.error["type"]) == (404, "model_not_found")
    assert reply.error["message"] == "model must be one of 'small', 'labels', got 'other'"
