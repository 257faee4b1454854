"""The installed program, used from a folder whose files have the names of its packages."""

import json
import os
import signal
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import ddm_cli
from benchmarks.load.child import free_port
from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[1]


def packaged() -> list[str]:
    """Every file of the packages that the program reads or imports."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [name.removesuffix("*") for name in setuptools["packages"]["find"]["include"]]
    files = [
        path
        for name in packages
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return sorted({str(path.relative_to(ROOT)) for path in files})


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == packaged()


def test_the_sdist_holds_the_whole_project(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = ["Makefile", "constraints.txt", "docs/deploy.md", "docker/Dockerfile"]
    assert {*packaged(), *beside, "tests/test_wheel.py"} <= names


@pytest.fixture
def ddm(installed_ddm: Path, hostile: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ddm(word, ..., **environment)` runs the command in the hostile folder."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installed_ddm, *words],
            cwd=hostile,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_it_trains_and_serves(
    ddm: Callable[..., subprocess.CompletedProcess[str]], installed_ddm: Path, hostile: Path
) -> None:
    stages = ["partition", "expert", "router", "bundle"]
    trained = ddm(
        "train", "digits", *stages, *SMALL, "run=mine", "partition.k=2", "expert.workers=2"
    )
    assert trained.returncode == 0, trained.stderr
    assert (hostile / "mine" / "bundle" / "manifest.json").is_file()
    serves(installed_ddm, hostile, "mine")


def test_it_serves_the_demo_before_anything_is_trained(installed_ddm: Path, hostile: Path) -> None:
    serves(installed_ddm, hostile, "demo")


def serves(installed_ddm: Path, hostile: Path, run: str) -> None:
    """`ddm serve RUN` in the hostile folder gives an image and the page."""
    port = free_port()
    child = subprocess.Popen(
        [installed_ddm, "serve", run, f"serve.port={port}"],
        cwd=hostile,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(hostile)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if "http://" in line:
                break
        body = json.dumps({"n": 1, "steps": 2}).encode()
        request = Request(
            f"http://127.0.0.1:{port}/v1/samples", body, {"content-type": "application/json"}
        )
        assert urlopen(request, timeout=60).read().startswith(b"\x89PNG")
        page = urlopen(f"http://127.0.0.1:{port}/", timeout=60).read()
        assert b"<html" in page
    finally:
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=60)
    assert "hijacked" not in rest


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "ddm train [CONFIG]"),
        ("serve", "ddm serve RUN"),
        ("sample", "ddm sample RUN"),
        ("evaluate", "ddm evaluate RUN"),
        ("table", "usage: ddm table"),
        ("ablations", "usage: ddm ablations"),
        ("load", "usage: ddm load"),
        ("import", "ddm import diffusers"),
        ("completion", "ddm completion bash"),
    ],
)
def test_help(
    ddm: Callable[..., subprocess.CompletedProcess[str]], command: str, said: str
) -> None:
    done = ddm(command, "--help", PYTHONPATH=".")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)


def test_help_lists_every_command(ddm: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = ddm("--help", PYTHONPATH=".")
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("    ddm ")]
    assert listed == list(ddm_cli.COMMANDS)


def test_it_samples_a_folder_of_images(
    ddm: Callable[..., subprocess.CompletedProcess[str]], hostile: Path
) -> None:
    words = ["sample", "demo", "steps=2", "format=folder", "out=mine"]
    assert ddm(*words, "n=2").returncode == 0
    first = (hostile / "mine" / "000000.png").stat().st_mtime_ns
    assert ddm(*words, "n=3").returncode == 0
    assert sorted(path.name for path in (hostile / "mine").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "samples.json",
    ]
    assert (hostile / "mine" / "000000.png").stat().st_mtime_ns == first


def test_python_m_says_that_it_found_a_foreign_module(installed_ddm: Path, hostile: Path) -> None:
    (hostile / "train.py").unlink()
    done = subprocess.run(
        [installed_ddm.parent / "python", "-m", "train", "digits"],
        cwd=hostile,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the module benchmarks was found at {hostile}/benchmarks")
    assert "use the command `ddm`" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_projects(ddm: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ddm("--version").stdout == f"ddm {project['version']}\n"


def test_an_unknown_command_is_refused(
    ddm: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = ddm("trian")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the command must be one of {', '.join(ddm_cli.COMMANDS)}, got 'trian'\n"
    )
