"""`python -m serve`: what it refuses to start with, how it ends, and new weights while it runs."""

import http.client
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.load.child import free_port
from ddm.artifacts import read_artifact, read_json, sha256, write_artifact, write_json
from serve import load
from serve.__main__ import main
from serve.settings import settings
from tests.serve.conftest import JSON, Server, Start, pixels, same
from tests.serve.http.test_app import images


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says as it refuses."""
    before = signal.getsignal(signal.SIGHUP)  # which children of this process would inherit
    assert main(list(words)) == 2
    signal.signal(signal.SIGHUP, before)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("serve.prot=1", "prot"),
        ("serve.port=many", "serve.port"),
        ("serve.port=70000", "serve.port must be in [0, 65535], got 70000"),
        ("serve.limits.n=0", "serve.limits.n must be above 0, got 0"),
        ("serve.degraded=perhaps", "serve.degraded"),
        ("sample.steps=0", "sample.steps must be a whole number in [1, 1000], got 0"),
        ("sample.sampler=dimm", "sample.sampler must be one of"),
        ("sample.clusters={nine: 1.0}", "sample.clusters must be one of"),
        (
            "serve.token_file=/nowhere/token",
            "serve.token_file must be a file with a token, got '/nowhere/token'",
        ),
        (
            "serve.host=0.0.0.0",
            "serve.host must be this machine's own (127.0.0.1) unless serve.token_file or serve.keys is given",
        ),
        ('serve.host="::"', "serve.host must be this machine's own"),
        ("serve.host=example.com", "serve.host must be this machine's own"),
        ("serve.limits.pending", "give the folder of one run or bundle"),
    ],
)
def test_a_bad_key_ends_it_with_status_2_and_a_line_that_names_it(
    small_run: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    assert said in refused(capsys, str(small_run), "serve.port=0", word)


def test_a_run_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert f"{tmp_path / 'none'} is not a folder" in refused(
        capsys, str(tmp_path / "none"), "serve.port=0"
    )
    assert f"{tmp_path / 'manifest.json'} is missing" in refused(
        capsys, str(tmp_path), "serve.port=0"
    )
    assert "give the folder of one run or bundle" in refused(capsys)


def test_help_is_a_page_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "ddm serve RUN" in capsys.readouterr().out


def test_a_token_allows_a_host_beyond_this_machine_and_so_does_open(
    small_run: Path, tmp_path: Path, start: Start
) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    server = start(small_run, "serve.host=0.0.0.0", f"serve.token_file={token}", "sample.steps=2")
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    assert server.request("/v1/samples", {}).status == 401
    assert (
        server.request("/v1/samples", {}, {**JSON, "authorization": "Bearer sesame"}).status == 200
    )
    assert server.request("/healthz").status == 200


@pytest.mark.parametrize(
    "name", ["expert-01.safetensors", "expert-01.json", "router.safetensors", "manifest.json"]
)
def test_a_tampered_artifact_is_refused_by_name(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_run / "bundle", bundle)
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 0x80
    (bundle / name).write_bytes(content)
    assert str(bundle / name) in refused(capsys, str(bundle), "serve.port=0")


def test_a_tampered_artifact_ends_the_process_before_anything_is_served(
    small_run: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_run / "bundle", bundle)
    weights = bundle / "expert-01.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    words = [sys.executable, "-m", "serve", str(bundle), "serve.port=0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {weights} is damaged or foreign: its SHA-256 is ")
    assert done.stderr.count("\n") == 1


def test_nothing_is_unpickled_from_a_bundle(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this would unpickle")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, never)
    assert load(small_run).sample(1, steps=2).isfinite().all()
    assert load(small_run / "bundle").sample(1, steps=2).isfinite().all()


def test_a_port_that_is_taken_is_said_in_one_line(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as record:
        port = record.getsockname()[1]
        said = refused(capsys, str(small_run), f"serve.port={port}")
    assert f"got 127.0.0.1 {port}: Address already in use" in said


@contextmanager
def begun(server: Server, n: int, steps: int) -> Iterator[http.client.HTTPResponse]:
    """A request that is under way."""
    with closing(server.connect(120)) as connection:
        body = json.dumps(
            {"n": n, "steps": steps, "stream": True, "preview_every": 0, "trace": True}
        )
        connection.request("POST", "/v1/samples", body, JSON)
        with connection.getresponse() as answer:
            assert any(line == b"event: step\n" for line in answer)
            yield answer


def test_requests_beyond_the_drain_end_with_an_error(small_run: Path, start: Start) -> None:
    server = start(small_run, "serve.max_batch=1", "serve.drain_s=0.5")
    with begun(server, 64, 250) as answer:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        rest = answer.read().decode()
    assert rest.rstrip().splitlines()[-2] == "event: error"
    assert "the server is stopping" in rest
    assert "Traceback" not in server.output
    with pytest.raises(ConnectionRefusedError):
        server.request("/healthz")


def test_a_drain_finishes_requests_under_way_and_refuses_others(
    small_run: Path, start: Start
) -> None:
    server = start(small_run, "serve.max_batch=1", "serve.drain_s=600")
    with begun(server, 16, 100) as answer:
        server.process.send_signal(signal.SIGTERM)
        while (ready := server.request("/readyz")).status == 200:
            pass
        assert ready.json["status"] == "stopping"
        refused = server.request("/v1/samples", {"steps": 1})
        assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
        assert "the server is stopping" in refused.error["message"]
        assert b"event: done\n" in answer.read()
    assert server.process.wait(60) == -signal.SIGTERM
    assert server.output.count("\n") == 2  # which bundle, and where


def test_a_second_signal_ends_it_at_once(small_run: Path, start: Start) -> None:
    server = start(small_run, "serve.max_batch=1", "serve.drain_s=600", "serve.limits.steps=1000")
    with begun(server, 64, 1000) as answer:
        server.process.send_signal(signal.SIGTERM)
        while server.request("/readyz").status == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == -signal.SIGTERM
        assert b"event: done\n" not in answer.read()
    assert "Traceback" not in server.output


def test_sigterm_ends_an_idle_server(small_run: Path, start: Start) -> None:
    server = start(small_run)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == -signal.SIGTERM


def test_sighup_is_ignored_before_the_imports_that_take_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGHUP)
    seen: list[object] = []
    monkeypatch.setattr(
        "serve.__main__._serve", lambda _: seen.append(signal.getsignal(signal.SIGHUP))
    )
    try:
        assert main(["demo"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_sighup_while_it_starts_does_not_end_it(small_run: Path, start: Start) -> None:
    server = start(small_run, ready=False)
    status = Path(f"/proc/{server.process.pid}/status")
    while (
        server.process.poll() is None
    ):  # until the interpreter is up: nothing can be handled before
        ignored = next(line for line in status.read_text().splitlines() if "SigIgn" in line)
        if int(ignored.split()[1], 16) >> (signal.SIGHUP - 1) & 1:
            break
        time.sleep(0.01)
    for _ in range(20):
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    server.await_ready()
    assert server.request("/healthz").status == 200


def test_two_servers_started_together_do_not_share_a_port(small_run: Path, start: Start) -> None:
    port = free_port()
    both = [start(small_run, f"serve.port={port}", ready=False) for _ in range(2)]
    while all(server.process.poll() is None for server in both):
        time.sleep(0.05)
    (loser,) = (server for server in both if server.process.poll() is not None)
    (winner,) = (server for server in both if server is not loser)
    assert loser.process.returncode == 2
    assert loser.output.startswith("error: serve.host and serve.port must be a free address")
    assert loser.output.count("\n") == 1
    winner.await_ready()


def test_the_models_name_is_that_of_the_folder_as_given(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(small_run)
    for folder, words, name in (
        (small_run, [], "small"),
        (small_run / "bundle", [], "small"),
        (tmp_path / "current", [], "current"),
        (tmp_path / "current" / "bundle", [], "current"),
        (tmp_path / "current" / "..", [], tmp_path.name),
        (small_run, ["serve.name=digits of mine"], "digits of mine"),
    ):
        assert settings({"run": str(folder)}, words).name() == name


@pytest.mark.parametrize("strange", ["file", "fifo", "/dev/zero", "a" * 300, "file/below"])
def test_a_run_that_is_no_folder_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strange: str
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    run = str(tmp_path / strange)
    assert run in refused(capsys, run, "serve.port=0")


def test_a_token_file_that_is_a_pipe_is_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    said = refused(capsys, str(small_run), f"serve.token_file={tmp_path / 'fifo'}")
    assert "serve.token_file must be a file with a token" in said


def other_weights(bundle: Path) -> None:
    """Another bundle in the place of this one: its second expert with other weights."""
    stem = bundle / "expert-01"
    tensors, facts = read_artifact(stem)
    changed = {
        name: tensor + 0.05 if name.endswith("weight") else tensor
        for name, tensor in tensors.items()
    }
    write_artifact(stem, changed, facts)
    manifest = read_json(bundle / "manifest.json")
    manifest["artifacts"]["expert-01"] = sha256(stem.with_suffix(".json"))
    write_json(bundle / "manifest.json", manifest)


def test_sighup_switches_to_new_weights_and_what_is_under_way_ends_on_the_old(
    small_run: Path, tmp_path: Path, start: Start
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_run / "bundle", bundle)
    old = load(bundle)
    server = start(bundle, "serve.max_batch=4")
    given = {"seed": 1, "steps": 3, "n": 2, "policy": "full", "source": "prior"}
    before = server.request("/v1/samples", {**given, "format": "npz"})
    assert before.headers["ddm-version"] == old.version
    with begun(server, 16, 100) as answer:
        other_weights(bundle)
        new = load(bundle)
        server.process.send_signal(signal.SIGHUP)
        server.await_output(new.version[:12])
        after = server.request("/v1/samples", {**given, "format": "npz"})
        rest = answer.read()
    assert after.headers["ddm-version"] == new.version != old.version
    assert same(
        images(before), pixels(old.sample(2, **{k: v for k, v in given.items() if k != "n"}))
    )
    assert same(
        images(after), pixels(new.sample(2, **{k: v for k, v in given.items() if k != "n"}))
    )
    assert not same(images(after), images(before))
    assert rest.count(b"event: image\n") == 16 and b"event: done\n" in rest
    assert old.version.encode() in rest and new.version.encode() not in rest
    server.await_metric("ddm_active_requests", 0)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130


def test_sighup_with_a_damaged_bundle_keeps_the_old_weights(
    small_run: Path, tmp_path: Path, start: Start
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_run / "bundle", bundle)
    server = start(bundle, "sample.steps=2")
    before = server.request("/v1/samples", {"seed": 1, "format": "npz"})
    other_weights(bundle)
    weights = bundle / "expert-02.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    server.process.send_signal(signal.SIGHUP)
    server.await_output("the old weights stay")
    assert str(weights) in server.output
    after = server.request("/v1/samples", {"seed": 1, "format": "npz"})
    assert after.headers["ddm-version"] == before.headers["ddm-version"]
    assert (images(after) == images(before)).all()
