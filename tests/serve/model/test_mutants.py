"""Mutants of a bundle, with all hashes redone: each is refused by an error that names a file, or works.

DDM_MUTANTS sets how many of each kind the tests make. `python tests/serve/model/test_mutants.py BUNDLE` makes as many
in processes of their own and prints the longest CPU time and the largest memory that one took.
"""

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddm.errors import ArtifactError, ConfigError
from serve import load

COUNT = int(os.environ.get("DDM_MUTANTS", "60"))
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 4, 8, 64, 10**4, 10**6, 2**31, 2**63 - 1, 2**64),
    *(-(2**63), 1.5, -0.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("", "x", "nan", "1", "???", "${oc.env:HOME}", "../../x", "\ud800", "0" * 64, "y" * 10**4),
    *([], {}, [[]], [None], [1], [1, 8, 8], ["a"], {"a": 1}, {"name": "edm"}),
    *(list(range(10**4)), {str(i): i for i in range(10**3)}),
]
SCHEDULES: list[dict[str, Any]] = [
    *({"name": name} for name in ("edm", "vp_cosine", "rectified_flow", "ve_polynomial")),
    *({"name": "vp_linear", "beta_max": value} for value in (1e-9, 1.0, 1e9, 1e300, "20", None)),
    *({"name": "two_phase", "steps": value} for value in (2, 2.5, 10**5, 10**9, 2**63)),
    *({"name": "edm", "sigma_max": value} for value in (0, -1, 1e-300, 1e30, 1e300, True)),
    *({"name": name} for name in (None, [], {}, "vp", "LinearSDE")),
]
HEADER_ACTIONS = [
    *("dtype", "shape", "offsets", "rename", "drop", "copy"),
    *("meta", "length", "bits", "data", "cut"),
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X", None, 3]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(bundle: Path) -> None:
    """Redo every hash that is there, so that only the meaning of a mutant is wrong."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    mixture = manifest.get("mixture")
    if isinstance(mixture, dict) and isinstance(mixture.get("hash"), str):
        keys = ("shape", "names", "weights", "clusters")
        mixture["hash"] = digest({key: mixture[key] for key in keys if key in mixture})
    for json_path in bundle.glob("*.json"):
        facts = json.loads(json_path.read_text())
        if json_path.name in (path.name, "history.json") or not isinstance(facts, dict):
            continue
        if isinstance(facts.get("sha256"), str):
            facts["sha256"] = sha256(json_path.with_suffix(".safetensors"))
        if isinstance(facts.get("mixture"), str) and isinstance(mixture, dict):
            facts["mixture"] = mixture.get("hash")
        json_path.write_text(json.dumps(facts))
        artifacts = manifest.get("artifacts")
        if isinstance(artifacts, dict) and isinstance(artifacts.get(json_path.stem), str):
            artifacts[json_path.stem] = sha256(json_path)
    path.write_text(json.dumps(manifest))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    keys: list[Any] = []
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = list(range(len(tree)))
    found = [(tree, key) for key in keys]
    return found + [place for key in keys for place in places(tree[key])]


def changed(rng: random.Random, old: Any, others: list[Any]) -> Any:
    number = isinstance(old, int | float) and not isinstance(old, bool)
    near = [old * 2, old * 1000, old + 1, old - 1, -old, old / 2, str(old)] if number else []
    wrapped = [[old], {"x": old}, str(old), nested(300), copy.deepcopy(rng.choice(others))]
    return rng.choice([rng.choice(VALUES), rng.choice(near or VALUES), rng.choice(wrapped)])


def mutate_json(rng: random.Random, bundle: Path) -> str:
    """Change one fact of one file."""
    path = rng.choice(sorted(set(bundle.glob("*.json")) - {bundle / "history.json"}))
    tree = json.loads(path.read_text())
    found = places(tree)
    container, key = rng.choice(found)
    old = container[key]
    action = rng.choice(["change", "change", "change", "change", "delete", "add", "whole"])
    if action == "delete":
        del container[key]
    elif action == "add" and isinstance(container, dict):
        container[rng.choice(["x", "", "__class__", "expert-99", str(key) * 2])] = old
    elif action == "add":
        container.insert(0, copy.deepcopy(old))
    elif action == "whole" and rng.random() < 0.3:
        tree = rng.choice(VALUES)
    else:
        container[key] = changed(rng, old, [c[k] for c, k in found])
    path.write_text(json.dumps(tree))
    return f"{path.name} {action} {key}"


def mutate_everywhere(rng: random.Random, bundle: Path) -> str:
    """Change a fact that all files must share, in all of them."""
    key, value = rng.choice(
        [
            *(("schedule", schedule) for schedule in SCHEDULES),
            *(("shape", shape) for shape in ([1, 16, 16], [3, 8, 8], [1, 8, 4], [1, 4096, 4096])),
            ("shape", [64, 2, 2]),
        ]
    )
    for path in bundle.glob("*.json"):
        if path.name == "history.json":
            continue
        facts = json.loads(path.read_text())
        inner = facts["mixture"] if path.name == "manifest.json" and key == "shape" else facts
        inner[key] = value
        path.write_text(json.dumps(facts))
    return f"{key} {value}"


def mutate_header(rng: random.Random, bundle: Path) -> str:
    """Change one thing of the header of one file of weights, or of its length."""
    path = rng.choice(sorted(bundle.glob("*.safetensors")))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    action = rng.choice(HEADER_ACTIONS)
    claimed: int | None = None
    match action:
        case "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        case "shape":
            shape = entry["shape"]
            options: list[Any] = [[*shape, 1], shape[::-1], [2**40], [2**63, 0], [-1], None, "x"]
            entry["shape"] = rng.choice([*options, [*shape, 2**62, 4], [0], [1.5], shape[:-1]])
        case "offsets":
            low, high = entry["data_offsets"]
            options = [[high, low], [low, high + 4], [low + 4, high], [0, 2**63], [-4, high]]
            entry["data_offsets"] = rng.choice([*options, None, [low], [low, low]])
        case "rename":
            header[rng.choice(["x", "", "../x", name + ".weight", "gaussian.mean"])] = header.pop(
                name
            )
        case "drop":
            del header[name]
        case "copy":
            header["x" * rng.choice([1, 10**4])] = entry
        case "meta":
            header["__metadata__"] = rng.choice([None, [], {"x": 1}, {"x": "y" * 10**5}, "x"])
        case "length":
            claimed = rng.choice([0, 1, size - 1, size + 1, 10**6, 10**8, 2**62, 2**64 - 1])
        case "data":
            place = rng.randrange(len(data) // 4) * 4
            data[place : place + 4] = rng.choice(
                [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"]
            )
        case "cut":
            del data[rng.randrange(len(data)) :]
    text = json.dumps(header).encode()
    if action == "bits":
        place = rng.randrange(len(text))
        text = text[:place] + bytes([text[place] ^ (1 << rng.randrange(8))]) + text[place + 1 :]
    length = (len(text) if claimed is None else claimed).to_bytes(8, "little")
    path.write_bytes(length + text + bytes(data))
    return f"{path.name} {action} {name}"


Mutate = Callable[[random.Random, Path], str]


def make(kind: Mutate, number: int, source: Path, folder: Path) -> str:
    rng = random.Random(number)
    shutil.copytree(source, folder)
    done = kind(rng, folder)
    if isinstance(json.loads((folder / "manifest.json").read_text()), dict):
        seal(folder)
    return f"mutant {number}: {done}"


def outcome(folder: Path) -> str:
    """`refused` or `works`; anything else is raised."""
    said = ""
    try:
        images = load(folder, "cpu").sample(2, steps=2, policy="full")
        assert images.isfinite().all()
    except ArtifactError as error:
        said = str(error)
    except ConfigError:  # the default sampler is not defined for every schedule
        return "works"
    assert not said or str(folder) in said, f"names no file of the bundle: {said}"
    assert len(said) < 2000
    return "refused" if said else "works"


@pytest.mark.parametrize("kind", [mutate_json, mutate_everywhere, mutate_header])
def test_a_mutant_is_refused_by_file_or_works(
    small_run: Path, tmp_path: Path, kind: Mutate
) -> None:
    found: Counter[str] = Counter()
    for number in range(COUNT):
        folder = tmp_path / "mutant"
        done = make(kind, number, small_run / "bundle", folder)
        try:
            found[outcome(folder)] += 1
        except Exception as error:
            raise AssertionError(done) from error
        shutil.rmtree(folder)
    assert found["refused"] > COUNT / 4


def measure(kind: Mutate, source: Path) -> None:
    """Make COUNT mutants, load each in a process of its own, and print the worst."""
    worst_s, worst_mb, found = (0.0, ""), (0.0, ""), Counter[str]()
    for number in range(COUNT):
        with tempfile.TemporaryDirectory() as scratch:
            done = make(kind, number, source, Path(scratch) / "mutant")
            receive, send = os.pipe()
            if (child := os.fork()) == 0:
                before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
                started = time.process_time()
                try:
                    said = outcome(Path(scratch) / "mutant")
                except BaseException as error:
                    said = f"FAULT {done}: {error!r}"
                took = time.process_time() - started
                more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
                os.write(send, json.dumps([said, took, more]).encode())
                os._exit(0)
            os.close(send)
            with os.fdopen(receive) as pipe:
                said, took, more = json.loads(pipe.read() or f'["FAULT died {done}", 0, 0]')
            os.waitpid(child, 0)
        if said.startswith("FAULT"):
            print(said)
        found[said.split()[0]] += 1
        worst_s, worst_mb = max(worst_s, (took, done)), max(worst_mb, (more, done))
    print(f"{kind.__name__}: {dict(found)}")
    print(
        f"  longest {worst_s[0]:.2f} CPU s ({worst_s[1]}), most memory {worst_mb[0]:.0f} MB ({worst_mb[1]})"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcome(Path(sys.argv[1]))  # imports and first uses are not a mutant's
    for each in (mutate_json, mutate_everywhere, mutate_header):
        measure(each, Path(sys.argv[1]))
