"""The service: what it accepts, when it gives up, and how it ends."""

import asyncio
import gc
import re
import shutil
from pathlib import Path

import pytest
import torch

from ddm.errors import ConfigError, DdmError
from serve import load
from serve.engine.expert import ExpertAwayError, ServingError
from serve.engine.metrics import Metrics
from serve.engine.service import BusyError, SamplingParams, Service
from serve.settings import settings
from tests.serve.engine.service_harness import STEPS, Connected, images, run, same, serving, until


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
        (SamplingParams(seed=-1), "sample.seed", "be in [0, 2^63), got -1"),
        (SamplingParams(seed=2**63), "sample.seed", f"be in [0, 2^63), got {2**63}"),
        (SamplingParams(first_index=-1), "sample.first_index", "be in [0, 2^56 - n], got -1"),
        (
            SamplingParams(2, first_index=2**56 - 1),
            "sample.first_index",
            f"be in [0, 2^56 - n], got {2**56 - 1}",
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
            order = service.admit(SamplingParams(2, seed=2**63 - 1, first_index=2**56 - 2))
            await service.run(order)
            same(
                images(order),
                load(small_run).sample(2, seed=2**63 - 1, first_index=2**56 - 2, steps=STEPS),
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
