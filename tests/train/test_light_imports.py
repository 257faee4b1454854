"""What answers at once imports nothing slow: `--help` no torch, a typo in the config torch alone."""

import subprocess
import sys

import pytest

SLOW = {
    "lightning",
    "matplotlib",
    "ray",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torchmetrics",
    "torchvision",
}


def slow_imports_of(module: str, *words: str) -> set[str]:
    """The slow modules in memory after the program has run with these words."""
    program = (
        "import sys; from importlib import import_module\n"
        f"sys.argv[1:] = {words!r}\n"
        f"main = import_module({module!r}).main\n"
        f"main(*{[list(words)] if module != 'ddm_cli' else []!r})\n"
        f"print(*{SLOW | {'numpy', 'torch'}!r} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train.__main__", ["--help"]),
        ("serve.__main__", ["--help"]),
        ("benchmarks.table.__main__", ["--help"]),
        ("ddm_cli", ["train", "--help"]),
        ("ddm_cli", ["serve", "--help"]),
        ("ddm_cli", ["sample", "--help"]),
        ("ddm_cli", ["evaluate", "--help"]),
        ("ddm_cli", ["completion", "--help"]),
        ("ddm_cli", ["--help"]),
    ],
)
def test_help_needs_no_torch(module: str, words: list[str]) -> None:
    assert slow_imports_of(module, *words) == set()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train.__main__", ["digits", "expert.stepz=3"]),
        ("serve.__main__", ["runs/digits", "serve.prot=3"]),
    ],
)
def test_a_typo_in_the_config_needs_torch_alone(module: str, words: list[str]) -> None:
    assert slow_imports_of(module, *words) == {"numpy", "torch"}
