"""The service: what it accepts, when it gives up, and how it changes its weights under way."""

import asyncio
import gc
import re
import shutil
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from ddm.errors import ArtifactError, ConfigError, DdmError
from serve import load
from serve.engine.expert import ExpertAwayError, ServingError, UnavailableError
from serve.engine.metrics import Metrics
from serve.engine.service import AdmittedRequest, BusyError, SamplingParams, Service
from serve.engine.turn import Turn
from serve.model.model import Model
from serve.settings import settings

STEPS = 3


class Fake:
    """An expert of a model that can be held or be away, and counts its calls."""

    calls = 1

    def __init__(
        self, k: int, denoise: Callable[[Tensor, Tensor], Tensor], free: asyncio.Event
    ) -> None:
        self.name, self.denoise, self.free, self.turn = (
            f"expert-{k:02d}",
            denoise,
            free,
            Turn(1),
        )
        self.asked, self.away = 0, False

    async def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked += 1
        await self.free.wait()
        if self.away:
            raise UnavailableError("no route")
        with torch.inference_mode():
            return self.denoise(x, t)

    async def check(self) -> None:
        if self.away:
            raise UnavailableError("no route")


class Connected:
    """Connects a service to fakes of the experts of its bundle; `free` holds them all."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.experts: list[Fake] = []  # of the version that was connected last

    def __call__(self, model: Model, folder: Path, turn: Turn) -> list[Fake]:
        assert not model.experts  # they are elsewhere
        self.experts = [Fake(k, expert, self.free) for k, expert in enumerate(load(folder).experts)]
        return self.experts

    @property
    def asked(self) -> int:
        return sum(expert.asked for expert in self.experts)


@asynccontextmanager
async def serving(
    run: Path, *words: str, connect: Connected | None = None
) -> AsyncIterator[Service]:
    tree = {"run": str(run), "serve": {"device": "cpu"}, "sample": {"steps": STEPS}}
    service = Service(settings(tree, words), Metrics(), connect)
    await service.start()
    try:
        async with asyncio.timeout(60):
            yield service
    finally:
        if connect is not None:
            connect.free.set()
        await service.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def images(order: AdmittedRequest) -> Tensor:
    return torch.stack([order.request.images[place] for place in range(len(order.request.index))])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


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


def test_a_request_gets_the_images_and_the_trace_of_sample_with_the_service_s_own_defaults(
    small_run: Path,
) -> None:
    async def work() -> None:
        async with serving(small_run, "sample.sampler=heun") as service:
            order = service.admit(
                SamplingParams(
                    3, seed=5, first_index=2, trace=True, settings={"policy": "stochastic"}
                )
            )
            await service.run(order)
            expected, trace = load(small_run).sample(
                3,
                seed=5,
                first_index=2,
                steps=STEPS,
                sampler="heun",
                policy="stochastic",
                trace=True,
            )
            same(images(order), expected)
            found = order.trace()
            assert (
                found.t.equal(trace.t)
                and found.chosen.equal(trace.chosen)
                and found.calls == trace.calls
            )
            torch.testing.assert_close(found.alpha, trace.alpha, rtol=0, atol=1e-4)
            assert order.version.model.version == load(small_run).version

    run(work)


def test_a_seed_that_was_not_given_is_another_each_time_and_gives_the_same_images_again(
    small_run: Path,
) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            first, second = service.admit(SamplingParams(2)), service.admit(SamplingParams(2))
            assert first.seed != second.seed and 0 <= first.seed < 2**53
            await asyncio.gather(service.run(first), service.run(second))
            again = service.admit(SamplingParams(2, seed=first.seed))
            await service.run(again)
            same(images(again), images(first))
            same(images(first), load(small_run).sample(2, seed=first.seed, steps=STEPS))
            assert (images(first) - images(second)).abs().max() > 0.05

    run(work)


@pytest.mark.parametrize(
    ("params", "key", "said"),
    [
        (SamplingParams(0), "sample.n", "be in [1, 4], got 0"),
        (SamplingParams(5), "sample.n", "be in [1, 4], got 5"),
        (SamplingParams(settings={"steps": 21}), "sample.steps", "be in [1, 20], got 21"),
        (
            SamplingParams(settings={"steps": 0}),
            "sample.steps",
            "be a whole number in [1, 1000], got 0",
        ),
        (SamplingParams(seed=-1), "sample.seed", "be in [0, 2^63 - n), got -1"),
        (SamplingParams(seed=2**63), "sample.seed", f"be in [0, 2^63 - n), got {2**63}"),
        (SamplingParams(first_index=-1), "sample.first_index", "be in [0, 2^63 - n), got -1"),
        (
            SamplingParams(first_index=2**63 - 1),
            "sample.first_index",
            f"be in [0, 2^63 - n), got {2**63 - 1}",
        ),
        (SamplingParams(settings={"sampler": "best"}), "sample.sampler", "be one of euler"),
        (SamplingParams(settings={"clusters": {"nobody": 1.0}}), "sample.clusters", "be one of"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_by_its_key_and_costs_nothing(
    small_run: Path, params: SamplingParams, key: str, said: str
) -> None:
    async def work() -> None:
        async with serving(small_run, "serve.limits.n=4", "serve.limits.steps=20") as service:
            with pytest.raises(ConfigError, match=re.escape(f"{key} must {said}")) as error:
                service.admit(params)
            assert error.value.key == key
            assert service.pending == 0

    run(work)


def test_the_largest_seed_and_the_largest_number_of_an_image_are_served(small_run: Path) -> None:
    async def work() -> None:
        async with serving(small_run, "serve.limits.n=4") as service:
            order = service.admit(SamplingParams(2, seed=2**63 - 5, first_index=2**63 - 5))
            await service.run(order)
            same(
                images(order),
                load(small_run).sample(2, seed=2**63 - 5, first_index=2**63 - 5, steps=STEPS),
            )

    run(work)


def test_beyond_the_pending_cost_requests_are_turned_away_until_there_is_room_even_before_any_is_begun(
    small_run: Path,
) -> None:
    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(
            small_run, f"serve.limits.pending={10 * STEPS}", connect=connect
        ) as service:
            orders = [
                service.admit(SamplingParams(4, seed=1)),
                service.admit(SamplingParams(6, seed=2)),
            ]  # accepted, not yet made
            assert service.pending == 10 * STEPS
            with pytest.raises(
                BusyError, match=f"{10 * STEPS} expert evaluations are pending, and {STEPS} more"
            ) as busy:
                service.admit(SamplingParams(1))
            assert busy.value.retry_after_s >= 1
            making = [asyncio.create_task(service.run(order)) for order in orders]
            await until(lambda: connect.asked > 0)
            with pytest.raises(BusyError):
                service.admit(SamplingParams(1))
            connect.free.set()
            await asyncio.gather(*making)
            assert service.pending == 0
            await service.run(service.admit(SamplingParams(1)))
            service.pace = 1e-9
            orders = [service.admit(SamplingParams(10))]
            with pytest.raises(BusyError) as busy:
                service.admit(SamplingParams(1))
            assert busy.value.retry_after_s == 60
            del orders

    run(work)


def test_one_request_above_the_pending_limit_is_taken_where_nothing_else_is_pending(
    small_run: Path,
) -> None:
    async def work() -> None:
        async with serving(small_run, "serve.limits.pending=1") as service:
            order = service.admit(SamplingParams(2, seed=3))
            await service.run(order)
            same(images(order), load(small_run).sample(2, seed=3, steps=STEPS))

    run(work)


def test_an_order_that_is_dropped_before_it_is_made_costs_nothing_more(small_run: Path) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            order = service.admit(SamplingParams(4))
            assert service.pending == 4 * STEPS
            del order
            gc.collect()
            assert service.pending == 0

    run(work)


def test_beyond_the_deadline_a_request_ends_and_its_room_is_free(small_run: Path) -> None:
    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(small_run, "serve.limits.deadline_s=0.2", connect=connect) as service:
            with pytest.raises(TimeoutError):
                await service.run(service.admit(SamplingParams(4)))
            assert service.pending == 0
            assert service.current is not None and not service.current.engine.requests
            connect.free.set()
            service.settings.serve.limits.deadline_s = 60.0
            order = service.admit(SamplingParams(1, seed=2))
            await service.run(order)
            same(images(order), load(small_run).sample(1, seed=2, steps=STEPS))

    run(work)


def test_a_request_that_is_cancelled_frees_its_cost(small_run: Path) -> None:
    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(small_run, connect=connect) as service:
            stays, leaves = (
                asyncio.create_task(service.run(service.admit(SamplingParams(n)))) for n in (2, 3)
            )
            await until(lambda: connect.asked > 0)
            assert service.pending == 5 * STEPS
            leaves.cancel()
            await asyncio.wait([leaves])
            assert service.pending == 2 * STEPS
            connect.free.set()
            await stays

    run(work)


def test_an_expert_that_is_away_is_named_and_the_settings_of_failure_reach_the_engine(
    small_run: Path,
) -> None:
    async def work() -> None:
        for degraded, words in (
            ("fail", ["serve.retry_s=0.1"]),
            ("renormalize", ["serve.retry_s=0.1"]),
        ):
            connect = Connected()
            async with serving(
                small_run, f"serve.degraded={degraded}", *words, connect=connect
            ) as service:
                connect.experts[2].away = True
                order = service.admit(SamplingParams(2, seed=1, settings={"policy": "full"}))
                if degraded == "fail":
                    with pytest.raises(ExpertAwayError, match="expert-02 is away"):
                        await service.run(order)
                else:
                    await service.run(order)
                    model = load(small_run)
                    others = dict.fromkeys(model.names[:2], 1.0)
                    same(
                        images(order),
                        model.sample(2, seed=1, steps=STEPS, policy="full", clusters=others),
                    )
                    assert order.request.absent == {"expert-02"}

    run(work)


# New weights


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


# The end


def test_stopping_ends_requests_with_an_error_and_none_comes_after(small_run: Path) -> None:
    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(small_run, connect=connect) as service:
            going, waiting = service.admit(SamplingParams(2)), service.admit(SamplingParams(2))
            making = asyncio.create_task(service.run(going))
            await until(lambda: connect.asked > 0)
            await service.stop()
            with pytest.raises(ServingError, match="the server is stopping"):
                await making
            with pytest.raises(ServingError, match="the server is stopping"):
                await service.run(waiting)
            with pytest.raises(ServingError, match="no bundle is in service"):
                service.admit(SamplingParams(1))

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


def test_a_service_of_what_cannot_be_served_is_refused_by_name(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(small_run / "bundle", tmp_path / "bundle")
    for tree, said in (
        ({"run": str(tmp_path / "nothing")}, "nothing is not a folder"),
        (
            {"run": str(bundle), "sample": {"source": "analytic"}},
            "sample.source=analytic needs the training images",
        ),
        (
            {"run": str(bundle), "sample": {"clusters": {"x": 1.0}}},
            "sample.clusters must be one of .*, got 'x'",
        ),
        (
            {"run": str(bundle), "serve": {"device": "moon"}},
            "serve.device must be auto or a device .*, got 'moon'",
        ),
        (
            {"run": str(bundle), "serve": {"device": "cuda:99"}},
            "serve.device must be auto or a device .*, got 'cuda:99'",
        ),
    ):
        with pytest.raises(DdmError, match=said):
            Service(settings(tree), Metrics())


def test_the_gauges_are_what_is_pending_waiting_and_alive(small_run: Path) -> None:
    class Gauges(Metrics):
        def __init__(self) -> None:
            self.seen: dict[tuple[str, str], float] = {}

        def gauge(self, name: str, value: float, **label: str) -> None:
            self.seen[name, label.get("expert", "")] = value

    async def work() -> None:
        connect = Connected()
        connect.free.clear()
        async with serving(
            small_run, "serve.max_batch=2", "serve.retry_s=0.05", connect=connect
        ) as service:
            service.metrics = gauges = Gauges()
            name = load(small_run).names[1]
            one = {"clusters": {name: 1.0}, "policy": "top_k", "source": "prior"}
            making = asyncio.create_task(
                service.run(service.admit(SamplingParams(5, settings=one)))
            )
            await until(lambda: connect.asked > 0)
            service.observe()
            assert gauges.seen == {
                ("pending_cost", ""): 5 * STEPS,
                ("active_requests", ""): 1,
                **{("queue_length", f"expert-0{k}"): 3 * (k == 1) for k in range(3)},
                **{("expert_alive", f"expert-0{k}"): 1 for k in range(3)},
            }
            connect.experts[1].away = True
            connect.free.set()
            with pytest.raises(ExpertAwayError):
                await making
            service.observe()
            assert gauges.seen["expert_alive", "expert-01"] == 0
            assert gauges.seen["pending_cost", ""] == 0

    run(work)


def test_a_request_of_all_experts_costs_k_times_as_much_and_is_admitted_without_the_training_images(
    small_run: Path,
) -> None:
    async def work() -> None:
        async with serving(small_run) as service:
            assert service.current is not None
            service.current.model._images = lambda: pytest.fail("read on the event loop")
            order = service.admit(
                SamplingParams(4, settings={"policy": "full", "source": "analytic"})
            )
            assert service.pending == 4 * STEPS * 3
            del order

    run(work)
