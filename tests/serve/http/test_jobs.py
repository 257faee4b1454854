"""Jobs: asked for now and fetched later by a client that may leave meanwhile; queue, cancelling, limits, webhooks."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ddm.errors import ConfigError
from serve import load
from serve.engine.shares import Key
from serve.http import webhooks
from serve.http.middleware import LimitsMiddleware
from serve.http.webhooks import check_webhook, signature
from tests.serve.conftest import JSON, Reply, Start, pixels, request, same
from tests.serve.http.test_app import images
from tests.serve.http.test_app_states import Served, served
from tests.serve.http.test_keys import bearer

KEYS = {"a": Key("alice"), "b": Key("bob"), "c": Key("urgent", priority=1)}
KEYS["d"] = Key("dora", nfe_per_minute=1000)


class JobsOf:
    """Jobs over HTTP, of one key."""

    def __init__(self, it: Served, token: str = "a") -> None:
        self.app = LimitsMiddleware(it.app, KEYS)
        self.headers = bearer(token)

    async def submit(self, tree: Any, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await request(self.app, "/v1/jobs", tree, headers={**self.headers, **named})

    async def ask(self, path: str, method: str = "GET") -> Reply:
        return await request(self.app, f"/v1/jobs{path}", method=method, headers=self.headers)

    async def until(self, job_id: str, status: str) -> Any:
        async with asyncio.timeout(20):
            while (job := (await self.ask(f"/{job_id}")).json)["status"] != status:
                await asyncio.sleep(0.01)
        return job


def test_a_job_survives_its_client_and_its_result_is_fetched_as_often_as_wanted(
    small_run: Path, start: Start
) -> None:
    server = start(small_run, "sample.steps=3")
    body = {"n": 2, "seed": 5, "format": "npz"}
    connection = server.connect()
    connection.request("POST", "/v1/jobs", json.dumps(body), JSON)
    job = json.loads(connection.getresponse().read())
    connection.close()  # gone
    server.await_metric("ddm_jobs_total", 1)
    for _ in range(2):
        reply = server.request(f"/v1/jobs/{job['id']}/result")
        assert reply.status == 200 and reply.headers["ddm-seed"] == "5"
        assert same(images(reply), pixels(load(small_run).sample(2, seed=5, steps=3)))
    assert server.request(f"/v1/jobs/{job['id']}").json["images"] == 2


def test_a_job_goes_from_the_queue_to_its_result(small_run: Path) -> None:
    async def test(it: Served) -> None:
        alice, urgent = JobsOf(it), JobsOf(it, "c")
        first = await alice.submit({"n": 2})
        assert first.status == 202
        assert first.headers["location"] == f"jobs/{first.json['id']}"
        await it.until_asked()
        second = (await alice.submit({})).json
        assert (second["status"], second["position"], second["estimate_s"]) == ("queued", 1, None)
        before = (await urgent.submit({})).json
        assert before["position"] == 1
        it.service.pace = 4.0
        second = (await alice.ask(f"/{second['id']}")).json
        assert (second["position"], second["nfe_left"]) == (2, 4)
        assert second["estimate_s"] == (8 + 4 + 4) / 4
        running = (await alice.ask(f"/{first.json['id']}")).json
        assert (running["status"], running["position"], running["images"]) == ("running", 0, 0)
        early = await alice.ask(f"/{second['id']}/result")
        assert (early.status, early.error["type"]) == (409, "no_result")
        it.open()
        done = await alice.until(second["id"], "done")
        assert done["images"] == 1 and done["nfe_left"] == 0 and done["error"] is None
        assert done["created"] <= done["started"] <= done["ended"]
        assert done["expires"] == done["ended"] + 60
        assert (await urgent.ask(f"/{before['id']}")).json["ended"] <= done["ended"]
        result = await alice.ask(f"/{second['id']}/result")
        assert result.headers["content-type"] == "image/png"
        listed = (await alice.ask("")).json["data"]
        assert [job["id"] for job in listed] == [first.json["id"], second["id"]]
        assert it.counted("jobs_total", status="done") == 3

    served(small_run, test, "serve.jobs.running=1", "serve.jobs.keep_s=60")


def test_a_cancelled_job_frees_its_experts_at_once(small_run: Path) -> None:
    async def test(it: Served) -> None:
        alice = JobsOf(it)
        jobs = [(await alice.submit({"n": 30})).json for _ in range(2)]
        await it.until_asked()
        asked = sum(gate.asked for gate in it.gates)
        engine = it.service.current.engine  # type: ignore[union-attr]
        for job in reversed(jobs):  # the queued one first
            reply = await alice.ask(f"/{job['id']}", "DELETE")
            assert (reply.status, reply.json["status"]) == (200, "cancelled")
        assert not engine.requests
        assert [engine.waiting(k) for k in range(3)] == [0, 0, 0]
        assert await it.cost() == 0
        it.open()
        small = await request(it.app, "/v1/samples", {})
        assert small.status == 200
        # No expert was called again for the job's images, and each that was is free.
        assert sum(gate.asked for gate in it.gates) <= asked + 4
        assert (await alice.ask(f"/{jobs[0]['id']}/result")).status == 409
        assert (await alice.ask(f"/{jobs[0]['id']}", "DELETE")).status == 200  # and it is dropped
        assert (await alice.ask(f"/{jobs[0]['id']}")).status == 404
        assert it.counted("jobs_total", status="cancelled") == 2

    served(small_run, test, "serve.jobs.running=1")


def test_a_job_that_never_began_is_not_charged(small_run: Path) -> None:
    async def test(it: Served) -> None:
        dora, quotas = JobsOf(it, "d"), it.service.shared.quotas
        quotas.clock = lambda: 0.0
        jobs = [(await dora.submit({"n": 30})).json for _ in range(2)]
        await it.until_asked()
        left = 1000 - 30 * 4
        assert quotas.wait_s(KEYS["d"], 0, left) > 0
        await dora.ask(f"/{jobs[1]['id']}", "DELETE")
        assert quotas.wait_s(KEYS["d"], 0, left) == 0
        it.open()
        await dora.until(jobs[0]["id"], "done")

    served(small_run, test, "serve.jobs.running=1")


def test_jobs_are_their_key_s_alone(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open()
        alice, bob = JobsOf(it), JobsOf(it, "b")
        job = (await alice.submit({})).json
        for path, method in (("", "GET"), ("/result", "GET"), ("", "DELETE")):
            assert (await bob.ask(f"/{job['id']}{path}", method)).status == 404
        assert (await bob.ask("")).json["data"] == []
        assert (await alice.until(job["id"], "done"))["model"] == it.service.name

    served(small_run, test)


def test_the_same_idempotency_key_gives_the_same_job(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open()
        alice = JobsOf(it)
        first = await alice.submit({"n": 2}, idempotency_key="mine")
        again = await alice.submit({"n": 2}, idempotency_key="mine")
        assert (first.status, again.status) == (202, 200)
        assert again.json["id"] == first.json["id"]
        other = await alice.submit({"n": 3}, idempotency_key="mine")
        assert other.status == 422
        assert "Idempotency-Key must be new for another request" in other.error["message"]
        bob = await JobsOf(it, "b").submit({"n": 2}, idempotency_key="mine")
        assert bob.json["id"] != first.json["id"]
        assert (await alice.submit({}, idempotency_key="")).status == 422

    served(small_run, test)


def test_what_is_kept_is_bounded(small_run: Path) -> None:
    async def test(it: Served) -> None:
        alice = JobsOf(it)
        ids = [(await alice.submit({"format": "npz"})).json["id"] for _ in range(3)]
        full = await alice.submit({})
        assert full.status == 429 and "3 jobs are under way" in full.error["message"]
        it.open()
        ended = {job_id: (await alice.until(job_id, "done"))["ended"] for job_id in ids}
        for refused in ({"scale": 1024}, {"clusters": ["nine"]}):
            assert (await alice.submit(refused)).status == 422
        assert [job["id"] for job in (await alice.ask("")).json["data"]] == ids  # nothing was lost
        more = (await alice.submit({})).json["id"]  # in place of the one that ended first
        await alice.until(more, "done")
        left = [job["id"] for job in (await alice.ask("")).json["data"]]
        first = min(ids, key=ended.__getitem__)
        assert left == [*(job_id for job_id in ids if job_id != first), more]
        later = time.time() + 61
        with patch("serve.engine.job_queue.time.time", lambda: later):
            assert (await alice.ask("")).json["data"] == []

    served(small_run, test, "serve.jobs.kept=3", "serve.jobs.keep_s=60")


def test_results_share_a_bounded_memory(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open()
        alice = JobsOf(it)
        ids = []
        for _ in range(3):
            ids.append((await alice.submit({"format": "npz"})).json["id"])
            await alice.until(ids[-1], "done")
            size = len((await alice.ask(f"/{ids[-1]}/result")).body)
            it.service.settings.serve.jobs.memory_MiB = 2.5 * size / 2**20
        assert [job["id"] for job in (await alice.ask("")).json["data"]] == ids[1:]
        large = (await alice.submit({"n": 60, "format": "npz", "trace": True})).json["id"]
        failed = await alice.until(large, "failed")
        assert failed["error"]["type"] == "invalid_value"
        assert "give a result of at most" in failed["error"]["message"]

    served(small_run, test)


def test_a_job_that_fails_says_why(small_run: Path) -> None:
    async def test(it: Served) -> None:
        it.open(RuntimeError("broken"))
        alice = JobsOf(it)
        job = await alice.until((await alice.submit({})).json["id"], "failed")
        assert job["error"]["type"] == "unavailable" and "broken" in job["error"]["message"]
        it.service.settings.serve.jobs.deadline_s = 0.3
        late = JobsOf(it)
        for gate in it.gates:
            gate.open.clear()
        job = await late.until((await late.submit({})).json["id"], "failed")
        assert job["error"] == {"type": "deadline", "message": "not done within 0.3 s"}

    served(small_run, test)


@pytest.mark.parametrize(
    "tree", [{"stream": True}, {"n": 0}, {"trace": True}, {"webhook": "https://evil"}, {"x": 1}]
)
def test_a_bad_job_is_refused_at_once(small_run: Path, tree: Any) -> None:
    async def test(it: Served) -> None:
        reply = await JobsOf(it).submit(tree)
        assert (reply.status, reply.error["type"]) == (422, "invalid_value")
        assert await it.cost() == 0

    served(small_run, test)


def test_the_end_of_a_job_is_told_to_its_webhook_and_signed(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts: list[tuple[str, bytes, dict[str, str]]] = []

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        assert threading.current_thread().name.startswith("webhook")  # none of those that encode
        posts.append((url, body, headers))
        return 500 if len(posts) == 1 else 204

    monkeypatch.setattr(webhooks, "post", post)
    monkeypatch.setattr(webhooks, "_PAUSES_S", (0, 0, 0))
    (tmp_path / "secret").write_text("sesame\n")

    async def test(it: Served) -> None:
        it.open()
        job = (await JobsOf(it).submit({"webhook": "https://hooks.example:8443/done?x=1"})).json
        await it.until(lambda: len(posts) == 2)
        url, body, headers = posts[1]
        assert url == "https://hooks.example:8443/done?x=1"
        told = json.loads(body)
        assert (told["id"], told["status"]) == (job["id"], "done") and told["ended"] is not None
        signed = f"{job['id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.new(b"sesame", signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        assert headers["webhook-id"] == job["id"]

    served(
        small_run,
        test,
        "serve.jobs.webhook_hosts=[hooks.example:8443]",
        f"serve.jobs.webhook_secret_file={tmp_path / 'secret'}",
    )


def test_webhooks_are_https_to_listed_hosts() -> None:
    hosts = ["Hooks.example", "other.example:8443"]
    for url in ("https://hooks.example/a", "https://other.example:8443", "https://HOOKS.example"):
        check_webhook(url, hosts)
    for url in (
        "http://hooks.example/a",
        "https://hooks.example:8443/a",
        "https://user@hooks.example/a",
        "https://hooks.example.evil/a",
        "https://evil/hooks.example",
        "https://hooks.example/a\r\nx: y",
        "https://hooks.example/a b",
        "https://[hooks.example",
        "file:///etc/passwd",
        "",
    ):
        with pytest.raises(ConfigError, match="webhook must be https and of a host in"):
            check_webhook(url, hosts)


def test_a_signature_is_that_of_the_standard_s_example() -> None:
    # From the specification of standard webhooks.
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body) == expected
