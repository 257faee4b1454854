"""The house rules on imports, read from the syntax trees: who may know of whom."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "ddm", "experts", "router", "serve", "train")
MAY_IMPORT = {
    "configs": set(),
    "ddm": set(),
    "experts": {"ddm"},
    "router": {"ddm"},
    "serve": {"ddm", "experts", "router"},
    "train": {"configs", "ddm", "experts", "router", "serve"},
}
OURS = {*PACKAGES, "benchmarks", "ddm_cli", "tests"}
RAY_MAY_BE_IN = ("serve/ray_app/", "train/ray_")
DDM_STANDS_ON = {"torch", "numpy", "safetensors"}
NETWORK = {
    "asyncio",
    "ftplib",
    "http",
    "imaplib",
    "poplib",
    "smtplib",
    "socket",
    "socketserver",
    "ssl",
    "urllib",
    "xmlrpc",
}


class Import(NamedTuple):
    """`import module` or `from module import name as alias`, anywhere in a file."""

    file: str
    line: int
    module: str
    name: str | None = None
    alias: str | None = None

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_in(source: str, file: str) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found += [
                Import(file, node.lineno, name.name, None, name.asname) for name in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in ddm/y.py is `from ddm import x`.
            parents = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found += [
                Import(file, node.lineno, module, name.name, name.asname) for name in node.names
            ]
    return found


def files_of(package: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py"))


def imports_of(package: str) -> list[Import]:
    return [
        found for file in files_of(package) for found in imports_in((ROOT / file).read_text(), file)
    ]


def test_the_walk_sees_imports_of_every_form() -> None:
    lines = ["import a.b as c", "from d.e import f as g", "def h():"]
    lines += ["    from . import i", "    from .j import k", "    from .. import l"]
    source = "\n".join(lines)
    assert imports_in(source, "ddm/deep/x.py") == [
        Import("ddm/deep/x.py", 1, "a.b", None, "c"),
        Import("ddm/deep/x.py", 2, "d.e", "f", "g"),
        Import("ddm/deep/x.py", 4, "ddm.deep", "i"),
        Import("ddm/deep/x.py", 5, "ddm.deep.j", "k"),
        Import("ddm/deep/x.py", 6, "ddm", "l"),
    ]
    assert Import("x.py", 1, "a.b").top == "a"
    for package in PACKAGES:
        assert f"{package}/__init__.py" in files_of(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    assert [
        found
        for found in imports_of(package)
        if found.top in OURS - MAY_IMPORT[package] - {package}
        # `python -m` has the command line check whose packages it found.
        and not (found.top == "ddm_cli" and found.file == f"{package}/__main__.py")
    ] == []


def test_ddm_stands_on_torch_numpy_and_safetensors_alone() -> None:
    allowed = DDM_STANDS_ON | {"ddm"} | (sys.stdlib_module_names - NETWORK)
    assert [found for found in imports_of("ddm") if found.top not in allowed] == []


def test_ray_is_imported_only_where_it_is_served_or_clustered() -> None:
    everything = [found for package in PACKAGES for found in imports_of(package)]
    assert [
        found
        for found in everything
        if found.top == "ray" and not found.file.startswith(RAY_MAY_BE_IN)
    ] == []


def test_ray_serve_is_never_called_serve() -> None:
    everything = [found for package in PACKAGES for found in imports_of(package)]
    of_ray = [found for found in everything if (found.module, found.name) == ("ray", "serve")]
    assert [found for found in of_ray if found.alias != "ray_serve"] == []


def test_nothing_that_is_served_imports_lightning() -> None:
    assert [
        found for found in imports_of("serve") if found.top in ("lightning", "pytorch_lightning")
    ] == []


def test_no_module_is_named_like_a_top_level_package() -> None:
    used = {found.top for package in PACKAGES for found in imports_of(package)} - set(
        sys.stdlib_module_names
    )
    modules = [Path(file) for package in PACKAGES for file in files_of(package)]
    named = [path if path.name != "__init__.py" else path.parent for path in modules]
    nested = [path for path in named if len(path.parts) > 1]
    shadowing = [path for path in nested if path.stem in used | OURS]
    stages = [path for path in shadowing if path.parent == Path("train/stages")]
    assert shadowing == stages  # each stage's file has the stage's name


def test_no_two_files_share_a_name() -> None:
    files = [Path(file) for folder in (*PACKAGES, "benchmarks") for file in files_of(folder)]
    named = [path for path in files if not path.stem.startswith("__")]
    # A stage's file has the stage's name, whatever else has it.
    count = Counter(path.name for path in named if path.parent != Path("train/stages"))
    assert [name for name, times in count.items() if times > 1] == []


def test_import_serve_loads_neither_ray_nor_lightning() -> None:
    code = "import sys; from serve import load; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"ddm", "experts", "router", "serve", "torch"} <= loaded
    assert not loaded & {"ray", "lightning", "pytorch_lightning", "lightning_fabric", "train"}
