"""ddm COMMAND ...: the program from any folder; `ddm COMMAND --help` lists what a command takes.

    ddm train [CONFIG] [stage ...] [key=value ...]    train experts and a router, sample, evaluate
    ddm serve RUN [key=value ...]                     serve a run's folder or a bundle over HTTP
    ddm sample RUN [key=value ...]                    images as one PNG file or as a folder of them
    ddm evaluate RUN | IMAGES against=RUN             distances from the training images
    ddm bundle info | push | pull | keygen | sign     what is in a bundle, where it is, who signed it
    ddm table CONFIG [key=value ...]                  compare all methods on the images of a config
    ddm ablations [CONFIG] [group ...]                change one setting of a config at a time
    ddm load [RUN] [mode ...]                         throughput and latency of the server
    ddm import diffusers FOLDER [key=value ...]       make an expert of a UNet2DModel
    ddm export diffusers RUN FOLDER                   write a bundle as a pipeline of diffusers
    ddm completion bash | zsh | fish                  completion for a shell

--version prints the version.

A package of its own above the others, whose names (`train`, `serve`, ...) a user's files may have as well: it makes sure
that they are found beside this one, here and in every process that is started from here.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "configs", "ddm", "experts", "router", "serve", "train")
# The module whose `main` a command is, and words that go before the user's.
COMMANDS = {
    "train": ["train.__main__"],
    "serve": ["serve.__main__"],
    "sample": ["ddm_cli.sample"],
    "evaluate": ["ddm_cli.evaluate"],
    "bundle": ["ddm_cli.bundle"],
    "table": ["benchmarks.table.__main__"],
    "ablations": ["benchmarks.ablations.__main__"],
    "load": ["benchmarks.load.__main__"],
    "import": ["train.exchange.__main__", "import"],
    "export": ["train.exchange.__main__", "export"],
    "completion": ["ddm_cli.completion"],
}


def main() -> int:
    """Run the command line; returns the exit status, 2 if there is no such command."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").partition("\nA package")[0].rstrip())
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"ddm {version('ddm')}")
        return 0
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: the command must be one of {known}, got {command!r}", file=sys.stderr)
        return 2
    _find_packages_here()
    module, *first = COMMANDS[command]
    if module.startswith("ddm_cli.") and {"-h", "--help"} & set(words):
        print(_help(module))
        return 0
    status: int = import_module(module).main([*first, *words])
    return status


def check_packages() -> None:
    """Exit with status 2 and say why if any package is not the one beside this one.

    For `python -m train` and `python -m serve`, which look for packages in the current folder and
    on PYTHONPATH first. Nothing of them is imported.
    """
    for name in PACKAGES:
        spec = find_spec(name)
        places = [] if spec is None else (spec.submodule_search_locations or [str(spec.origin)])
        if [Path(place).resolve() for place in places] != [HERE / name]:
            found = places[0] if places else "nowhere"
            print(
                f"error: the module {name} was found at {found}, which is not ddm's ({HERE / name}): "
                "use the command `ddm`, which finds its own modules from any folder "
                "(ddm train, ddm serve), or start python -m from the checkout without PYTHONPATH",
                file=sys.stderr,
            )
            raise SystemExit(2)


def _help(module: str) -> str:
    """The docstring of a module that is not imported, because that may take seconds."""
    import ast

    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _find_packages_here() -> None:
    """Put the packages' folder before PYTHONPATH, and keep the current folder off the path of child processes."""
    here = str(HERE)
    os.environ["PYTHONSAFEPATH"] = "1"
    if given := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join([here, given])
        sys.path.insert(0, here)
